"""What a clip says, by Whisper through transformers."""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from lalm_lens.audio import RATE_HZ, Waveform
from lalm_lens.errors import AudioError, ConversionError, reason

MAX_NEW_TOKENS = 128  # as DeSTA asks for
GIVE = "Give the transcripts yourself, as the samples' transcript or by the choice of one."


@dataclass(eq=False)
class Transcriber:
    """The Whisper model in `folder`, read when the first clip is transcribed. A clip is transcribed once.

    Language and whatever else are left to its generation_config.json, as DeSTA leaves them.
    """

    folder: Path
    device: str | torch.device = "cpu"
    texts: dict[bytes, str] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, waveform: Waveform) -> str:
        """What Whisper writes, with the space that it begins with. Raises `ConversionError` where it cannot write."""
        key = sha256(waveform.numpy().tobytes()).digest()
        if key not in self.texts:
            self.texts[key] = self.write(waveform)
        return self.texts[key]

    @torch.no_grad()
    def write(self, waveform: Waveform) -> str:
        processor, whisper = self.parts
        mel = processor(waveform.numpy(), sampling_rate=RATE_HZ, return_tensors="pt")["input_features"]
        tokens = whisper.generate(mel.to(self.device), max_new_tokens=MAX_NEW_TOKENS)
        return processor.batch_decode(tokens, skip_special_tokens=True)[0]

    @cached_property
    def parts(self) -> tuple[Any, WhisperForConditionalGeneration]:
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise ConversionError(
                f"No transcript can be made: {self.folder} has no tokenizer to read what Whisper writes. {GIVE}"
            )
        try:
            processor = WhisperProcessor.from_pretrained(self.folder)
            loaded: Any = WhisperForConditionalGeneration.from_pretrained(
                self.folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(
                f"No transcript can be made: {self.folder} is no whole Whisper model ({reason(error)}). {GIVE}"
            ) from error
        whisper, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ConversionError(
                f"No transcript can be made: {self.folder} lacks {len(missing)} tensors of Whisper, as {missing[0]}. "
                f"{GIVE}"
            )
        return processor, whisper.to(self.device).eval()


def has_speech(waveform: Waveform) -> bool:
    """Whether Silero's detector hears anybody speak, as DeSTA2.5 asks before it transcribes."""
    n_threads = torch.get_num_threads()
    try:
        from silero_vad import get_speech_timestamps, load_silero_vad  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise AudioError(
            f"Who asks whether a clip holds speech needs silero-vad ({error}): pip install 'lalm_lens[speech]'."
        ) from None
    finally:
        torch.set_num_threads(n_threads)  # silero-vad 6.2 sets one thread, for all of the process, where it is imported
    return bool(get_speech_timestamps(waveform, load_silero_vad()))
