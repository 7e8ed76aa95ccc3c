"""A question about a clip becomes what a model takes: tokens and features, by the model's own processor."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from lalm_lens.attributes import Attribute, Form
from lalm_lens.audio import Waveform, Waveforms, check_audible
from lalm_lens.config import LALMConfig, VisionConfig
from lalm_lens.errors import ConversionError, InputError, PromptError, reason
from lalm_lens.inputs import HeardVideo, Images, Inputs, Videos
from lalm_lens.pieces import Piece, Statement, turn_of
from lalm_lens.prompts.hearing import Hearing
from lalm_lens.prompts.interleave import in_turn
from lalm_lens.prompts.prompt import Position, Prompt
from lalm_lens.prompts.templates import Picture, Template, Transcript
from lalm_lens.transcribe import GIVE, Transcriber

NOTHING: Mapping[Picture, Sequence[int]] = {}


@dataclass(frozen=True)
class Processor:
    """A model's own tokenizer and feature extractor, and what its conversion knows about them."""

    hf: Any
    template: Template
    hearing: Hearing
    cfg: LALMConfig
    n_audio: Callable[[int], int] = field(repr=False)  # audio tokens of so many mel frames
    transcriber: Transcriber | None = None  # of a model that reads what the clip says

    def check(self) -> None:
        """Raise `ConversionError` for the processor of another model."""
        self.hearing.check(self.hf, self.cfg.encoder)
        self.template.check(self.hf, self.cfg.audio_token, self.n_audio(self.cfg.encoder.n_frames))
        if self.cfg.vision is not None:
            check_sight(self.hf, self.cfg.vision)
            self.template.check_sight(self.hf, self.cfg.vision.image_token, self.cfg.vision.video_token)

    @property
    def tokenizer(self) -> Any:
        return self.hf.tokenizer

    def prompt(
        self,
        attribute: Attribute,
        n_frames: int | None,
        form: Form = "P3",
        labels: Sequence[str] | None = None,
        answer: str | None = None,
        images: Images | None = None,
        videos: Videos | None = None,
        transcript: Transcript | None = None,
        statement: Statement | None = None,
    ) -> Prompt:
        """AudioLens' P1 (no text), P2 (question) or P3 (question, options), up to the end of the forced answer prefix.

        The clip has `n_frames` mel frames (10 ms); None is a prompt without a clip. `labels` are the options, the
        attribute's own by default; tokens of the option `answer` are marked as correct. `images`, from `see`, and then
        `videos`, which are silent, come before the clip; a `HeardVideo` stands in its place, frames and sound in turn,
        and is silent without a clip. `transcript` is what the clip says, for a model that reads it
        too (DeSTA): " " by default, as of a clip without speech. `statement` is what the user says of the clip before
        or behind it. Raises `PromptError` if what the form needs is empty, or if the model's chat template does more
        than to put the texts in their places.
        """
        if n_frames is not None and (n_frames < 1 or self.n_audio(n_frames) < 1):
            raise PromptError(f"A clip of {n_frames} mel frames (10 ms each) makes no audio token: give a longer one.")
        if n_frames is None and transcript is not None:
            raise PromptError("A transcript is of a clip, and this prompt has none: leave it out.")
        claim: list[Piece] = []
        if statement is not None and statement.is_transcript and self.template.has_transcript and n_frames is not None:
            transcript, claim = transcribed(statement, transcript)
            statement = replace(statement, text="", opening="", closing="", warning=statement.warning.lstrip())
        turn = turn_of(attribute, form, labels or attribute.labels, statement, n_frames is not None)
        heard = videos if isinstance(videos, HeardVideo) and n_frames is not None else None
        turn = replace(turn, in_video=heard is not None)
        pictures: dict[Picture, Images | None] = {"image": images, "video": videos}
        n_patches: dict[Picture, list[int]] = {
            kind: its.grid.prod(-1).tolist() for kind, its in pictures.items() if its is not None
        }
        if n_patches and self.cfg.vision is None:
            raise PromptError(f"This {self.cfg.model_type} model hears and does not see: leave out images and videos.")
        kinds: list[Picture] = [
            kind for kind, its in n_patches.items() for _ in its if kind == "image" or heard is None
        ]
        template = self.template.of(self.cfg.audio_token)
        template = template if transcript is None else template.saying(transcript)
        written = labelled(template.write(self.hf, turn, attribute.prefix, kinds), claim, self.hf)
        prompt = self.expand(written, 0 if n_frames is None else self.n_audio(n_frames), n_patches, heard)
        marked = (replace(p, is_correct=p.label is not None and p.label == answer) for p in prompt.positions)
        return replace(prompt, positions=tuple(marked))

    def transcribe(self, waveform: Waveform) -> str:
        """What the model reads of a clip. Raises `PromptError` where it reads nothing, or nobody can transcribe."""
        if not self.template.has_transcript:
            raise PromptError(f"The prompts of a {self.cfg.model_type} model hold no transcript: leave it out.")
        if self.transcriber is None:
            raise PromptError(f"There is no Whisper beside this model to transcribe a clip. {GIVE}")
        return self.template.as_transcript(self.transcriber(waveform))

    def transcript_tokens(self, transcript: Transcript) -> tuple[int, ...]:
        """The tokens of what a clip says. Raises `PromptError` for more than one line, or marks of the template."""
        return self.template.saying(transcript).transcript_tokens(self.hf)

    def see(self, images: Sequence[Any]) -> Images:
        """Images, of PIL or as arrays, as patches of pixels."""
        if self.cfg.vision is None:
            raise PromptError(f"This {self.cfg.model_type} model hears and does not see: leave out the images.")
        try:
            batch = self.hf.image_processor(images=list(images), return_tensors="pt")
        except (ValueError, TypeError, AttributeError, IndexError, OSError) as error:
            raise InputError(
                f"The image processor cannot read these images ({reason(error)}): give a list of PIL images in RGB, or "
                "of arrays [height, width, 3] from 0 to 255."
            ) from error
        return Images(batch["pixel_values"], batch["image_grid_thw"])

    def watch(self, frames: Sequence[Any], fps: float | int) -> Videos:
        """One silent video from its frames, so many in a second, each resized as an image is. As HF's video processor
        makes it, the last frame is repeated where the last patch in time is not full; its limits of size are others."""
        if not fps > 0 or not frames:
            raise InputError(f"A video has frames, and some of them in a second; got {len(frames)} and {fps}.")
        seen = self.see(frames)
        if (seen.grid != seen.grid[0]).any():
            raise InputError("The frames of a video are of one size; these are of several.")
        assert self.cfg.vision is not None, "it sees"
        n_together, channels = self.cfg.vision.n_frames, self.cfg.vision.n_channels
        sizes = {"frame": len(frames), "channel": channels, "t": n_together}
        stills = rearrange(seen.patches, "(frame patch) (channel t pixel) -> t frame patch channel pixel", **sizes)[0]
        stills = torch.cat([stills, stills[-1:].expand(-len(frames) % n_together, -1, -1, -1)])
        moving = rearrange(stills, "(n t) patch channel pixel -> (n patch) (channel t pixel)", t=n_together)
        grid = torch.tensor([[len(stills) // n_together, *seen.grid[0, 1:].tolist()]])
        return Videos(moving, grid, torch.tensor([n_together / fps], dtype=torch.float64))

    def expand(
        self,
        prompt: Prompt,
        n_audio: int,
        n_patches: Mapping[Picture, Sequence[int]] = NOTHING,
        heard: HeardVideo | None = None,
    ) -> Prompt:
        """The one placeholder of the clip, `n_audio` times, and those of pictures, once for each square of patches.
        Without audio there is no clip. Those of a video that is `heard` and of its sound are mixed."""
        n_clips = prompt.tokens.count(self.cfg.audio_token)
        if n_clips != min(1, n_audio):
            raise PromptError(
                f"Token {self.cfg.audio_token}, which stands for the clip, is in the prompt {n_clips} times, not "
                f"{'once' if n_audio else 'never'}. "
                "The tokenizer belongs to another model, or the prompt contains the placeholder."
            )
        vision, times = self.cfg.vision, [n_audio if token == self.cfg.audio_token else 1 for token in prompt.tokens]
        for kind, its in n_patches.items():
            assert vision is not None, "a model that does not see was given nothing"
            placeholder = {"image": vision.image_token, "video": vision.video_token}[kind]
            seen = [pos for pos, token in enumerate(prompt.tokens) if token == placeholder]
            if len(seen) != len(its):
                raise PromptError(f"The chat template has {len(seen)} placeholders for {len(its)} {kind}s.")
            for pos, n in zip(seen, its, strict=True):
                times[pos] = n // vision.merge**2
        order = [pos for pos, n in enumerate(times) for _ in range(n)]
        if heard is not None:
            sound = prompt.tokens.index(self.cfg.audio_token)
            begin, n_mixed = sum(times[: sound - 1]), sum(times[sound - 1 : sound + 1])
            order[begin : begin + n_mixed] = [sound - 1 + each for each in in_turn(heard, times[sound - 1], n_audio)]
        return Prompt(tuple(prompt.tokens[pos] for pos in order), tuple(prompt.positions[pos] for pos in order))

    def begun(self, prompt: Prompt, tokens: Sequence[int]) -> Prompt:
        """The prompt, and an answer to it that has begun with `tokens`."""
        answer = (Position(self.tokenizer.decode([token]), "answer") for token in tokens)
        return Prompt((*prompt.tokens, *tokens), (*prompt.positions, *answer))

    def inputs(
        self,
        prompts: Sequence[Prompt],
        waveforms: Waveforms,
        images: Images | None = None,
        videos: Videos | None = None,
    ) -> Inputs:
        """One left-padded batch; the clips are those of the prompts that hold one, in their order. `images` and
        `videos` are those of all prompts.

        Raises `AudioError` for a clip that is too short to make a token, or longer than the model hears.
        """
        n_clips = sum(self.cfg.audio_token in prompt.tokens for prompt in prompts)
        if not prompts or n_clips != len(waveforms):
            raise InputError(
                f"Each prompt is about one clip, or has none; got {len(prompts)} prompts, {n_clips} of them with a "
                f"clip, and {len(waveforms)} clips."
            )
        for waveform in waveforms:
            self.check_audible(waveform, "A clip")
        padded = self.pad(prompts)
        if not waveforms:
            return Inputs(*padded, images=images, videos=videos)
        mel, n_frames = self.hearing.features(self.hf.feature_extractor, waveforms)
        return Inputs(*padded, mel=mel, n_frames=n_frames, images=images, videos=videos)

    def pad(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Bool[Tensor, "batch pos"]]:
        n_pos = max(len(prompt) for prompt in prompts)
        tokens = torch.full((len(prompts), n_pos), self.tokenizer.pad_token_id or 0)
        is_token = torch.zeros(len(prompts), n_pos, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens[row, n_pos - len(prompt) :] = torch.tensor(prompt.tokens)
            is_token[row, n_pos - len(prompt) :] = True
        if n_pos > self.cfg.decoder.n_ctx:
            raise InputError(f"The prompt has {n_pos} positions; this model has {self.cfg.decoder.n_ctx}.")
        return tokens, is_token

    @property
    def n_samples(self) -> int:
        """The longest clip that the model hears."""
        n_fitting = self.cfg.decoder.n_ctx // self.n_audio(self.cfg.encoder.n_frames)
        return self.hf.feature_extractor.n_samples * self.hearing.n_windows(self.hf, max(1, n_fitting))

    def check_audible(self, waveform: Waveform, name: str) -> None:
        """Raise `AudioError` for a clip that the model cannot hear, or not to its end."""
        check_audible(waveform, self.n_samples, name)

    def n_frames(self, waveform: Waveform) -> int:
        """Mel frames (10 ms) of a clip."""
        return self.hearing.n_frames(len(waveform), self.hf.feature_extractor.hop_length)

    def label_tokens(self, labels: Sequence[str], label_space: bool = True) -> dict[str, int]:
        """The first token of each label, as the model would emit it after the prefix: with a leading space.

        `label_space=False` is what AudioLens' released code scores. Raises `PromptError` if two labels begin with
        the same token, because then no argmax can tell them apart.
        """
        for label, n in Counter(labels).items():
            if n > 1:
                raise PromptError(f"The label {label!r} is given {n} times. Give every label once.")
        tokens = {label: self.answer_tokens(label, label_space)[0] for label in labels}
        for token in tokens.values():
            twins = [other for other, its in tokens.items() if its == token]
            if len(twins) > 1:
                advice = "Use other words" + ("." if label_space else ", or score them with the space before them.")
                raise PromptError(
                    f"The labels {twins} begin with the same token {self.tokenizer.decode([token])!r}, so their first "
                    f"token cannot tell them apart. {advice}"
                )
        return tokens

    def answer_tokens(self, label: str, label_space: bool = True) -> tuple[int, ...]:
        """All tokens of a label, as the model would emit it after the prefix."""
        tokens = self.tokenizer(" " * label_space + label, add_special_tokens=False)["input_ids"]
        if not label.strip() or not tokens:
            raise PromptError(f"The label {label!r} has no tokens. Leave out empty labels.")
        return tuple(tokens)


def transcribed(statement: Statement, transcript: Transcript | None) -> tuple[str, list[Piece]]:
    """What is stated as the transcript of the clip."""
    if transcript is not None:
        raise PromptError("What is stated is a transcript of the clip, and it has another one: leave one of them out.")
    if statement.order == "text_first":
        raise PromptError('The transcript has its place behind the clip in the prompts of this model: "audio_first".')
    return statement.text, statement.claim


def labelled(prompt: Prompt, claim: Sequence[Piece], hf: Any) -> Prompt:
    """With the label of the option that its transcript states on the tokens that do."""
    if not claim:
        return prompt
    owner = [piece for piece in claim for _ in piece.text]
    encoding = hf.tokenizer(
        "".join(piece.text for piece in claim), add_special_tokens=False, return_offsets_mapping=True
    )
    labels = iter([owner[max(end - 1, start)].label for start, end in encoding["offset_mapping"]])
    marked = (replace(its, label=next(labels)) if its.region == "transcript" else its for its in prompt.positions)
    return replace(prompt, positions=tuple(marked))


def check_sight(hf: Any, vision: VisionConfig) -> None:
    """Raise `ConversionError` for an image processor that was made for another vision tower."""
    images = getattr(hf, "image_processor", None)
    if images is None:
        raise ConversionError(
            f"A {type(hf).__name__} has no image processor, and this model sees. Put the model's own processor files "
            "beside its weights."
        )
    made = images.patch_size, images.temporal_patch_size, images.merge_size
    if made != (vision.patch, vision.n_frames, vision.merge):
        raise ConversionError(
            f"This {type(hf).__name__} belongs to another model: it makes patches of {made[0]} pixels and {made[1]} "
            f"frames in squares of {made[2]}, and the vision tower takes {vision.patch}, {vision.n_frames} and "
            f"{vision.merge}."
        )
