"""The commands of `lalm-lens`, one file for those that belong together."""
