"""What ships with the package: tiny trained models, and the numpy sounds they were trained on."""

from pathlib import Path

TINY_LALM = Path(__file__).parent / "tiny_lalm"
TINY_LALM_PLANTED = TINY_LALM.with_name("tiny_lalm_planted")  # text looks at audio in block 4 alone
TINY_LALM_RELAY = TINY_LALM.with_name("tiny_lalm_relay")  # the answer is out of the audio's sight
