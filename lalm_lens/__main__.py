"""`python -m lalm_lens` is the command `lalm-lens`."""

from lalm_lens.cli import main

main()
