"""What ships with the package: a tiny trained model, and the numpy sounds it was trained on."""

from pathlib import Path

TINY_LALM = Path(__file__).parent / "tiny_lalm"
