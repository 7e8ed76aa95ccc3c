"""What the branches of one run share."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from lalm_lens.engine.branches import Branch, source_name
from lalm_lens.engine.recorded import States
from lalm_lens.interventions import Edit, Valued
from lalm_lens.runs import OWN, Run, Source


@dataclass(frozen=True)
class Base:
    """What the branches of a run share: its residual stream before each block and behind the last, its keys and values,
    its states where something is changed, and what is read from the run itself. Padding is cut off."""

    resid: list[Float[Tensor, "pos d_model"]]
    k: list[Float[Tensor, "kv_head pos d_head"]]
    v: list[Float[Tensor, "kv_head pos d_head"]]
    states: dict[str, Tensor]
    value: Tensor
    n_pad: int
    positions: Int[Tensor, "3 pos"] | None  # that it is rotated by, where they are not counted

    @property
    def n_pos(self) -> int:
        return len(self.resid[0])


def needed(n_run: int) -> set[str]:
    """The hook points of a run that a `Base` is made of."""
    by_block = ("hook_resid_pre", "attn.hook_rot_k", "attn.hook_v")
    return {f"blocks.{layer}.{name}" for layer in range(n_run) for name in by_block} | {
        f"blocks.{n_run - 1}.hook_resid_post"
    }


def compared(branch: Branch) -> set[str]:
    """The hook points of the base run whose states tell whether a change is one, or are taken by the branch itself."""
    edits = [change for change in branch.changes if isinstance(change, Edit) and not change.is_perceived]
    taken = [(edit, edit.value) for edit in edits if isinstance(edit, Valued) and isinstance(edit.value, Source)]
    own = {source_name(source, edit) for edit, source in taken if source.run is OWN}
    return {edit.name for edit in edits if edit.site != "pattern"} | own


def base_of(run: Run, states: States, value: Tensor, n_run: int, positions: Int[Tensor, "3 1 pos"] | None) -> Base:
    n_pad = run.n_pad
    cut = {name: state[n_pad:] for name, state in states.items() if "pattern" not in name}
    resid = [cut[f"blocks.{layer}.hook_resid_pre"] for layer in range(n_run)]
    k, v = (
        [cut[f"blocks.{layer}.attn.hook_{which}"].transpose(0, 1).contiguous() for layer in range(n_run)]
        for which in ("rot_k", "v")
    )
    resid.append(cut[f"blocks.{n_run - 1}.hook_resid_post"])
    states = {name: state for name, state in cut.items() if not name.endswith("hook_rot_k")}  # no second copy of `k`
    return Base(resid, k, v, states, value, n_pad, None if positions is None else positions[:, 0, n_pad:])
