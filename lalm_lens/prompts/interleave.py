"""Where the sound of a video is between its frames, in the prompts of Qwen2.5-Omni (arXiv 2503.20215)."""

from collections.abc import Iterable
from itertools import pairwise, zip_longest

from lalm_lens.inputs import HeardVideo

PER_S = 25  # tokens of sound in a second
CHUNK = 2 * PER_S


def in_turn(video: HeardVideo, n_video: int, n_audio: int) -> list[int]:
    """In the order of the prompt, 0 for each of the `n_video` tokens of a video, and 1 for each of its sound: those of
    the frames of 2 s, those of 2 s of sound, and so on, and at last what one of them has left.

    Same as HF `Qwen2_5OmniProcessor.replace_video_with_audio_token`.
    """
    n_frames, seconds = int(video.grid[0, 0]), video.seconds.double().item()
    times = (frame * seconds * PER_S for frame in range(n_frames) for _ in range(n_video // n_frames))
    chunks = zip_longest(n_in_chunks(times), n_in_chunks(range(n_audio)), fillvalue=0)
    return [which for its in chunks for which, n in enumerate(its) for _ in range(n)]


def n_in_chunks(times: Iterable[float | int]) -> list[int]:
    """How many tokens each chunk has. A token begins one chunk at most, as in HF, even where it is chunks later."""
    begins, n = [0], 0
    for n, time in enumerate(times, start=1):
        if time >= len(begins) * CHUNK:
            begins.append(n - 1)
    return [after - before for before, after in pairwise([*begins, n])]
