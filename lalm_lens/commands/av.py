"""`lalm-lens av`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from lalm_lens.attributes import Attribute
from lalm_lens.commands.base import app, ready
from lalm_lens.commands.clips import asked_about
from lalm_lens.commands.opening import function_named, opened
from lalm_lens.commands.options import (
    Device,
    DeviceMap,
    Dtype,
    Labels,
    Model,
    NControls,
    Own,
    Part,
    Prefix,
    Question,
    TokenBudget,
    choice,
    one_of,
)
from lalm_lens.commands.steps import Shown, Steps, run_steps, steps_named
from lalm_lens.errors import DataError, InputError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lalm_lens.counterfactual import Distance, Swapped
    from lalm_lens.model import HookedLALM
    from lalm_lens.tables import Table

EXAMPLES = """[bold]Examples[/bold]

lalm-lens av Qwen/Qwen2.5-Omni-3B ./videos --attribute animal --out av --device cuda --dtype bfloat16

lalm-lens av ./checkpoint ./videos --attribute animal --only shares,knockout --window 9 --out av

lalm-lens av ./checkpoint ./videos --attribute animal --judge my_judge:judge --out av
"""

HALVES = {"counterfactual": "another is seen than is heard", "factual": "the same is heard and seen"}
EYES = ("image", "video")
MOST = 3  # tokens that a table of the lens names of a layer
T = TypeVar("T", bound="Table")


@dataclass(frozen=True)
class Asked:
    """What all steps are about."""

    model: "HookedLALM"
    base: "HookedLALM"
    samples: "list[Swapped]"
    attribute: Attribute
    form: Any
    window: int
    max_new_tokens: int
    exclude_sink: int
    top_k: int
    rule: Any
    norm: bool
    n_controls: int
    judge: Any  # as that of `caption_fidelity`
    seed: int
    token_budget: int | None
    out: Path

    @property
    def how(self) -> dict:
        return {"attribute": self.attribute, "form": self.form}

    @property
    def conflicts(self) -> "list[Swapped]":
        return [sample for sample in self.samples if sample.seen_label != sample.label]

    @property
    def seen(self) -> "list[Swapped]":
        """The same with what is seen as label."""
        return [replace(sample, label=sample.seen_label) for sample in self.samples]

    def halves(self, found: "T") -> "dict[str, T]":
        """The rows of conflicts in a table, and those of all else, where there are any."""
        is_conflict = found.frame["sample"].isin([sample.name for sample in self.conflicts])
        rows = {"counterfactual": found.frame[is_conflict], "factual": found.frame[~is_conflict]}
        return {half: type(found)(its) for half, its in rows.items() if len(its)}

    @property
    def eyes(self) -> list[str]:
        """Where something is seen."""
        return [its for its, name in zip(EYES, ("images", "videos"), strict=True) if getattr(self.samples[0], name)]


def shares(asked: Asked) -> Shown:
    """Where the model looks while it writes."""
    from lalm_lens.experiments.attention_share import attention_share

    how: dict = {"exclude_sink": asked.exclude_sink, "regions": "merged", **asked.how}
    found = attention_share(asked.model, asked.samples, max_new_tokens=asked.max_new_tokens, **how)
    found.save(asked.out / "shares.parquet")
    halves = asked.halves(found)
    figures = drawn("shares", {half: its.plot() for half, its in halves.items()})
    figures |= drawn("shares_per_token", {half: its.plot("per_token") for half, its in halves.items()})
    return {"shares": by_half({half: its.means() for half, its in halves.items()})}, figures


def by_half(tables: "Mapping[str, pd.DataFrame]") -> "pd.DataFrame":
    """One table of both."""
    import pandas as pd

    return pd.concat([its.assign(half=half) for half, its in tables.items()], ignore_index=True)


def drawn(name: str, figures: "Mapping[str, Figure]") -> "dict[str, Figure]":
    """The figures of both by their names; what is above each says which it is of."""
    for half, figure in figures.items():
        figure.suptitle(f"{figure.get_suptitle()}\n{half} pairs: {HALVES[half]}", fontsize=10)
    return {f"{name}_{half}": figure for half, figure in figures.items()}


def latent(asked: Asked) -> Shown:
    """What states name of what is heard and seen, whether or not it is said."""
    from lalm_lens.experiments.latent_understanding import latent_understanding

    how: dict = {"rule": asked.rule, "top_k": asked.top_k, "norm": asked.norm, **asked.how}
    how["token_budget"] = asked.token_budget
    heard = latent_understanding(asked.model, asked.samples, places=["audio"], **how)
    seen = latent_understanding(asked.model, asked.seen, places=asked.eyes, **how)
    tables, figures = {}, {}
    for name, found in (("heard", heard), ("seen", seen)):
        found.save(asked.out / f"latent_{name}.parquet")
        halves = {half: its for half, its in asked.halves(found).items() if its.frame.label.nunique() > 1}
        if not halves:
            raise DataError("Neither the counterfactual nor the factual pairs are of two labels: give more pairs.")
        scores = {half: its.scores(seed=asked.seed) for half, its in halves.items()}
        layers = {half: its.by_layer(seed=asked.seed) for half, its in halves.items()}
        tables |= {f"latent_{name}": by_half(scores), f"latent_{name}_by_layer": by_half(layers)}
        figures |= drawn(f"latent_{name}", {half: its.plot() for half, its in halves.items()})
    return tables, figures


def lens(asked: Asked) -> Shown:
    """Which tokens states of what is heard and seen are nearest to, by layer; maps of the first pair."""
    from lalm_lens.experiments.logit_lens import logit_lens

    how: dict = {"labels": (), "top_k": 1, "norm": asked.norm, "token_budget": asked.token_budget, **asked.how}
    tables, figures = {}, {}
    for place in ("audio", *asked.eyes):
        found = logit_lens(asked.model, asked.samples, positions=place, **how)
        found.save(asked.out / f"lens_{place}.parquet")
        words = found.top().groupby(["layer", "word"]).size().rename("states").reset_index()
        ranked = words.sort_values(["layer", "states"], ascending=[True, False], kind="stable")
        tables[f"lens_{place}"] = ranked.groupby("layer").head(MOST)
        figures[f"lens_{place}"] = found.plot()
    return tables, figures


def probes_heard(asked: Asked) -> Shown:
    """What linear probes read of what is heard, by layer, where nothing that is seen tells it."""
    its = independent(asked.samples, asked.seed)
    return probed(asked, "heard", its, [sample.heard_clip for sample in its])


def probes_seen(asked: Asked) -> Shown:
    """What linear probes read of what is seen, by layer, where nothing that is heard tells it."""
    its = independent(asked.samples, asked.seed)
    return probed(asked, "seen", [replace(sample, label=sample.seen_label) for sample in its], [*map(pictures, its)])


def probed(asked: Asked, name: str, samples: "list[Swapped]", groups: list[str]) -> Shown:
    from lalm_lens.experiments.probe import probe

    once = Counter(dict(zip(groups, [sample.label for sample in samples], strict=True)).values())
    label, fewest = once.most_common()[-1]
    if fewest < 2:
        raise DataError(f"Probes need two of each label, and {label} is {name} once among conflicts: give more pairs.")
    stacks: dict = {"stacks": ["audio_encoder", "adapter", "vision_encoder", "vision_adapter", "decoder"]}
    folds: dict = {"groups": groups, "n_folds": min(5, fewest), "seed": asked.seed, "n_controls": asked.n_controls}
    found = probe(asked.model, samples, places=["audio", *asked.eyes, "last"], **stacks, **folds, **asked.how)
    found.save(asked.out / f"probe_{name}.parquet")
    return {f"probe_{name}": found.layers(seed=asked.seed)}, {f"probe_{name}": found.plot()}


def independent(samples: "Sequence[Swapped]", seed: int) -> "list[Swapped]":
    """The conflicts, and as many drawn of the others as chance would make of them: without those, what is seen says
    what is not heard, and with all of them, what is. Raises `DataError` for too few of either."""
    import numpy as np

    conflicts = [sample for sample in samples if sample.seen_label != sample.label]
    if not conflicts:
        raise DataError("Nothing that is seen is of another label than what is heard: give such pairs.")
    heard, seen = Counter(its.label for its in conflicts), Counter(its.seen_label for its in conflicts)
    by_chance = sum(heard[label] * seen[label] for label in heard) / len(conflicts) ** 2
    others = [its for its in samples if its.seen_label == its.label and heard[its.label] and seen[its.label]]
    n_others = round(len(conflicts) * by_chance / (1 - by_chance)) if by_chance < 1 else 0
    if len(others) < n_others:
        raise DataError(
            f"Among {len(conflicts)} conflicts, {n_others} pairs that agree make what is seen independent of what is "
            f"heard, and there are {len(others)}: give more of them."
        )
    drawn = np.random.default_rng(seed).choice(len(others), n_others, replace=False)
    return conflicts + [others[n] for n in sorted(drawn)]


def pictures(sample: "Swapped") -> str:
    """What is seen, by its pixels."""
    from lalm_lens.datasets.sample import digest

    return digest(*(its.patches.numpy().tobytes() for its in (sample.images, sample.videos) if its is not None))


def knockout(asked: Asked) -> Shown:
    """What is said where the model cannot look at the sound, the picture or the words."""
    from lalm_lens.experiments.caption_fidelity import caption_fidelity

    chains = [(place, "generated") for place in ("audio", *asked.eyes, "query")]
    how: dict = {"chains": chains, "layers": [asked.window, "up_to", "from", "all"], **asked.how}
    found = caption_fidelity(asked.model, asked.samples, judge=asked.judge, max_new_tokens=asked.max_new_tokens, **how)
    found.save(asked.out / "knockout.parquet")
    what = "texts that name it" if asked.judge is names else "fidelity of the text"
    tables, halves = {}, asked.halves(found)
    for name, its in halves.items():
        effects = its.effects(seed=asked.seed)
        tables |= {f"said_{name}": said(effects), f"knockout_{name}": effects}
    return tables, drawn("knockout", {half: its.plot(what) for half, its in halves.items()})


def said(effects: Any) -> Any:
    """What is said before anything is cut, and in all layers without one of the places."""
    import pandas as pd

    whole = effects[effects.kind == "all"]
    before = whole.drop_duplicates("side").assign(edge="nothing", after=whole.before, change=0.0, low=0.0, high=0.0)
    table = pd.concat([before, whole])[["edge", "side", "n", "after", "change", "low", "high"]]
    return table.rename(columns={"edge": "cut in all layers", "after": "rate"}).reset_index(drop=True)


def pairs(asked: Asked) -> Shown:
    """What a text loses where any of the modalities cannot look at any other; no number where one would see nothing."""
    from itertools import product

    from lalm_lens.experiments.asked import Question
    from lalm_lens.experiments.cuts import cuts, leaves_blind
    from lalm_lens.experiments.knockout_generation import knockout_generation
    from lalm_lens.results import plots_module

    places = ["audio", *asked.eyes, "query", "generated"]
    asking = Question(asked.model, asked.attribute, asked.form, label_space=True)
    runs, n_new = [asking.run(sample) for sample in asked.samples], asked.max_new_tokens - 1
    chains = [
        pair
        for pair in product(places, places)
        if not any(leaves_blind(asked.model, cuts(asked.model, run, [pair], ["all"], "all", n_new)[0]) for run in runs)
    ]
    found = knockout_generation(
        asked.model, asked.samples, chains=chains, max_new_tokens=asked.max_new_tokens, **asked.how
    )
    found.save(asked.out / "pairs.parquet")
    halves, pair_map = asked.halves(found), plots_module("heard_plots").pair_map
    effects = {half: its.effects("log_probability", seed=asked.seed) for half, its in halves.items()}
    figures = {half: pair_map(effects[half], places, its.frame) for half, its in halves.items()}
    return {"pairs": by_half(effects)}, drawn("pairs", figures)


def shift(asked: Asked) -> Shown:
    """Which tokens of the answers a base that does not hear would have written too."""
    from lalm_lens.experiments.token_shift import token_shift

    found = token_shift(asked.model, asked.base, asked.samples, max_new_tokens=asked.max_new_tokens, **asked.how)
    found.save(asked.out / "token_shift.parquet")
    halves, named = asked.halves(found), asked.halves(found.named)
    tables = {"token_shift": by_half({half: its.shares(seed=asked.seed) for half, its in halves.items()})}
    if named:
        tables["token_shift_named"] = by_half({half: its.shares(seed=asked.seed) for half, its in named.items()})
    return tables, drawn("token_shift", {half: its.plot() for half, its in halves.items()})


STEPS: Steps = {
    "shares": shares,
    "latent": latent,
    "lens": lens,
    "probes_heard": probes_heard,
    "probes_seen": probes_seen,
    "knockout": knockout,
    "pairs": pairs,
    "shift": shift,
}


def names(caption: str, sample: "Swapped") -> tuple[float, float]:
    """Whether a text names what is heard, and what is seen, as a whole word of any case."""
    from lalm_lens.experiments.knockout_generation import first_named

    heard, seen = (first_named(caption, [label]) is not None for label in (sample.label, sample.seen_label))
    return float(heard), float(seen)


@app.command("av", epilog=EXAMPLES)
def av_command(
    model: Model,
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder with metadata.jsonl: on each line file_name, label and image, or frames and fps of the "
            "video whose sound it is; and seen_label, where what is seen is another."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and av.md.")],
    attribute: Annotated[str | None, typer.Option(help="What is asked.")] = None,
    question: Question = None,
    labels: Labels = None,
    prefix: Prefix = None,
    form: Annotated[str, choice("form", "Prompt")] = "P3",
    only: Annotated[str | None, typer.Option(help=f"Some of {', '.join(STEPS)}, with commas between.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Layers in which attention is cut together, odd.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are written.")] = 10,
    exclude_sink: Annotated[int, typer.Option(min=0, help="First positions that attention may rest on.")] = 1,
    top_k: Annotated[int, typer.Option(min=1, help="Largest tokens of a state that may name a label.")] = 1,
    rule: Annotated[
        Literal["first", "exact"], typer.Option(help="What names a label: its first token, or the whole word as one.")
    ] = "first",
    norm: Annotated[bool, typer.Option(help="Read states behind the final norm; the paper's code does not.")] = True,
    judge: Annotated[
        str | None,
        typer.Option(help="Your own judge of texts, as module:NAME; else whether they name what is heard or seen."),
    ] = None,
    distance: Annotated[
        str | None,
        typer.Option(help="How far what is seen is from another clip, as module:NAME; else counterfactuals are drawn."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A base with the same tokens, which hears nothing; else the model itself.")
    ] = None,
    n_controls: NControls = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the counterfactuals, folds and bootstraps.")] = 0,
    device: Device = "cpu",
    device_map: DeviceMap = None,
    dtype: Dtype = "float32",
    token_budget: TokenBudget = None,
    part: Part = None,
    conversion: Own = None,
) -> None:
    """Find out whether a model that hears and sees hears: all of arXiv 2604.02605, its figures and tables. Where no row
    says that something else is seen, every clip is shown with another one's picture as well."""
    steps = steps_named(only, STEPS)
    if window % 2 == 0:
        raise InputError(f"--window is odd, with as many layers below its middle as above it; got {window}.")
    its, one_form = asked_about(attribute, question, labels, prefix), one_of("form", form)
    if not data.is_dir():
        raise DataError(f"{data} is no folder. Give one with metadata.jsonl.")
    judging = names if judge is None else function_named("judge", judge)
    apart = None if distance is None else function_named("distance", distance)
    ready(out)
    how = {"conversion": conversion, "device": device, "device_map": device_map, "dtype": dtype}
    lens = opened(model, part=part, **how)
    other = lens if base is None else opened(base, part=None, **how)
    samples = read_pairs(lens, data, seed, apart)
    from lalm_lens.experiments.concepts import ExactWord, FirstToken

    about = Asked(
        model=lens,
        base=other,
        samples=samples,
        attribute=its,
        form=one_form,
        window=window,
        max_new_tokens=max_new_tokens,
        exclude_sink=exclude_sink,
        top_k=top_k,
        rule=ExactWord() if rule == "exact" else FirstToken(),
        norm=norm,
        n_controls=n_controls,
        judge=judging,
        seed=seed,
        token_budget=token_budget,
        out=out / its.name,
    )
    run_steps(steps, [about], f"What {lens.cfg.model_name} hears and sees", out / "av.md")


def read_pairs(lens: "HookedLALM", data: Path, seed: int = 0, distance: "Distance | None" = None) -> "list[Swapped]":
    """What is listed, and where nothing of it is a counterfactual, as many of those."""
    from lalm_lens.audio_visual import read_audio_visual
    from lalm_lens.counterfactual import swap_audio
    from lalm_lens.experiments.asked import processor_of

    samples = read_audio_visual(data, processor_of(lens))
    if len({sample.images is None for sample in samples}) > 1:
        raise DataError(f"Some rows of {data} have an image and others frames: give a folder for each.")
    if any(sample.seen_label != sample.label for sample in samples):
        if distance is not None:
            raise InputError(f"{data} lists counterfactuals, so none are made: leave out --distance, or their rows.")
        return samples
    return [*samples, *swap_audio(samples, distance, seed)]
