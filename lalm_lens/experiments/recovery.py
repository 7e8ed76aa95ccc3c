"""How much of an example's answer each patch brings back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lalm_lens.engine.branches import Branch
from lalm_lens.engine.cost import Cost
from lalm_lens.engine.plan import Engine, Plan
from lalm_lens.engine.recorded import Recorded
from lalm_lens.experiments.cells import Cell
from lalm_lens.interventions import Patch, Recompute
from lalm_lens.metrics import METRICS, Answer, LogP, Metric, log_probabilities
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import Score
from lalm_lens.runs import Run, aligned
from lalm_lens.shapes import typed

Direction = Literal["denoise", "noise"]  # clean states into the corrupted run; corrupted states into the clean run


@dataclass(frozen=True)
class Case:
    """One example: a run that hears the clip, one that hears something else in its place, and what is patched."""

    clean: Run
    corrupted: Run
    answer: Answer
    cells: Sequence[Cell]

    def source_and_base(self, direction: Direction) -> tuple[Run, Run]:
        return (self.clean, self.corrupted) if direction == "denoise" else (self.corrupted, self.clean)

    def patch(self, cell: Cell, direction: Direction) -> Patch:
        """The change that a cell asks for. Its positions are those of the clean run."""
        source, base = self.source_and_base(direction)
        if cell.stack == "audio_encoder":
            return cell.patch(source)
        at, taken = (aligned(cell.positions, self.clean, run) for run in (base, source))
        return replace(cell, positions=at).patch(source, taken)


@dataclass(frozen=True)
class Recovery:
    """The numbers of one example: p is the probability of the true label's first token, m the metric.

    `noise` is the change, in recovery rate, that the base run shows for being computed as patched runs are, from the
    first word after the audio on; what a patch cannot reach is not computed, and its rate is exactly 0. `p_patched`,
    `m_patched` and `rate` belong to `cells`, one to one. `logits` are those of the clean and the corrupted run at
    the prompt's last position.
    """

    p_clean: float
    p_corrupted: float
    m_clean: float
    m_corrupted: float
    noise: float
    cells: Sequence[Cell]
    p_patched: Float[Tensor, " cell"]
    m_patched: Float[Tensor, " cell"]
    rate: Float[Tensor, " cell"]
    logits: dict[str, Float[Tensor, " d_vocab"]]
    engine: str
    cost: Cost


@dataclass(frozen=True)
class Patched:
    """The patched runs of one example as log-probabilities of some tokens, from which every metric of every answer
    among them can be read. `patched` belongs to the cells, one to one, and behind them is a run in which nothing is
    patched; `base` is the run that they all branch off."""

    case: Case
    tokens: Sequence[int]
    direction: Direction
    logits: dict[str, Float[Tensor, "at d_vocab"]]
    base: Float[Tensor, "at token"]
    patched: Float[Tensor, "branch at token"]
    engine: str
    cost: Cost

    def recovery(self, metric: Metric, answer: Answer | None = None) -> Recovery:
        """By one metric; of another answer than the example's, if it has as many tokens that are read."""
        whole = answer or self.case.answer
        answer = among(self.tokens, whole.against(self.logits["corrupted"][0].cpu()))

        def read(log_p: LogP) -> Float[Tensor, "*batch score"]:
            return torch.stack([METRICS["probability"](log_p, answer), METRICS[metric](log_p, answer)], dim=-1)

        p_clean, m_clean = read(log_probabilities(self.logits["clean"], self.tokens)).tolist()
        p_corrupted, m_corrupted = read(log_probabilities(self.logits["corrupted"], self.tokens)).tolist()
        patched, base = read(self.patched), read(self.base)
        gap = (m_clean - m_corrupted if self.direction == "denoise" else m_corrupted - m_clean) or float("nan")
        *rates, nothing = ((patched - base)[:, 1] / gap).unbind()
        p_patched, m_patched = patched[:-1].unbind(-1)
        return Recovery(
            p_clean,
            p_corrupted,
            m_clean,
            m_corrupted,
            noise=abs(float(nothing)),
            cells=self.case.cells,
            p_patched=p_patched,
            m_patched=m_patched,
            rate=torch.stack(rates) if rates else nothing.new_empty(0),
            logits={name: its[0].cpu() for name, its in self.logits.items()},
            engine=self.engine,
            cost=self.cost,
        )


@typed
def recover(
    model: HookedLALM,
    cases: Sequence[Case],
    *,
    metric: Metric = "probability",
    direction: Direction = "denoise",
    engine: Engine = "auto",
    token_budget: int | None = None,
    recorded: Recorded | None = None,
    progress: bool = False,
) -> list[Recovery]:
    """Every patched run of some examples. The runs that they share run once; those that are `recorded`, not at all.

    The answers must have the same number of tokens that are read, which stand at the ends of the runs.
    """
    how = {"direction": direction, "engine": engine, "token_budget": token_budget}
    return [its.recovery(metric) for its in patch_all(model, cases, **how, recorded=recorded, progress=progress)]


def patch_all(
    model: HookedLALM,
    cases: Sequence[Case],
    *,
    tokens: Sequence[int] = (),
    direction: Direction = "denoise",
    engine: Engine = "auto",
    token_budget: int | None = None,
    recorded: Recorded | None = None,
    progress: bool = False,
) -> list[Patched]:
    """The same before a metric is read; `tokens` are read beside those of the answers."""
    recorded, read = Recorded(model) if recorded is None else recorded, sorted({*tokens_of(cases), *tokens})
    readout, branches = readout_of(cases, read), branches_of(cases, direction)
    plan = Plan(model, branches, readout, engine=engine, token_budget=token_budget, recorded=recorded)
    with tqdm(total=0, bar_format="{desc}", leave=False, disable=not progress) as line:
        line.set_description_str(str(plan.cost()))
        outcome = plan.run(progress)
    found, start = [], 0
    for case in cases:
        end = start + len(case.cells) + 1
        logits = {
            name: recorded.of(run, set(), readout)[0][0]
            for name, run in (("clean", case.clean), ("corrupted", case.corrupted))
        }
        values = outcome.base[start], outcome.values[start:end]
        found.append(Patched(case, read, direction, logits, *values, outcome.engine, outcome.cost))
        start = end
    return found


def tokens_of(cases: Sequence[Case]) -> list[int]:
    """The tokens that are read for any of the cases."""
    return sorted({token for case in cases for token in (*case.answer.tokens, *case.answer.others)})


def readout_of(cases: Sequence[Case], tokens: Sequence[int]) -> Score:
    n_read = len(cases[0].answer.tokens)
    assert all(len(case.answer.tokens) == n_read for case in cases), "a plan reads the same positions of all"
    return Score(lambda logits: log_probabilities(logits, tokens), tuple(range(-n_read, 0)))


def branches_of(cases: Sequence[Case], direction: Direction) -> list[Branch]:
    """The patched runs of each case, and behind them one in which nothing is changed."""
    branches = []
    for case in cases:
        _, base = case.source_and_base(direction)
        branches += [Branch(base, (case.patch(cell, direction),)) for cell in case.cells]
        branches.append(Branch(base, (Recompute("resid_pre", 0, (base.indices("audio")[-1] + 1,)),)))
    return branches


def among(tokens: Sequence[int], answer: Answer) -> Answer:
    """The answer by places among the tokens that are read."""
    place = {token: n for n, token in enumerate(tokens)}
    return replace(
        answer,
        tokens=tuple(place[token] for token in answer.tokens),
        others=tuple(place[token] for token in answer.others),
    )
