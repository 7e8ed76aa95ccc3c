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
from lalm_lens.engine.plan import Engine, Outcome, Plan
from lalm_lens.experiments.cells import Cell
from lalm_lens.interventions import Recompute
from lalm_lens.metrics import METRICS, Answer, LogP, Metric, log_probabilities
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import Score
from lalm_lens.runs import Run
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


@typed
def recover(
    model: HookedLALM,
    cases: Sequence[Case],
    *,
    metric: Metric = "probability",
    direction: Direction = "denoise",
    engine: Engine = "auto",
    token_budget: int | None = None,
    progress: bool = False,
) -> list[Recovery]:
    """Every patched run of some examples. The runs that they share are run once.

    The answers must have the same number of tokens that are read, which stand at the ends of the runs.
    """
    tokens, readout = readout_of(cases)
    plan = Plan(model, branches_of(cases, direction), readout, engine=engine, token_budget=token_budget)
    return recoveries(plan, cases, tokens, metric, direction, progress)


def readout_of(cases: Sequence[Case]) -> tuple[list[int], Score]:
    """The tokens that are read for any of the cases, and the log-probabilities of them."""
    tokens = sorted({token for case in cases for token in (*case.answer.tokens, *case.answer.others)})
    n_read = len(cases[0].answer.tokens)
    assert all(len(case.answer.tokens) == n_read for case in cases), "a plan reads the same positions of all"
    return tokens, Score(lambda logits: log_probabilities(logits)[..., tokens], tuple(range(-n_read, 0)))


def recoveries(
    plan: Plan, cases: Sequence[Case], tokens: list[int], metric: Metric, direction: Direction, progress: bool
) -> list[Recovery]:
    """Run the branches of the cases, their cost shown before, and measure each case by its own."""
    with tqdm(total=0, bar_format="{desc}", leave=False, disable=not progress) as line:
        line.set_description_str(str(plan.cost()))
        outcome = plan.run(progress)
    found, start = [], 0
    for case in cases:
        end = start + len(case.cells) + 1
        found.append(recovery(plan, case, outcome, slice(start, end), tokens, metric, direction))
        start = end
    return found


def branches_of(cases: Sequence[Case], direction: Direction) -> list[Branch]:
    """The patched runs of each case, and behind them one in which nothing is changed."""
    branches = []
    for case in cases:
        source, base = case.source_and_base(direction)
        branches += [Branch(base, (cell.patch(source),)) for cell in case.cells]
        branches.append(Branch(base, (Recompute("resid_pre", 0, (base.indices("audio")[-1] + 1,)),)))
    return branches


def recovery(
    plan: Plan, case: Case, outcome: Outcome, mine: slice, tokens: list[int], metric: Metric, direction: Direction
) -> Recovery:
    logits = {"clean": plan.logits[case.clean][0], "corrupted": plan.logits[case.corrupted][0]}
    answer = among(tokens, case.answer.against(logits["corrupted"][0].cpu()))

    def read(log_p: LogP) -> Float[Tensor, "*batch score"]:
        return torch.stack([METRICS["probability"](log_p, answer), METRICS[metric](log_p, answer)], dim=-1)

    p_clean, m_clean = read(log_probabilities(logits["clean"])[..., tokens]).tolist()
    p_corrupted, m_corrupted = read(log_probabilities(logits["corrupted"])[..., tokens]).tolist()
    patched, base = read(outcome.values[mine]), read(outcome.base[mine])
    gap = (m_clean - m_corrupted if direction == "denoise" else m_corrupted - m_clean) or float("nan")
    *rates, nothing = ((patched - base)[:, 1] / gap).unbind()
    p_patched, m_patched = patched[:-1].unbind(-1)
    return Recovery(
        p_clean,
        p_corrupted,
        m_clean,
        m_corrupted,
        noise=abs(float(nothing)),
        cells=case.cells,
        p_patched=p_patched,
        m_patched=m_patched,
        rate=torch.stack(rates) if rates else nothing.new_empty(0),
        logits={name: its[0].cpu() for name, its in logits.items()},
        engine=outcome.engine,
        cost=outcome.cost,
    )


def among(tokens: list[int], answer: Answer) -> Answer:
    """The answer by places among the tokens that are read."""
    place = {token: n for n, token in enumerate(tokens)}
    return replace(
        answer,
        tokens=tuple(place[token] for token in answer.tokens),
        others=tuple(place[token] for token in answer.others),
    )
