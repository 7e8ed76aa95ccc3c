"""What a model asks of its audio encoder."""

from abc import abstractmethod
from typing import TypeVar

from torch import Tensor, nn

Frames = TypeVar("Frames", int, Tensor)


class AudioEncoder(nn.Module):
    """Mel features in, encoder states out. Called with (mel, n_frames)."""

    @abstractmethod
    def n_audio(self, n_frames: Frames) -> Frames:
        """Audio tokens of so many mel frames (10 ms each): the states that belong to the sound."""

    def n_entering(self, n_frames: Frames) -> Frames:
        """Positions that the adapter takes of so many mel frames: by default as many as it makes."""
        return self.n_audio(n_frames)
