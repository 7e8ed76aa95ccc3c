"""Back-patching: what deep layers made of the audio is given to earlier layers, which go on from there.

    h[target + k] <- h[source + k]        for k = -(w // 2) .. w // 2, at the positions of one place

Run 1 is unchanged; in run 2, on the same input, states behind its blocks become those of run 1 from deeper blocks, and
all that comes after is computed again. Pairs of which one layer is none are left out. So arXiv 2506.09047 patches the
positions of images; one position alone is arXiv 2406.12775. The pair of layers is chosen on other clips than it is
measured on, and, as published, on the same.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from lalm_lens.aggregates import interval
from lalm_lens.attributes import Attribute, Form
from lalm_lens.conflict import CONFLICT_COLUMNS
from lalm_lens.datasets import Sample
from lalm_lens.engine.branches import check
from lalm_lens.engine.plan import Engine
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question, Told, questions
from lalm_lens.experiments.changed import ANSWER_COLUMNS, Changed, How, Variant, answers, frame_of
from lalm_lens.experiments.cuts import place_name, positions
from lalm_lens.experiments.enrich import split
from lalm_lens.experiments.text_dominance import SIDES, WHEN, Comparison, Outcome, comparison
from lalm_lens.fingerprints import weights_fingerprint
from lalm_lens.generation import Generated
from lalm_lens.interventions import NamedHook, Patch, hook_name
from lalm_lens.metrics import Predict
from lalm_lens.model import HookedLALM
from lalm_lens.proportions import wilson
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.runs import Run, Source
from lalm_lens.shapes import typed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Regions = str | tuple[str, ...]
Later = Literal["recomputed", "pinned"]
On = Literal["held_out", "same"]
By = Literal["accuracy", "label_probability", "tdr"]
States = Mapping[int, Float[Tensor, "at d_model"]]  # behind some blocks, at the positions that are patched

N_LAYERS = 8  # of a grid, where no layers are asked for
ALPHA = 0.05  # a change is one where its exact p is below
ROUNDING = 1e-6  # probabilities that are no further apart are the same
CONTROL, MATCHED = "control", "audio_matched"
SAVE_ONE = "save one with `BackPatch.chosen().save(path)`."
LEAST = {"n_layers": 1, "source": 0, "target": 0, "window": 1, "seed": 0, "n_clips": 1}  # of a choice
CELL = ("place", "source", "target", "window", "later", "max_loops")
ONE_WAY = ("model", "attribute", "form", "label_space", "predict", "order", "framing", "strength", "later", "max_loops")
ONE_WAY += ("fingerprint", "seed")


@dataclass(frozen=True)
class Pair:
    """Where states go: of the blocks around `source` to as many around `target`."""

    source: int
    target: int
    window: int = 1

    def __post_init__(self) -> None:
        if self.window < 1 or not self.window % 2:
            raise InputError(f"A window is an odd number of layers, around each of the two; got {self.window}.")

    def put(self, n_layers: int, later: Later) -> dict[int, int]:
        """Behind which blocks the states are replaced, and by those behind which blocks of run 1."""
        check((self.source, self.target), n_layers, "layers in the decoder")
        half = self.window // 2
        pairs = [(self.target + k, self.source + k) for k in range(-half, half + 1)]
        put = {to: source for to, source in pairs if min(to, source) >= 0 and max(to, source) < n_layers}
        return put if later == "recomputed" else put | {layer: layer for layer in range(max(put) + 1, n_layers)}


@typed
def back_patch(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute | None = None,
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    windows: Sequence[int] = (1, 3, 5),
    places: Sequence[Regions] = ("audio", CONTROL),
    later: Later = "recomputed",
    max_loops: int = 1,
    n_choosing: int | None = None,
    seed: int = 0,
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 8,
    progress: bool = True,
) -> "BackPatch":
    """Back-patch every pair of a source and an earlier target layer, in windows of some layers, and read the answer.

    A grid over all pairs is dear (in 32 layers and 3 windows about 1,000 forwards a clip), so by default sources and
    targets are 8 layers, evenly spread; `range(n_layers)` is all. Each of the `places`, a region of the prompt or
    several as in `attention_knockout`, is patched by itself: `control` is the control of `audio`, text without what is
    stated of the clip, without the last position, and without the words that the answer is forced to begin with.
    `audio_matched` is as many positions of the audio as `control` has, drawn by `seed`, the same of all prompts of one
    length; where the audio has no more of them, all. Behind the target all is computed again, or with `later="pinned"`
    the states of the place are those of run 1 in all later blocks, so that others have one look at what was patched for
    each block of the window. With `max_loops` above 1, a patched run is the source of the next one, until the answer
    stays the same; these run with hooks, one by one.

    `samples` are clips, or items of `make_conflict`; without an `attribute` each item is asked its own question, as
    those of `read_alme` are. `n_choosing` of the clips, by default half of them, in the proportions of their labels,
    are there for the choice of a pair alone, in all conditions of a conflict; `seed` says which. `engine` and
    `token_budget` are those of `Plan`;
    `n_together` clips share a sweep. Raises what `attention_knockout` raises, and `InputError` for layers without a
    pair, and for items without a clip where its states are to be patched.
    """
    asked = questions(model, samples, attribute, form, label_space)
    pairs = grid(model.decoder_cfg.n_layers, sources, targets, windows)
    if max_loops < 1:
        raise InputError(f"max_loops is 1 or more; got {max_loops}.")
    if isinstance(places, str) or not places:
        raise InputError(f'Places are a list of regions, one or more, as ["audio"]; got {places!r}.')
    refuse_unheard(samples, places)
    spots = [Spot(place, pair, later, seed) for place, pair in product(places, pairs)]
    n_choosing = len(set(map(clip_of, samples))) // 2 if n_choosing is None else n_choosing
    held_out = names(samples, n_choosing, seed) if n_choosing else set()
    how = How(predict, engine, token_budget, n_together, progress and len(asked) == 1)
    frames = []
    for question, its in tqdm(asked, "back-patching", unit="question", disable=not progress or len(asked) == 1):
        n_labels = len(question.labels)
        frames += [frame.assign(n_labels=n_labels) for frame in frames_of(question, its, spots, max_loops, how)]
    table = pd.concat(frames, ignore_index=True)
    side = np.where(table["sample"].isin(held_out), "choosing", "test")
    weights = {"n_layers": model.decoder_cfg.n_layers, "fingerprint": weights_fingerprint(model)}
    return BackPatch.concat([table.assign(split=side, max_loops=max_loops, seed=seed, **weights)])


def frames_of(
    question: Question, samples: Sequence[Sample], spots: Sequence["Spot"], max_loops: int, how: How
) -> Iterator[pd.DataFrame]:
    """One table for each clip."""
    if max_loops > 1:
        return looped(question, samples, spots, max_loops, how)

    def variants(sample: Sample, run: Run) -> list[Variant]:
        return [spot.variant(question.model, run) for spot in spots]

    return answers(question, samples, variants, how, "back-patching")


def grid(
    n_layers: int, sources: Sequence[int] | None, targets: Sequence[int] | None, windows: Sequence[int]
) -> list[Pair]:
    """Every target with every later source. Raises `InputError` if there are none."""
    spread = sorted(set(np.linspace(0, n_layers - 1, min(N_LAYERS, n_layers)).round().astype(int).tolist()))
    sources, targets = (spread if its is None else sorted(set(its)) for its in (sources, targets))
    check((*sources, *targets), n_layers, "layers in the decoder")
    pairs = [
        Pair(source, target, window) for window, source, target in product(windows, sources, targets) if target < source
    ]
    if not pairs:
        raise InputError(f"No source layer of {list(sources)} is behind a target layer of {list(targets)}.")
    return pairs


def refuse_unheard(samples: Sequence[Sample], places: Sequence[Regions]) -> None:
    absent = [sample.name for sample in samples if not sample.is_heard]
    if absent and (audio := [place for place in places if place in ("audio", MATCHED)]):
        raise InputError(
            f"{absent[0]} has no clip, so there is no {audio[0]!r} to patch: leave out such items, as with "
            'conditions=["audio_only", "conflict"].'
        )


def names(samples: Sequence[Sample], n_choosing: int, seed: int) -> set[str]:
    """Of what is there for the choice: all that is made of some clips."""
    clips = {clip_of(sample): replace(sample, name=clip_of(sample)) for sample in samples}
    chosen = {clip.name for clip in split(list(clips.values()), n_choosing, seed)[0]}
    return {sample.name for sample in samples if clip_of(sample) in chosen}


def clip_of(sample: Sample) -> str:
    return sample.columns.get("clip") or sample.name


def where(run: Run, place: Regions, seed: int) -> tuple[int, ...]:
    """The positions of a place, `audio_matched` among the places."""
    if place != MATCHED:
        return positions(run, place)
    audio, n_control = positions(run, "audio"), len(positions(run, CONTROL))
    drawn = np.random.default_rng(seed).choice(audio, min(n_control, len(audio)), replace=False)
    return tuple(sorted(drawn.tolist()))


@dataclass(frozen=True)
class Spot:
    """One back-patched run of a clip."""

    place: Regions
    pair: Pair
    later: Later
    seed: int = 0

    def columns(self) -> dict[str, Any]:
        return {"place": place_name(self.place), **asdict(self.pair), "later": self.later, "loops": 1}

    def variant(self, model: HookedLALM, run: Run) -> Variant:
        at, put = where(run, self.place, self.seed), self.pair.put(model.decoder_cfg.n_layers, self.later)
        changes = tuple(Patch("resid_post", to, at, Source(run, layer=source)) for to, source in put.items())
        return Variant({**self.columns(), "n_positions": len(at)}, changes)


@torch.no_grad()
def states_of(model: HookedLALM, run: Run, layers: Sequence[int], at: tuple[int, ...]) -> dict[int, Tensor]:
    """Of the unchanged run."""
    by_name = {hook_name("resid_post", layer): layer for layer in layers}
    _, cache = model.run_with_cache(run.inputs.to(model.device), names_filter=list(by_name), logits_at=-1)
    return {layer: cache[name][0, list(at)] for name, layer in by_name.items()}


def hooks_of(put: Mapping[int, int], states: States, at: tuple[int, ...]) -> list[NamedHook]:
    return [Patch("resid_post", to, at, states[source]).hook() for to, source in put.items()]


# --- loops ----------------------------------------------------------------------------------------------------------


def looped(
    question: Question, samples: Sequence[Sample], spots: Sequence[Spot], max_loops: int, how: How
) -> Iterator[pd.DataFrame]:
    """One table for each clip: of each spot, the last loop."""
    readout = Told.readout(question.tokens)
    for sample in tqdm(samples, f"looping, {question.attribute.name}", unit="clip", disable=not how.progress):
        run = question.run(sample)
        with torch.no_grad():
            base = readout(question.model(run.inputs.to(question.model.device), logits_at=-1))
        rows, values = [], []
        for spot in spots:
            value, n_loops = last_loop(question, run, spot, base[0], max_loops)
            variant = spot.variant(question.model, run)
            rows.append(Variant({**variant.columns, "loops": n_loops}, variant.changes))
            values.append(value)
        values, before = torch.stack([*values, base[0]]), base.expand(len(rows) + 1, -1, -1)
        frame = frame_of(question, sample, rows, values, before, how.predict)
        yield frame.assign(predict=how.predict, engine="hooks")


@torch.no_grad()
def last_loop(
    question: Question, run: Run, spot: Spot, value: Float[Tensor, "at twice"], max_loops: int
) -> tuple[Float[Tensor, "at twice"], int]:
    """What the last loop says, and which one it is. `value` is what the unchanged run says."""
    model, readout, loop = question.model, Told.readout(question.tokens), 0
    put, at = spot.pair.put(model.decoder_cfg.n_layers, spot.later), where(run, spot.place, spot.seed)
    patched = set(spot.pair.put(model.decoder_cfg.n_layers, "recomputed"))
    first = states_of(model, run, sorted(set(put.values())), at)
    own, before = dict(first), None
    while loop < max_loops and said(value) != before:
        loop, before = loop + 1, said(value)
        states = {to: own[source] if to in patched else first[source] for to, source in put.items()}
        patches = [Patch("resid_post", to, at, state).hook() for to, state in states.items()]
        takes = [(hook_name("resid_post", put[to]), taking(own, put[to], at)) for to in patched]
        logits = model.run_with_hooks(run.inputs.to(model.device), fwd_hooks=[*patches, *takes], logits_at=-1)
        value = readout(logits)[0]
    return value, loop


def taking(states: dict[int, Tensor], layer: int, at: tuple[int, ...]) -> Any:
    """A hook that keeps what the run has there."""

    def take(state: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> None:
        states[layer] = state[0, list(at)].clone()

    return take


def said(value: Float[Tensor, "at twice"]) -> int:
    return int(Told.of(value).log_p[0].argmax())


# --- the choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackPatchChoice:
    """A pair of layers that was chosen, to be applied to other runs of the same weights; `save` writes it as JSON."""

    model: str
    n_layers: int
    fingerprint: str  # of the model's weights: `weights_fingerprint`
    attribute: str
    place: Regions
    source: int
    target: int
    window: int
    later: Later
    picked_on: On
    picked_by: By
    seed: int  # of the positions of `audio_matched`
    n_clips: int = field(compare=False)

    @property
    def pair(self) -> Pair:
        return Pair(self.source, self.target, self.window)

    def hooks(self, model: HookedLALM, run: Run) -> list[NamedHook]:
        """For `model.run_with_hooks` and `model.generate`; run 1 runs here. Positions of the prompt alone are patched,
        in the step that computes them; what is generated looks at them. Raises `InputError` for another model than the
        one that the pair was chosen on."""
        self.check(model)
        at, put = where(run, self.place, self.seed), self.pair.put(self.n_layers, self.later)
        return hooks_of(put, states_of(model, run, sorted(set(put.values())), at), at)

    def check(self, model: HookedLALM) -> None:
        """Raise `InputError` for a model of another number of layers, or with other weights."""
        n_layers, advice = model.decoder_cfg.n_layers, "Choose a pair on this model: back_patch(...).chosen()."
        if n_layers != self.n_layers:
            raise InputError(
                f"This pair was chosen of the {self.n_layers} layers of {self.model}, and {model.cfg.model_name} has "
                f"{n_layers}. {advice}"
            )
        if weights_fingerprint(model) != self.fingerprint:
            raise InputError(
                f"This pair was chosen on {self.model}, and {model.cfg.model_name} has other weights, or the same "
                f"rounded otherwise than to bfloat16. {advice}"
            )

    def generate(self, model: HookedLALM, run: Run, max_new_tokens: int = 50, **how: Any) -> Generated:
        """`model.generate` with these hooks, which takes all other arguments."""
        return model.generate(run.inputs, max_new_tokens, fwd_hooks=self.hooks(model, run), **how)

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"method": "back_patch", **asdict(self)}, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "BackPatchChoice":
        """Raises `DataError` for a file that `save` did not write, or that is not there."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): {SAVE_ONE}") from None
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}).") from None
        if not isinstance(saved, dict) or saved.pop("method", None) != "back_patch":
            raise DataError(f"{path} is not a choice of back-patching: {SAVE_ONE}")
        if set(saved) != set(cls.__dataclass_fields__):
            raise DataError(
                f"{path} has the keys {sorted(saved)}, and a choice has {sorted(cls.__dataclass_fields__)}."
            )
        try:
            check_choice(saved)
        except InputError as error:
            raise DataError(f"{path} holds no choice of back-patching ({str(error).rstrip('.')}): {SAVE_ONE}") from None
        place = saved["place"]
        return cls(**{**saved, "place": tuple(place) if isinstance(place, list) else place})


