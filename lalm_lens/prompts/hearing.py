"""How clips become rows of mel features, each of which fills one window of the audio encoder."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from lalm_lens.audio import Waveforms
from lalm_lens.config import EncoderConfig
from lalm_lens.encoders.whisper import n_states
from lalm_lens.errors import ConversionError

Features = tuple[Float[Tensor, "clip mel frames"], Int[Tensor, " clip"]]  # and the frames of sound in each row


class Hearing(ABC):
    """What one model does with a clip before its encoder. A long clip may become several rows, one after the other."""

    longer: str  # what becomes of a clip longer than a window, in words

    @abstractmethod
    def n_windows(self, hf: Any, n_fitting: int) -> int:
        """The most windows of a clip. `n_fitting` is how many the decoder has positions for."""

    @abstractmethod
    def features(self, extractor: Any, waveforms: Waveforms) -> Features:
        """Log-mel features by HF's own extractor, and how many frames (10 ms) of each row the encoder hears."""

    def n_frames(self, n_samples: int, hop: int) -> int:
        """Mel frames of a clip that the encoder hears, `hop` samples each: the last one possibly begun only."""
        return -(-n_samples // hop)

    def check(self, hf: Any, cfg: EncoderConfig) -> None:
        """Raise `ConversionError` for a feature extractor that was made for another encoder."""
        extractor = getattr(hf, "feature_extractor", None)
        if extractor is None or not hasattr(hf, "tokenizer"):
            raise ConversionError(
                f"A {type(hf).__name__} is no processor with a tokenizer and a feature extractor. Put the model's own "
                "processor files beside its weights."
            )
        if extractor.padding_side != "right":
            raise ConversionError(
                f"The feature extractor of this {type(hf).__name__} pads on the {extractor.padding_side}, and encoders "
                "hear a clip from its first frame: set its padding_side to 'right'."
            )
        made, taken = (extractor.feature_size, extractor.nb_max_frames), self.taken(extractor, cfg)
        if made != taken:
            raise ConversionError(
                f"This {type(hf).__name__} belongs to another model: it makes {made[0]} mel bins x {made[1]} frames, "
                f"and the encoder takes {taken[0]} x {taken[1]}."
            )

    def taken(self, extractor: Any, cfg: EncoderConfig) -> tuple[int, int]:
        """The mel bins and frames that the encoder takes at once."""
        return cfg.n_mels, cfg.n_frames


class OneWindow(Hearing):
    """A clip is padded to one window, and a longer one is not heard (Qwen2-Audio)."""

    longer = "longer clips are refused"

    def n_windows(self, hf: Any, n_fitting: int) -> int:
        return 1

    def features(self, extractor: Any, waveforms: Waveforms) -> Features:
        batch = extractor(
            [waveform.numpy() for waveform in waveforms],
            sampling_rate=extractor.sampling_rate,
            padding="max_length",
            return_attention_mask=True,  # in the constructor alone it would count samples, not frames
            return_tensors="pt",
        )
        return batch["input_features"], batch["attention_mask"].sum(-1)


class PaddedWindow(OneWindow):
    """The same for an encoder that knows no padding: it hears the silence behind the clip (DeSTA)."""

    def features(self, extractor: Any, waveforms: Waveforms) -> Features:
        mel, _ = super().features(extractor, waveforms)
        return mel, torch.full((len(mel),), mel.shape[-1])


class CutClip(OneWindow):
    """Features are made of a clip padded to one window, and end with the clip's last whole frame (Qwen-Audio)."""

    def n_frames(self, n_samples: int, hop: int) -> int:
        return n_samples // hop

    def features(self, extractor: Any, waveforms: Waveforms) -> Features:
        mel, _ = super().features(extractor, waveforms)
        n_frames = torch.tensor([self.n_frames(len(waveform), extractor.hop_length) for waveform in waveforms])
        return mel[..., : 2 * n_states(int(n_frames.max()))], n_frames


class WholeClip(OneWindow):
    """The encoder takes a clip of any length, and hears as much as the extractor does (Qwen2.5-Omni: 5 minutes). A
    batch is padded to its longest clip only."""

    longer = "longer clips as far as the feature extractor goes"

    def taken(self, extractor: Any, cfg: EncoderConfig) -> tuple[int, int]:
        return cfg.n_mels, extractor.nb_max_frames

    def features(self, extractor: Any, waveforms: Waveforms) -> Features:
        hop = extractor.hop_length
        n_frames = torch.tensor([-(-len(waveform) // hop) for waveform in waveforms])
        # As in a clip padded to the end: no frame of the sound may see the end of the silence behind it.
        n_samples = min(hop * int(n_frames.max()) + extractor.n_fft, extractor.n_samples)
        batch = extractor(
            [waveform.numpy() for waveform in waveforms],
            sampling_rate=extractor.sampling_rate,
            padding="max_length",
            max_length=-(-n_samples // hop) * hop,
            return_tensors="pt",
        )
        return batch["input_features"][..., : int(n_frames.max())], n_frames


class Windows(OneWindow):
    """A clip is cut into windows before features are made of each (Audio Flamingo 3)."""

    longer = "longer clips in windows of that"

    def n_windows(self, hf: Any, n_fitting: int) -> int:
        return min(n_fitting, int(hf.max_audio_len // hf.feature_extractor.chunk_length))

    def features(self, extractor: Any, waveforms: Waveforms) -> Features:
        return super().features(extractor, [part for clip in waveforms for part in clip.split(extractor.n_samples)])


class Chunks(Hearing):
    """Features are made of the whole clip, padded with silence to whole windows, and then cut (Voxtral). Its encoder
    knows no padding: it hears the silence."""

    longer = "longer clips in windows of that"

    def n_windows(self, hf: Any, n_fitting: int) -> int:
        return n_fitting

    def features(self, extractor: Any, waveforms: Waveforms) -> Features:
        rows = []
        for waveform in waveforms:  # one at a time: the loudest frame of a clip sets the floor of all of its chunks
            batch = extractor(
                waveform.numpy(),
                sampling_rate=extractor.sampling_rate,
                padding=True,
                truncation=False,
                pad_to_multiple_of=extractor.n_samples,
                return_tensors="pt",
            )
            whole = batch["input_features"][0]
            rows.append(rearrange(whole, "mel (chunk frames) -> chunk mel frames", frames=extractor.nb_max_frames))
        mel = torch.cat(rows)
        return mel, torch.full((len(mel),), mel.shape[-1])
