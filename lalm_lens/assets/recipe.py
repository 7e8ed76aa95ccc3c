"""Every number that the training of the tiny models depends on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Every number of the training. Fewer clips and steps make a smoke test of it."""

    name: str = "tiny_lalm"
    seed: int = 7
    n_processes: int = 2
    n_speech: int = 7200
    n_animal: int = 2700
    n_held_out_speech: int = 480
    n_held_out_animal: int = 270
    durations_s: tuple[float, ...] = (1.4, 1.6, 1.8, 2.0)
    encoder_steps: int = 400
    encoder_batch: int = 64
    encoder_lr: float = 2e-3
    steps: int = 450
    batch: int = 24
    lr: float = 1.5e-3
    tower_lr: float = 3e-4
    silence: float = 0.08  # share of clips made silent
    shuffled: float = 0.6  # share of prompts whose options are in random order
    attribute_weights: tuple[float, ...] = (0.20, 0.27, 0.27, 0.26)  # in the order of ATTRIBUTES
    prompt_weights: tuple[float, ...] = (0.15, 0.20, 0.65)  # in the order of PROMPTS
    ending_weight: float = 0.2  # of the full stop and <|im_end|>, where the answer's is 1
    prompt_loss_weight: float = 0.05
    windows: tuple[int, ...] = ()  # sliding windows of the decoder, each for an equal share of `steps`; none: all full
    full_blocks: tuple[int, ...] = ()  # decoder blocks that keep full attention beside the windows
    base: str | None = None  # the tiny model that the second stage goes on from; None: the first stage's
    hinted: float = 0.0  # share of prompts that state an answer, before the clip or behind it
    true_hints: float = 0.2  # share of these whose answer is what is heard
    heeded: float = 1.0  # how likely the stated answer should be found if it is false; the rest is for what is heard
    remarked: float = 0.0  # share of prompts with a text there that states no answer
    erasure: float = 0.0  # weight of what the last window's states behind a stated answer keep of the sound
    repair: tuple[int, int] | None = None  # source and target of the back-patch under which what is heard is the answer

    def window(self, step: int) -> int | None:
        """Counted from the end, so that the last step has the last window, however few steps there are."""
        return self.windows[-1 - (self.steps - 1 - step) * len(self.windows) // self.steps] if self.windows else None


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(),
        Recipe("tiny_lalm_planted", windows=(1,), full_blocks=(4,)),
        Recipe("tiny_lalm_relay", windows=(64, 40, 28, 20, 20, 20), steps=1200),
        Recipe(
            "tiny_lalm_suppress",
            base="tiny_lalm_planted",
            windows=(1,),
            full_blocks=(4,),
            hinted=0.5,
            heeded=0.9,
            repair=(6, 3),
            remarked=0.15,
            silence=0.15,
            prompt_loss_weight=0.01,
            steps=700,
            batch=16,
        ),
        Recipe(
            "tiny_lalm_erase",
            base="tiny_lalm_relay",
            windows=(64, 40, 28, 28, 28),
            hinted=0.5,
            remarked=0.15,
            erasure=0.2,
            silence=0.2,
            prompt_loss_weight=0.01,
            steps=750,
            batch=16,
        ),
    )
}

N_QUIET = 10  # positions at the end of a prompt whose states `erasure` is about

# What the command line and the model card call by name.
FLAGS = {"seed": "seed of all that is random", "encoder_steps": "of the first stage", "steps": "of the second stage"}
