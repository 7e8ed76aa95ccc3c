"""`Plan`: many branches, what they cost, and the two ways to run them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from lalm_lens.engine.base import Base, base_of, compared, needed
from lalm_lens.engine.branches import Branch, check, indexed, resolved, sources
from lalm_lens.engine.cost import Cost, cost_of
from lalm_lens.engine.hooks import run_hooks
from lalm_lens.engine.padding import PaddingReadError
from lalm_lens.engine.passing import go_through
from lalm_lens.engine.recorded import Record, Recorded, States
from lalm_lens.engine.sweep import Sweep
from lalm_lens.errors import HookError, InputError
from lalm_lens.interventions import FRONT_END
from lalm_lens.offload import is_ours
from lalm_lens.readouts import Logits, LogProbs, Readout, Resid, n_blocks
from lalm_lens.runs import Run
from lalm_lens.transformer import HookedTransformer

Engine = Literal["auto", "sweep", "hooks"]
IN_CACHE = (
    3_000_000  # activations of an MLP: more of them leave a CPU's cache, and each pass over them takes 5x as long
)
ON_A_GPU = 32_768  # tokens


@dataclass(frozen=True)
class Outcome:
    """What was read from every branch, in the order in which they were given.

    `values` are [branch, at, ...]; `base` is what is read from the run each belongs to, unchanged, in the same shape. A
    branch whose changes reach nothing that is read was not computed: its values are those of its base, to the bit.
    """

    values: Tensor = field(repr=False)
    base: Tensor = field(repr=False)
    engine: str
    cost: Cost

    @property
    def n_skipped(self) -> int:
        return self.cost.n_skipped


class Plan:
    """Branches of one or several runs, ready to be run.

    `engine` is "sweep", which computes what the changes can reach and nothing else; "hooks", one run with hooks for
    each branch; or "auto", the sweep wherever it can. `token_budget` bounds how many tokens go through a block
    together, and with them the memory; it halves itself where memory runs out. The runs that are branched off, and
    those that states are taken from, run here, once each, or not at all where an earlier plan with the same `recorded`
    ran them; `cost()` tells what the branches will take.

    Raises `InputError` for what the model or a run does not have, and for what the sweep cannot do where it is asked
    for by name; `HookError` for the sweep of a model on which hooks are attached.
    """

    def __init__(
        self,
        model: HookedTransformer,
        branches: Sequence[Branch],
        readout: Readout = LogProbs(),  # noqa: B008  it is frozen
        *,
        engine: Engine = "auto",
        token_budget: int | None = None,
        recorded: Recorded | None = None,
    ) -> None:
        if not isinstance(branches, Sequence) or not branches:
            raise InputError("Nothing to run: give a list of branches, one or more.")
        if not isinstance(readout, Readout):
            raise InputError(f"What is read is said as LogProbs(tokens=...) and its like; got {readout!r}.")
        if token_budget is not None and (not isinstance(token_budget, int) or token_budget < 1):
            raise InputError(f"A token budget is a whole number from 1 on; got {token_budget}.")
        self.model, self.readout = model, readout
        self.token_budget = token_budget or usual_budget(model)
        self.branches = [
            replace(branch, changes=tuple(indexed(change, branch.run, model) for change in branch.changes))
            for branch in branches
        ]
        self.check_readout()
        self.engine = self.chosen(engine)
        records = self.record(Recorded(model) if recorded is None else recorded)
        states = {run: its for run, (_, its) in records.items()}
        self.branches = [
            replace(branch, changes=tuple(resolved(change, states) for change in branch.changes))
            for branch in self.branches
        ]
        self.base = {run: self.base_value(*records[run]) for run in dict.fromkeys(its.run for its in self.branches)}
        self.sweep = None
        if self.engine == "sweep":
            bases = {run: self.base_run(run, states[run], value) for run, value in self.base.items()}
            try:
                self.sweep = Sweep(model, self.branches, bases, readout)
            except PaddingReadError:
                if engine == "sweep":
                    raise
                self.engine = "hooks"

    def check_readout(self) -> None:
        """Raise `InputError` for positions and tokens that there are not."""
        for branch in self.branches:
            if len(set(branch.run.indices(self.readout.positions))) < len(self.readout.positions):
                raise InputError(f"What is read is at different positions; got {self.readout.positions}.")
        if isinstance(self.readout, Logits):
            check(self.readout.tokens or (), self.model.decoder_cfg.d_vocab, "tokens")

    def chosen(self, engine: Engine) -> Literal["sweep", "hooks"]:
        """Which engine runs: with "auto" the sweep, unless it lacks something."""
        if engine not in get_args(Engine):
            raise InputError(f"An engine is one of {', '.join(get_args(Engine))}; got {engine!r}.")
        if engine == "hooks":
            return "hooks"
        lacks = self.lacks()
        if lacks is None:
            return "sweep"
        if engine == "sweep":
            raise lacks
        return "hooks"

    def lacks(self) -> Exception | None:
        """What keeps the sweep from running these branches."""
        if names := attached(self.model):
            return foreign(names)
        for branch in self.branches:
            for change in branch.changes:
                if isinstance(change, tuple):
                    return InputError(
                        f'The sweep takes typed changes, and this one is a function on {change[0]}: engine="hooks".'
                    )
        return None

    def record(self, recorded: Recorded) -> dict[Run, Record]:
        """The logits of each run, and its states where they are needed."""
        if recorded.model is not self.model:
            raise InputError("What is recorded are runs of another model.")
        names = sources(self.branches)
        n_run = n_blocks(self.readout, self.model.decoder_cfg.n_layers)
        for branch in self.branches:
            wanted = names.setdefault(branch.run, set())
            if self.engine == "sweep":
                wanted |= needed(n_run) | compared(branch)
            elif isinstance(self.readout, Resid):
                wanted |= {f"blocks.{n_run - 1}.hook_resid_post"}
        return {run: recorded.of(run, its, self.readout) for run, its in names.items()}

    def base_value(self, logits: Tensor, states: States) -> Tensor:
        """What is read from an unchanged run."""
        if not isinstance(self.readout, Resid):
            return self.readout(logits)[0]
        last = n_blocks(self.readout, self.model.decoder_cfg.n_layers) - 1
        return self.readout(states[f"blocks.{last}.hook_resid_post"][None, list(self.readout.positions)])[0]

    def base_run(self, run: Run, states: States, value: Tensor) -> Base:
        n_run = n_blocks(self.readout, self.model.decoder_cfg.n_layers)
        return base_of(run, states, value, n_run, self.model.positions_of(run.inputs))

    def cost(self) -> Cost:
        """What the branches take, beside the runs that have run already."""
        return cost_of(self.model, self.branches, self.readout, self.sweep)

    def run(self, progress: bool = False) -> Outcome:
        """Run every branch. What was computed before an error is lost; memory that runs out is no error, until not even
        one branch has room."""
        if self.sweep is not None and (names := attached(self.model)):
            raise foreign(names)  # since the plan was made
        cost = self.cost()
        shown = {"desc": str(self.engine), "unit": "branch", "leave": False, "disable": not progress}
        with tqdm(total=len(self.branches), **shown) as bar:
            if self.sweep is None:
                values = run_hooks(self.model, self.branches, self.readout, bar.update)
            else:
                found: dict[int, Tensor] = {}
                for done in self.swept(self.sweep):
                    found |= done
                    bar.update(len(done))
                values = [found[number] for number in range(len(self.branches))]
        base = torch.stack([self.base[branch.run] for branch in self.branches])
        return Outcome(torch.stack(values), base, self.engine, cost)

    def swept(self, sweep: Sweep) -> Iterator[dict[int, Tensor]]:
        """What is read, batch by batch of branches, each within the budget of tokens."""
        waiting = sweep.in_order()
        while waiting:
            batch = sweep.within(waiting, self.token_budget)
            try:
                done = go_through(sweep, batch)
            except RuntimeError as error:
                if not ran_out(error) or len(batch) == 1 or self.token_budget == 1:
                    raise
                self.token_budget = max(1, min(self.token_budget, sweep.tokens(batch)) // 2)
                continue
            waiting = waiting[len(batch) :]
            yield done

    def __repr__(self) -> str:
        return f"Plan({self.cost()}, engine {self.engine!r})"


def usual_budget(model: HookedTransformer) -> int:
    """Tokens that go through a block together where nothing else is asked for."""
    return ON_A_GPU if model.device.type == "cuda" else max(256, IN_CACHE // model.decoder_cfg.d_mlp)


def attached(model: HookedTransformer) -> list[str]:
    """Hook points that somebody listens to, and modules of the decoder with hooks of torch's own."""
    hooked = [
        name
        for name, module in model.named_modules()
        if not name.startswith(FRONT_END)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not is_ours(hook)
    ]
    return [*model.list_hooks(), *hooked]


def foreign(names: Iterable[str]) -> HookError:
    return HookError(
        f"A hook on {min(names)} would be part of every run, and the sweep computes parts of runs: "
        "`model.reset_hooks(including_permanent=True)` removes it, or its handle's `remove()` if it is torch's own; "
        'engine="hooks" runs it.'
    )


def ran_out(error: RuntimeError) -> bool:
    """Whether memory ran out. On the CPU, torch has no class for it."""
    told = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in told)


def run_branches(
    model: HookedTransformer,
    branches: Sequence[Branch],
    readout: Readout = LogProbs(),  # noqa: B008  it is frozen
    *,
    engine: Engine = "auto",
    token_budget: int | None = None,
    progress: bool = False,
) -> Outcome:
    """What is read from each branch: `Plan(...).run()`."""
    return Plan(model, branches, readout, engine=engine, token_budget=token_budget).run(progress)