def check_choice(saved: Mapping[str, Any]) -> None:
    """Raise `InputError` for values that no choice has."""
    for name, least in LEAST.items():
        if type(saved[name]) is not int or saved[name] < least:
            raise InputError(f"{name} is a whole number, {least} or more; got {saved[name]!r}")
    for name, known in {"later": Later, "picked_on": On, "picked_by": By}.items():
        if saved[name] not in get_args(known):
            raise InputError(f"{name} is one of {', '.join(get_args(known))}; got {saved[name]!r}")
    place = saved["place"]
    texts = [saved["model"], saved["fingerprint"], saved["attribute"], *(place if isinstance(place, list) else [place])]
    if not place or not all(isinstance(text, str) for text in texts):
        raise InputError("model, fingerprint, attribute and place are texts, a place one or several")
    pair = Pair(saved["source"], saved["target"], saved["window"])
    check((pair.source, pair.target), saved["n_layers"], "layers in the decoder")
    if pair.target >= pair.source:
        raise InputError(f"the target is a layer before the source, {pair.source}; got {pair.target}")


@dataclass(frozen=True, repr=False)
class BackPatch(Changed):
    """Answers before and after back-patching, one row per clip, place and pair of layers."""

    NAME: ClassVar[str] = "a table of back-patching"
    CELL: ClassVar[tuple[str, ...]] = CELL
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        "n_labels": "int64",
        **CONFLICT_COLUMNS,  # of a clip of which a text says something else
        "predict": "str",  # a prediction is the largest logit among the labels, or in the vocabulary
        "split": "str",  # choosing, or test
        "place": "str",  # whose states were patched
        "source": "int64",  # of a window the block in its middle
        "target": "int64",
        "window": "int64",  # how many blocks, some of which there may not be
        "later": "str",  # recomputed, or pinned
        "max_loops": "int64",
        "seed": "int64",  # of the split, and of the positions of audio_matched
        "n_layers": "int64",  # of the decoder
        "fingerprint": "str",  # of the weights
        "loops": "int64",  # after how many the answer stayed as it was
        "n_positions": "int64",
        **ANSWER_COLUMNS,
    }

    @property
    def places(self) -> list[str]:
        return list(self.frame.place.unique())

    def clips(self, on: On) -> pd.DataFrame:
        """What a pair is chosen on: the clips that are there for it, or the test clips; of conflicts, where there are
        some, these alone."""
        rows = self.frame[self.frame.split == {"held_out": "choosing", "same": "test"}[on]]
        if not len(rows):
            raise DataError("All clips are test clips: give n_choosing, and the choice is made on so many others.")
        is_conflict = rows.condition == "conflict"
        rows = rows[is_conflict] if is_conflict.any() else rows
        BackPatch(rows).refuse_mixed(ONE_WAY)
        return rows

    def scores(self, on: On = "held_out", by: By = "accuracy", min_clear: float | int = 0.5) -> pd.DataFrame:
        """The pairs of each place, best first, over the clips that a pair is chosen on: accuracy, probability of the
        true label among the labels, and text dominance ratio (the lower the better) of the `n_clear` answers that
        follow text or audio, NaN where there is none. Of pairs that are equally good the one under which the true label
        is likelier comes first, by more than rounding, and then that with the narrower window, and with earlier layers.

        A ratio of hardly any answers says nothing: by "tdr", pairs that leave fewer clear answers than `min_clear`
        times those of the unchanged runs, or none, are left out. Raises `DataError` where a place has no other.
        """
        if not 0 <= min_clear <= 1:
            raise InputError(f"min_clear is a share of the clear answers before, from 0 to 1; got {min_clear}.")
        rows = self.clips(on)
        scores = pair_scores(rows, ["place", "source", "target", "window"])
        order = list(dict.fromkeys(("place", by, "label_probability", "window", "source", "target")))
        scores = scores.assign(place=pd.Categorical(scores.place, self.places))
        rising = [name not in ("accuracy", "label_probability") for name in order]
        scores = scores.sort_values(order, ascending=rising, ignore_index=True, key=level).astype({"place": "str"})
        return clear_enough(scores, rows, min_clear) if by == "tdr" else scores

    def chosen(
        self, on: On = "held_out", by: By = "accuracy", place: str | None = None, min_clear: float | int = 0.5
    ) -> BackPatchChoice:
        """The best pair of a place, by default of the first: chosen on clips that nothing else is said of, or, as
        published, on the same clips that it is measured on. `min_clear` is that of `scores`."""
        if (place := self.places[0] if place is None else place) not in self.places:
            raise DataError(f"The table has no place {place!r}, only {', '.join(self.places)}.")
        scores = self.scores(on, by, min_clear)
        best, first = scores[scores.place == place].iloc[0], self.frame.iloc[0]
        regions = tuple(place.split("+"))
        return BackPatchChoice(
            model=first.model,
            n_layers=int(first.n_layers),
            fingerprint=first.fingerprint,
            attribute=first.attribute,
            place=place if len(regions) == 1 else regions,
            source=int(best.source),
            target=int(best.target),
            window=int(best.window),
            later=first.later,
            picked_on=on,
            picked_by=by,
            seed=int(first.seed),
            n_clips=int(best.n),
        )

    def tested(self, choice: BackPatchChoice) -> pd.DataFrame:
        """The test clips under a chosen pair."""
        its = {"split": "test", "place": place_name(choice.place), **asdict(choice.pair)}
        return self.frame[np.logical_and.reduce([self.frame[name] == value for name, value in its.items()])]

    def summary(
        self,
        by: By = "accuracy",
        control: str | None = None,
        min_clear: float | int = 0.5,
        n_resamples: int = 1000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """What the best pair of each place does to the test clips, chosen on others (`held_out`) and, as published, on
        the same, which is too good by as much as the best of many pairs is by chance. One row for each condition, where
        there are some.

        Before, after, and the change with its 95 % interval over clips, each of which counts with both its runs;
        `won` and `lost` are clips that became right and wrong, `p` is that of McNemar's exact test, `h` Cohen's. Text
        dominance (`tdr`) is that of `text_dominance`, of answers among the labels, of which `n_clear_before` and
        `n_clear_after` follow text or audio: there, `won` are clips that followed the audio before and follow the text
        after. `minus_control` is a place's number after, minus that of the same clips under the best pair of `control`
        (the place of that name, where the table has it), with its 95 % interval. Intervals of shares are those of
        `change_interval`, those of label probabilities bootstraps.

        Who no longer hears is right by `chance`: 1 / labels, on average over clips, or the share of the label that most
        clips have, if that is more; accuracy after is `above_chance` where its whole 95 % Wilson interval is. A pair
        `repairs` where accuracy after is above chance, accuracy has risen or text dominance fallen (p < 0.05), and
        accuracy has not fallen (p < 0.05), neither there nor on the clips alone (`audio_only`), where the table has
        these.
        """
        on_what: list[On] = ["held_out", "same"] if (self.frame.split == "choosing").any() else ["same"]
        control = CONTROL if control is None and CONTROL in self.places else control
        found = []
        for place, on in product(self.places, on_what):
            choice = self.chosen(on, by, place, min_clear)
            others = None if control in (None, place) else self.tested(self.chosen(on, by, control, min_clear))
            for condition, rows in self.tested(choice).groupby("condition", sort=False, dropna=False):
                about = {"place": place, "picked_on": on, **asdict(choice.pair), "condition": condition, "n": len(rows)}
                its = before_and_after(rows, n_resamples, seed)
                its |= {} if others is None else minus_control(rows, others, n_resamples, seed)
                found.append(about | its)
        table = pd.DataFrame(found)
        return table.assign(repairs=repairs(table)).dropna(axis="columns", how="all")

    @typed
    def overview(self) -> pd.DataFrame:
        """The summary without controls and what follows from the rest."""
        about = ["place", "picked_on", "source", "target", "window", "condition", "n", "chance", "repairs"]
        summary = self.summary()
        numbers = {
            f"{name}_{end}": f"{name}_change_{end}" if end in ("low", "high") else f"{name}_{end}"
            for name in ("accuracy", "label_p", "tdr")
            for end in ("before", "after", "change", "low", "high", "p")
        }
        shown = [name for name in (*about[:-2], *numbers, *about[-2:]) if name in summary]
        return summary[shown].rename(columns=numbers)

    def plot(self, on: On = "held_out", by: By = "accuracy", min_clear: float | int = 0.5) -> "Figure":
        """How accuracy, label probability or text dominance change by source and target, over the clips that a pair is
        chosen on: a panel for each place and window, and a frame around the best pair of each place."""
        before = pair_scores(self.clips(on).drop_duplicates("sample"), ["attribute"], "before")[by].iloc[0]
        best = {place: asdict(self.chosen(on, by, place, min_clear).pair) for place in self.places}
        scores = self.scores(on, by, min_clear)
        return plots_module("pair_plots").pair_maps(self.frame, scores, float(before), by, best)

    def about(self) -> str:
        n_pairs = (
            self.frame.drop_duplicates(["place", "source", "target", "window"]).groupby("place", sort=False).size()
        )
        return ", ".join(f"{n} pairs of layers at {place}" for place, n in n_pairs.items())


def level(column: pd.Series) -> pd.Series:
    """To be sorted by: probabilities without what rounding changes, and other columns as they are."""
    if column.name != "label_probability":
        return column
    return (column.sort_values().diff() > ROUNDING).cumsum().reindex(column.index)


def clear_enough(scores: pd.DataFrame, rows: pd.DataFrame, min_clear: float | int) -> pd.DataFrame:
    """The pairs that leave enough answers that follow text or audio, of as many as there are before."""
    n_before = int(followed(rows.drop_duplicates("sample"), "before").isin(SIDES).sum())
    left = scores[(scores.n_clear >= min_clear * n_before) & (scores.n_clear > 0)]
    if missing := [place for place in scores.place.unique() if place not in set(left.place)]:
        raise DataError(
            f"No pair at {missing[0]} leaves {min_clear:g} of the {n_before} answers that follow text or audio, so "
            "none is chosen by tdr. Lower min_clear, choose by accuracy, or give more clips that a text contradicts."
        )
    return left.reset_index(drop=True)


def pair_scores(rows: pd.DataFrame, cell: Sequence[str], when: str = "after") -> pd.DataFrame:
    """Means over clips, one row per group."""
    follows = followed(rows, when)
    counted = {"n": 1, "right": rows[f"right_{when}"], "label_p": rows[f"label_p_{when}"]}
    counted |= {side: follows == side for side in SIDES}
    sums = rows[list(cell)].assign(**counted).groupby(list(cell), sort=False).sum()
    means = {"accuracy": sums.right / sums.n, "label_probability": sums.label_p / sums.n}
    n_clear = sums.text + sums.audio
    return pd.DataFrame({"n": sums.n, **means, "tdr": sums.text / n_clear, "n_clear": n_clear}).reset_index()


def followed(rows: pd.DataFrame, when: str) -> pd.Series:
    """Text or audio, where they disagree and one of them is the answer."""
    disagree = rows.audio_label.notna() & rows.text_label.notna() & (rows.audio_label != rows.text_label)
    found = pd.Series("other", rows.index)
    for side in SIDES:
        found[disagree & (rows[f"answer_{when}"] == rows[f"{side}_label"])] = side
    return found


def before_and_after(rows: pd.DataFrame, n_resamples: int, seed: int) -> dict[str, float | int]:
    sides = [(rows, when) for when in WHEN]
    right, text = (compared(outcome, *sides) for outcome in ("right", "text"))
    change = rows.label_p_after - rows.label_p_before
    low, high = interval(change.to_numpy(), n_resamples, seed)
    label_p = {"before": rows.label_p_before.mean(), "after": rows.label_p_after.mean(), "change": change.mean()}
    n_clear = {"tdr_n_clear_before": text.n_clear_before, "tdr_n_clear_after": text.n_clear_after}
    return {
        **columns("accuracy", right),
        **above(rows),
        **{f"label_p_{name}": its for name, its in {**label_p, "low": low, "high": high}.items()},
        **({**columns("tdr", text), **n_clear} if any(n_clear.values()) else {}),
    }


def above(rows: pd.DataFrame) -> dict[str, float | bool]:
    """How often an answer is right that does not listen, one of the labels by chance or always the same; and whether
    answers after are right more often than that."""
    most = rows.label.value_counts(normalize=True).max()
    chance = float(max((1 / rows.n_labels).mean(), most))
    return {"chance": chance, "above_chance": wilson(int(rows.right_after.sum()), len(rows))[0] > chance}


def repairs(summary: pd.DataFrame) -> pd.Series:
    """Which rows of a summary tell of a repair: what breaks a model is none."""
    rises, falls = changed(summary, "accuracy", 1), changed(summary, "accuracy", -1)
    breaks = (falls & (summary.condition == "audio_only")).groupby([summary.place, summary.picked_on]).transform("any")
    return summary.above_chance & (rises | changed(summary, "tdr", -1)) & ~falls & ~breaks


def changed(summary: pd.DataFrame, name: str, sign: int) -> pd.Series:
    """Whether a share changed to that side, by McNemar's exact test."""
    if f"{name}_p" not in summary:
        return pd.Series(False, summary.index)
    return (summary[f"{name}_p"] < ALPHA) & (sign * (summary[f"{name}_won"] - summary[f"{name}_lost"]) > 0)


def minus_control(rows: pd.DataFrame, control: pd.DataFrame, n_resamples: int, seed: int) -> dict[str, float | int]:
    """Of the same clips, after the one minus after the other."""
    control = control.set_index("sample").loc[rows["sample"]].set_index(rows.index)
    sides = [(control, "after"), (rows, "after")]
    right, text = (compared(outcome, *sides) for outcome in ("right", "text"))
    change = rows.label_p_after - control.label_p_after
    found = {
        "accuracy": (right.difference, right.low, right.high),
        "label_p": (change.mean(), *interval(change.to_numpy(), n_resamples, seed)),
        "tdr": (text.difference, text.low, text.high),
    }
    ends = ("", "_low", "_high")
    return {f"{name}_minus_control{end}": x for name, its in found.items() for end, x in zip(ends, its, strict=True)}


def compared(outcome: Outcome, *sides: tuple[pd.DataFrame, str]) -> Comparison:
    """Two runs of the same clips, each a table's rows before or after."""
    if outcome == "right":
        every = [pd.Series(True, its.index) for its, _ in sides]
        return comparison(outcome, [its[f"right_{when}"] for its, when in sides], every)
    follows = [followed(its, when) for its, when in sides]
    return comparison(outcome, [its == "text" for its in follows], [its.isin(SIDES) for its in follows])


def columns(name: str, its: Comparison) -> dict[str, float | int]:
    change = {"before": its.before, "after": its.after, "change": its.difference, "low": its.low, "high": its.high}
    test = {"won": its.mcnemar.won, "lost": its.mcnemar.lost, "p": its.mcnemar.exact, "h": its.h}
    return {f"{name}_{what}": number for what, number in {**change, **test}.items()}
