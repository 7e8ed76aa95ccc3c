"""Stretches of a clip, as positions of the prompt or states of the audio encoder."""

from collections.abc import Sequence
from typing import NamedTuple

from lalm_lens.errors import InputError
from lalm_lens.inputs import Inputs
from lalm_lens.model import HookedLALM
from lalm_lens.runs import Run


class Window(NamedTuple):
    positions: tuple[int, ...]
    span_s: tuple[float, float]  # from the beginning of the clip
    row: int | None = None  # of the encoder's states, where a clip has several


def refuse_window(window_s: float) -> None:
    """Raise `InputError` for a length that no stretch of a clip has."""
    if not 0 < window_s < float("inf"):
        raise InputError(f"A window is longer than 0 s, and not endless; got {window_s}.")


def windows(positions: Sequence[int], each_s: float, window_s: float) -> list[Window]:
    """Consecutive positions of `window_s` together, at least one, with the seconds that they hold."""
    refuse_window(window_s)
    size = max(1, round(window_s / each_s))
    parts = [tuple(positions[start : start + size]) for start in range(0, len(positions), size)]
    return [Window(its, (n * size * each_s, (n * size + len(its)) * each_s)) for n, its in enumerate(parts)]


def audio_windows(model: HookedLALM, run: Run, window_s: float) -> list[Window]:
    """Windows of the run's audio positions."""
    return windows(run.indices("audio"), position_s(model), window_s)


def position_s(model: HookedLALM) -> float:
    """How much of the clip one audio position holds. Raises `InputError` where each of them looks at all of it."""
    if (each_s := span_s(model)) is None:
        raise InputError(
            f"The audio positions of a {model.lalm_cfg.model_type} model have no place in time: each is a query that "
            "looks at the whole clip. Patch all of them, or the states of the encoder: kinds=['encoder_window']."
        )
    return each_s


def span_s(model: HookedLALM) -> float | None:
    """How much of the clip one audio position holds; None where each of them looks at all of it."""
    n_frames = model.lalm_cfg.encoder.n_frames
    return None if model.lalm_cfg.qformer else 0.01 * n_frames / model.audio_encoder.n_audio(n_frames)


def encoder_windows(model: HookedLALM, run: Run, window_s: float) -> list[Window]:
    """Windows of the states that the audio encoder makes of the run's clip, each in one row of them."""
    rows = model.perceived(run.inputs, "audio_encoder") if isinstance(run.inputs, Inputs) else []
    if not rows:
        raise InputError("The encoder is patched in a run that hears a clip: give `Inputs` with its audio.")
    cfg = model.lalm_cfg.encoder
    each_s, row_s = 0.01 * cfg.n_frames / cfg.n_ctx, 0.01 * cfg.n_frames
    return [
        Window(positions, (start_s + row * row_s, end_s + row * row_s), row)
        for row, (n, _, _) in enumerate(rows)
        for positions, (start_s, end_s), _ in windows(range(n), each_s, window_s)
    ]
