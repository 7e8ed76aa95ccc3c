"""The published analyses, one file per method."""
