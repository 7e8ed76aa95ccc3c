"""Every number that the training of the tiny audio-visual model depends on."""

from dataclasses import dataclass
from typing import Literal

from lalm_lens.assets.recipe import Recipe

Kind = Literal["heard", "seen", "aligned", "conflict"]  # what is in a prompt; whether sound and picture agree
FULL_BLOCK = 3  # of the decoder: there, and nowhere else, a position looks at others


@dataclass(frozen=True)
class AVRecipe:
    """Every number of the training. Fewer clips and steps make a smoke test of it."""

    name: str = "tiny_lalm_av"
    seed: int = 7
    n_processes: int = 2
    n_clips: int = 2700
    n_pictures: int = 5400
    n_held_out: int = 270
    ears_steps: int = 250  # of the audio encoder alone
    ears_lr: float = 2e-3
    eyes_steps: int = 500  # of the vision encoder alone
    eyes_lr: float = 4e-3
    encoder_batch: int = 48
    steps: int = 500
    batch: int = 16
    lr: float = 2e-3
    tower_lr: float = 5e-4
    kinds: tuple[tuple[Kind, float], ...] = (("heard", 0.3), ("seen", 0.15), ("aligned", 0.15), ("conflict", 0.4))
    heeded: float = 0.85  # how likely the picture's answer should be found in a conflict; the rest is for the sound's
    filmed: float = 0.25  # share of pictures that are a silent video of `n_frames`
    n_frames: int = 2
    silent: float = 0.12  # share of clips made silent
    blank: float = 0.12  # share of pictures made black
    shuffled: float = 0.6  # share of prompts whose options are in random order
    prompt_weights: tuple[float, ...] = (0.15, 0.20, 0.65)  # in the order of PROMPTS
    ending_weight: float = 0.2  # of the full stop and <|im_end|>, where the answer's is 1
    naming_weight: float = 0.1  # of what is heard and seen, read at its own positions

    @property
    def sounds(self) -> Recipe:
        """The clips are those of the other tiny models."""
        return Recipe(self.name, self.seed, self.n_processes, n_speech=0, n_animal=self.n_clips)


# What the command line and the model card call by name.
FLAGS = {
    "seed": "seed of all that is random",
    "ears_steps": "of the audio encoder alone",
    "eyes_steps": "of the vision encoder alone",
    "steps": "of the whole model",
}
