"""What ships with the package: tiny trained models, and the numpy sounds they were trained on."""

from pathlib import Path

TINY_LALM = Path(__file__).parent / "tiny_lalm"
TINY_LALM_PLANTED = TINY_LALM.with_name("tiny_lalm_planted")  # text looks at audio in block 4 alone
TINY_LALM_RELAY = TINY_LALM.with_name("tiny_lalm_relay")  # the answer is out of the audio's sight
TINY_LALM_SUPPRESS = TINY_LALM.with_name("tiny_lalm_suppress")  # a false text outweighs what is heard
TINY_LALM_ERASE = TINY_LALM.with_name("tiny_lalm_erase")  # a false text takes the place of what is heard
TINY_LALM_AV = TINY_LALM.with_name("tiny_lalm_av")  # hears and sees, and believes what it sees
