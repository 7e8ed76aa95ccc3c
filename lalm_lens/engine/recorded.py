"""Runs that have run: their logits at what is read, and the states of them that some branch needs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lalm_lens.errors import InputError
from lalm_lens.interventions import FRONT_END
from lalm_lens.readouts import Readout
from lalm_lens.runs import Run
from lalm_lens.transformer import HookedTransformer

States = Mapping[str, Tensor]  # of one run, without the axis of the batch; what is heard and seen keeps its rows
Record = tuple[Tensor, States]  # logits at what is read, and states by hook point


@dataclass(frozen=True, eq=False)
class Recorded:
    """The runs of one model, for plans that share some of them: each runs once, until it is forgotten.

    A run of which more states are needed than are recorded runs once more.
    """

    model: HookedTransformer
    records: dict[tuple[Run, tuple[int, ...]], Record] = field(default_factory=dict, repr=False)

    def of(self, run: Run, names: set[str], readout: Readout) -> Record:
        """Raises `InputError` for a run whose logits are not finite."""
        key = run, tuple(readout.positions)
        known = set(self.records[key][1]) if key in self.records else set()
        if key not in self.records or not names <= known:
            self.records[key] = record(self.model, run, names | known, readout)
        return self.records[key]

    def keep(self, runs: Iterable[Run]) -> None:
        """Forget all others."""
        kept = set(runs)
        for key in [key for key in self.records if key[0] not in kept]:
            del self.records[key]


@torch.no_grad()
def record(model: HookedTransformer, run: Run, names: Iterable[str], readout: Readout) -> Record:
    at = torch.tensor(readout.positions, device=model.device)
    inputs = run.inputs.to(model.device)
    if not (names := sorted(names)):
        logits, cache = model(inputs, logits_at=at), {}
    else:
        logits, cache = model.run_with_cache(inputs, names_filter=names, logits_at=at)
    if not logits.isfinite().all():
        narrow = logits.dtype == torch.float16
        advice = "Load the model as bfloat16 or float32." if narrow else "The weights of this checkpoint are broken."
        raise InputError(f"The logits are not finite in {logits.dtype}. {advice}")
    return logits, {name: cache[name] if name.startswith(FRONT_END) else cache[name][0] for name in names}
