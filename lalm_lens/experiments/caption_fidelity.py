"""Caption fidelity: how true what a model writes is to what is heard, and to what is seen (arXiv 2604.02605).

A judge says so, of every caption, before and after attention is cut or anything else is changed. None is built in:
arXiv 2604.02605 asks a language model, with examples, for two numbers from 0 to 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from lalm_lens.aggregates import interval, refuse_columns
from lalm_lens.attributes import Attribute, Form
from lalm_lens.counterfactual import seen_label
from lalm_lens.datasets import Sample, refuse_repeated
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question, processor_of, refuse_foreign_hooks
from lalm_lens.experiments.attention_knockout import CELL, RUN_COLUMNS
from lalm_lens.experiments.cuts import Chain, Heads, LayerSets, cuts
from lalm_lens.experiments.knockout_generation import explicitly
from lalm_lens.generation import Generated
from lalm_lens.hooks import NamedHook
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.runs import Run
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Judge = Callable[[str, Sample], tuple[float, float]]  # of a caption, to what is heard and to what is seen, from 0 to 1
SIDES = ("audio", "video")
DESCRIPTION = Attribute("description", "Describe what you see and hear.", (), "I see and hear")


@typed
def caption_fidelity(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    judge: Judge,
    attribute: Attribute = DESCRIPTION,
    form: Form = "P2",
    chains: Sequence[Chain] = (("audio", "generated"), (("image", "video"), "generated")),
    layers: Sequence[LayerSets] = ("all",),
    heads: Heads = "all",
    hooks: Mapping[str, Sequence[NamedHook]] | None = None,
    max_new_tokens: int = 50,
    progress: bool = True,
) -> "CaptionFidelity":
    """Let the model write what it hears and sees, as it is and in changed runs, and judge all of it.

    `attribute` is what is asked; its labels are not. Its prefix is how every caption begins, and is part of what is
    judged: `judge(caption, sample)` gives two numbers from 0 to 1, and is asked once for each caption of a sample.
    `chains`, `layers` and `heads` are those of `knockout_generation`. `hooks` are other changes by their names, as
    `generate` takes them: {"no attention in 9": [("blocks.9.hook_attn_out", lambda out, hook: 0 * out)]}.

    Raises what `attention_knockout` raises, labels apart; `InputError` where nothing is changed, and `DataError` for a
    judge that gives anything else.
    """
    if not (chains or hooks):
        raise InputError('Nothing is changed: name an edge, as chains=[("audio", "generated")], or give hooks.')
    refuse_foreign_hooks(model)
    refuse_repeated(samples)
    for sample in samples:
        if sample.is_heard:
            processor_of(model).check_audible(sample.waveform, sample.name)
    question = Question(model, attribute, form, label_space=True)
    frames = []
    for sample in tqdm(samples, "captions", unit="clip", disable=not progress):
        run = question.run(sample)
        changed = [*cut_runs(model, run, chains, layers, heads, max_new_tokens), *hooked_runs(hooks or {})]
        judged: dict[str, tuple[float, float]] = {}

        def told(when: str, hooks: Sequence[NamedHook], sample: Sample = sample, run: Run = run, known=judged) -> dict:
            generated = model.generate(run.inputs, max_new_tokens, fwd_hooks=[*explicitly(model), *hooks])
            text = attribute.prefix + written(generated)
            if text not in known:
                known[text] = scores(judge, text, sample)
            its = dict(zip((f"{side}_{when}" for side in SIDES), known[text], strict=True))
            return {f"text_{when}": text, f"n_tokens_{when}": int(generated.is_token.sum()), **its}

        before = told("before", ())
        rows = [{**columns, **before, **told("after", its)} for columns, its in changed]
        frames.append(pd.DataFrame(rows).assign(**{**question.columns(sample), "seen_label": seen_label(sample)}))
    return CaptionFidelity.concat(frames)


Changed = list[tuple[dict, list[NamedHook]]]  # what a table says of a changed run, and its hooks


def cut_runs(
    model: HookedLALM,
    run: Run,
    chains: Sequence[Chain],
    layers: Sequence[LayerSets],
    heads: Heads,
    max_new_tokens: int,
) -> Changed:
    its_cuts = cuts(model, run, chains, layers, heads, n_new=max_new_tokens - 1) if chains else []
    return [(cut.columns(), [hook for knockout in cut.knockouts for hook in knockout.hooks()]) for cut in its_cuts]


def hooked_runs(hooks: Mapping[str, Sequence[NamedHook]]) -> Changed:
    return [({"edge": name, "kind": "hooks", "layers": "", "heads": ""}, [*its]) for name, its in hooks.items()]


def written(generated: Generated) -> str:
    return generated.texts[0] if generated.texts else ""


def scores(judge: Judge, caption: str, sample: Sample) -> tuple[float, float]:
    given = judge(caption, sample)
    try:
        audio, video = map(float, given)
    except (TypeError, ValueError):
        raise DataError(
            f"A judge gives two numbers, of audio and of video; of {sample.name} it gave {given!r}."
        ) from None
    if not (0 <= audio <= 1 and 0 <= video <= 1):
        raise DataError(f"A judge gives numbers from 0 to 1; got {audio} and {video} for {sample.name}.")
    return audio, video


@dataclass(frozen=True, repr=False)
class CaptionFidelity(Table):
    """Captions before and after a change, and what a judge says of them: one row per clip and changed run."""

    NAME: ClassVar[str] = "a table of caption fidelity"
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        "seen_label": "str",  # another one than `label` in a counterfactual
        **RUN_COLUMNS,
        **{f"text_{when}": "str" for when in ("before", "after")},
        **{f"n_tokens_{when}": "int64" for when in ("before", "after")},
        **{f"{side}_{when}": "float64" for side in SIDES for when in ("before", "after")},
    }

    @property
    def counterfactual(self) -> "CaptionFidelity":
        """The rows of clips whose pictures are of another label than what is heard."""
        return CaptionFidelity(self.frame[self.frame.label != self.frame.seen_label])

    @typed
    def effects(self, by: Sequence[str] = CELL, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Means over clips, a row for each change and side (`audio`, `video`): `before`, `after`, `change` with its
        95 % bootstrap interval over clips, and `relative`, the change of the means divided by `before`. Raises
        `DataError` if other settings vary, and where no clip is left."""
        if not len(self.frame):
            raise DataError("No clip is left to average over.")
        refuse_columns(self.frame, by)
        self.refuse_mixed(("model", "attribute", "form", *CELL), by)
        found = []
        for key, rows in self.frame.groupby(list(by), sort=False, dropna=False):
            for side in SIDES:
                before, after = rows[f"{side}_before"], rows[f"{side}_after"]
                low, high = interval((after - before).to_numpy(), n_resamples, seed)
                its = {"side": side, "n": len(rows), "before": before.mean(), "after": after.mean()}
                its |= {"change": its["after"] - its["before"], "low": low, "high": high}
                its |= {"relative": its["change"] / its["before"] if its["before"] else np.nan}
                found.append({**dict(zip(by, key, strict=True)), **its})
        return pd.DataFrame(found).astype({name: self.frame[name].dtype for name in by})

    @typed
    def plot(self, what: str = "fidelity of the text") -> "Figure":
        """Fidelity to what is heard and to what is seen before a change, and after it by layer; a panel per change.
        `what` is what the judge says, in words."""
        return plots_module("heard_plots").fidelity(self.effects(), self.frame, what)

    def __repr__(self) -> str:
        one, clips = self.frame.iloc[0], self.frame["sample"].nunique()
        effects = self.effects()[["edge", "layers", "side", "before", "after", "change", "low", "high"]]
        shown = effects.to_string(index=False, float_format="{:.3f}".format)
        return f"CaptionFidelity({one.model}, {clips} clips)\n{shown}"
