"""Activation patching under TransformerLens' names and in its argument order, on prompts with audio in them.

    patching.get_act_patch_resid_pre(model, corrupted, clean_cache, metric)     Float[Tensor, "layer pos"]
    patching.get_act_patch_attn_head_out_all_pos(model, corrupted, clean, metric, engine="sweep", progress=True)

Each puts states of the clean run into the corrupted one, those of one place at a time, and returns what the metric
then says. Where TransformerLens has `corrupted_tokens`, give `Inputs`, `Embedded` or a `Run` of one prompt; as
`clean_cache` a cache of the clean prompt, or a `Run` of it, from which the states that are needed are taken. The two
prompts have the same number of positions. Further `Options` go by name.

`metric` gets the logits of one patched run and returns one number. They are those of the last position alone,
[1, 1, d_vocab], so that `logits[0, -1]` is what it is in TransformerLens. `logits_at` says which others: an index, a
tuple of them, or None for all of the prompt, [1, pos, d_vocab] without padding.

Beyond TransformerLens: `resid_post`, neurons, regions of the prompt, and the audio encoder. Its own functions do the
rest through `model.bind(corrupted)`: direct paths, several prompts or metrics at once, statistics over prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from transformer_lens import ActivationCache

from lalm_lens.engine.branches import Branch, unbatched
from lalm_lens.engine.plan import Engine, run_branches
from lalm_lens.errors import InputError
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.interventions import Patch, Site
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import Score
from lalm_lens.runs import Own, Positions, Run, Source
from lalm_lens.shapes import typed
from lalm_lens.transformer import HookedTransformer
from lalm_lens.windows import encoder_windows

Corrupted = Inputs | Embedded | Run
Clean = Run | ActivationCache | Mapping[str, Tensor]
Metric = Callable[[Float[Tensor, "1 at d_vocab"]], Any]  # a number, or a tensor of one
Stream = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]


class Options(TypedDict, total=False):
    """What every function takes by name; all but `logits_at` as in `run_branches`."""

    logits_at: int | tuple[int, ...] | None
    engine: Engine
    token_budget: int | None
    progress: bool


def over(axes: str, site: Site):
    """A function that patches one site at every place on these axes."""

    @typed
    def get_act_patch(
        model: HookedTransformer,
        corrupted_tokens: Corrupted,
        clean_cache: Clean,
        patching_metric: Metric,
        **options: Unpack[Options],
    ) -> Float[Tensor, axes]:
        return patched_grid(model, as_run(corrupted_tokens), clean_cache, patching_metric, axes, site, options)

    get_act_patch.__doc__ = f"The metric with `{site}` of the clean run, by {axes}: see `lalm_lens.patching`."
    return get_act_patch


def every(axes: str, *sites: Site):
    """A function that patches several sites; where heads share keys and values, it fills their rows with 0."""

    @typed
    def get_act_patch_every(
        model: HookedTransformer,
        corrupted_tokens: Corrupted,
        clean_cache: Clean,
        metric: Metric,
        **options: Unpack[Options],
    ) -> Float[Tensor, f"patch_type {axes}"]:
        run = as_run(corrupted_tokens)
        grids = [patched_grid(model, run, clean_cache, metric, axes_of(site), site, options) for site in sites]
        width = max(grid.shape[-1] for grid in grids)
        return torch.stack([pad(grid, (0, width - grid.shape[-1])) for grid in grids])

    def axes_of(site: Site) -> str:
        return axes.replace("head", "kv_head") if site in ("k", "v") else axes

    get_act_patch_every.__doc__ = (
        f"The metric with {', '.join(sites)} of the clean run, each by {axes}, 0 if it has none."
    )
    return get_act_patch_every


def patched_grid(
    model: HookedTransformer, run: Run, clean: Clean, metric: Metric, axes: str, site: Site, options: Options
) -> Float[Tensor, "*place"]:
    sizes = sizes_of(model, run)
    shape = {axis: sizes[axis] for axis in axes.split()}
    cells = [dict(zip(shape, cell, strict=True)) for cell in product(*map(range, shape.values()))]
    patches = [patch_of(site, cell, run, clean) for cell in cells]
    return patched_metric(model, run, metric, patches, **options).reshape(tuple(shape.values()))


def sizes_of(model: HookedTransformer, run: Run) -> dict[str, int]:
    cfg = model.decoder_cfg
    positions = dict.fromkeys(("pos", "query_pos", "key_pos"), run.n_pos)
    return positions | {"layer": cfg.n_layers, "head": cfg.n_heads, "kv_head": cfg.n_kv_heads}


def patch_of(site: Site, cell: Mapping[str, int], run: Run, clean: Clean) -> Patch | None:
    """The patch at one place; on an axis that `cell` lacks, everywhere. None where there is nothing to patch."""

    def on(*axes: str) -> tuple[int, ...] | None:
        return next(((cell[axis],) for axis in axes if axis in cell), None)

    if cell.get("key_pos", 0) > cell.get("query_pos", run.n_pos):
        return None  # a key behind its query gets no attention, in either run
    at: Positions = on("pos", "query_pos") or range(run.n_pos)
    return Patch(site, cell["layer"], at, source_of(clean), heads=on("head", "kv_head"), keys=on("key_pos"))


def source_of(clean: Clean) -> Source:
    return Source(clean.cache_dict if isinstance(clean, ActivationCache) else clean)


def as_run(inputs: Corrupted) -> Run:
    return inputs if isinstance(inputs, Run) else Run(inputs)


def patched_metric(
    model: HookedTransformer,
    run: Run,
    metric: Metric,
    patches: Sequence[Patch | None],
    *,
    logits_at: int | tuple[int, ...] | None = -1,
    engine: Engine = "auto",
    token_budget: int | None = None,
    progress: bool = False,
) -> Float[Tensor, " patch"]:
    """The metric of the run with each of the patches alone; None is none."""
    for patch in {patch.name: patch for patch in patches if patch is not None}.values():
        check_length(patch, run)
    positions = tuple(range(run.n_pad, run.n_pos)) if logits_at is None else logits_at
    readout = Score(one_by_one(metric), (positions,) if isinstance(positions, int) else positions)
    branches = [Branch(run, () if patch is None else (patch,)) for patch in patches]
    return run_branches(model, branches, readout, engine=engine, token_budget=token_budget, progress=progress).values


def check_length(patch: Patch, run: Run) -> None:
    """Positions of two prompts stand for each other only if there are as many."""
    assert isinstance(patch.value, Source)
    clean = patch.value.run
    if isinstance(clean, Run):
        if (clean.n_pos, clean.n_pad) != (run.n_pos, run.n_pad):
            raise unequal(f"{clean.n_pos - clean.n_pad} positions and {clean.n_pad} of padding", run)
    elif not isinstance(clean, Own):
        if patch.is_perceived:  # the encoder's states are as many for every clip: the embedding tells, where it is kept
            n_clean = clean["hook_embed"].shape[-2] if "hook_embed" in clean else run.n_pos
        else:
            n_clean = unbatched(clean, patch.name, patch).shape[-1 if patch.site == "pattern" else 0]
        if n_clean != run.n_pos:
            raise unequal(f"{n_clean} positions", run)


def unequal(clean: str, run: Run) -> InputError:
    return InputError(
        f"The clean prompt has {clean}, the corrupted one {run.n_pos - run.n_pad} and {run.n_pad}: give prompts of one "
        "length, such as one question about two clips of the same duration."
    )


def one_by_one(metric: Metric) -> Callable[[Float[Tensor, "branch at d_vocab"]], Float[Tensor, " branch"]]:
    return lambda logits: torch.stack([number(metric(of_branch[None])) for of_branch in logits])


def number(value: object) -> Float[Tensor, ""]:
    if value is None:
        raise InputError("A metric returns one number for each patched run; this one returned nothing.")
    found = torch.as_tensor(value).detach()
    if found.ndim:
        raise InputError(f"A metric returns one number for each patched run; this one a shape of {tuple(found.shape)}.")
    return found if found.is_floating_point() else found.float()


get_act_patch_resid_pre = over("layer pos", "resid_pre")
get_act_patch_resid_mid = over("layer pos", "resid_mid")
get_act_patch_resid_post = over("layer pos", "resid_post")
get_act_patch_attn_out = over("layer pos", "attn_out")
get_act_patch_mlp_out = over("layer pos", "mlp_out")

get_act_patch_attn_head_out_by_pos = over("layer pos head", "z")
get_act_patch_attn_head_q_by_pos = over("layer pos head", "q")
get_act_patch_attn_head_k_by_pos = over("layer pos kv_head", "k")
get_act_patch_attn_head_v_by_pos = over("layer pos kv_head", "v")
get_act_patch_attn_head_pattern_by_pos = over("layer head query_pos", "pattern")
get_act_patch_attn_head_pattern_dest_src_pos = over("layer head query_pos key_pos", "pattern")

get_act_patch_attn_head_out_all_pos = over("layer head", "z")
get_act_patch_attn_head_q_all_pos = over("layer head", "q")
get_act_patch_attn_head_k_all_pos = over("layer kv_head", "k")
get_act_patch_attn_head_v_all_pos = over("layer kv_head", "v")
get_act_patch_attn_head_pattern_all_pos = over("layer head", "pattern")

get_act_patch_block_every = every("layer pos", "resid_pre", "attn_out", "mlp_out")
get_act_patch_attn_head_all_pos_every = every("layer head", "z", "q", "k", "v", "pattern")
get_act_patch_attn_head_by_pos_every = every("layer pos head", "z", "q", "k", "v", "pattern")


@typed
def get_act_patch_mlp_post_by_pos(
    model: HookedTransformer,
    corrupted_tokens: Corrupted,
    clean_cache: Clean,
    patching_metric: Metric,
    *,
    neurons: tuple[int, ...] | None = None,
    **options: Unpack[Options],
) -> Float[Tensor, "layer pos"]:
    """The metric with neurons of the clean run in the corrupted one, `neurons` of each layer together (None is all)."""
    run, n_layers, source = as_run(corrupted_tokens), model.decoder_cfg.n_layers, source_of(clean_cache)
    cells = product(range(n_layers), range(run.n_pos))
    patches = [Patch("post", layer, (pos,), source, neurons=neurons) for layer, pos in cells]
    return patched_metric(model, run, patching_metric, patches, **options).reshape(n_layers, run.n_pos)


class ByRegion(NamedTuple):
    values: Float[Tensor, "layer region"]
    regions: tuple[str, ...]


@typed
def get_act_patch_by_region(
    model: HookedTransformer,
    corrupted_tokens: Corrupted,
    clean_cache: Clean,
    patching_metric: Metric,
    *,
    site: Stream = "resid_post",
    **options: Unpack[Options],
) -> ByRegion:
    """The metric with one region of the prompt patched, all of its positions together; regions in the prompt's order.

    Raises `InputError` without a `Run` that has its prompt.
    """
    run, n_layers = as_run(corrupted_tokens), model.decoder_cfg.n_layers
    if run.prompt is None:
        raise InputError(
            "Which positions are which region? Give the corrupted run with its prompt: Run(inputs, prompt)."
        )
    regions = tuple(dict.fromkeys(position.region for position in run.prompt.positions))
    source = source_of(clean_cache)
    patches = [Patch(site, layer, region, source) for layer, region in product(range(n_layers), regions)]
    values = patched_metric(model, run, patching_metric, patches, **options)
    return ByRegion(values.reshape(n_layers, len(regions)), regions)


@typed
def get_act_patch_encoder(
    model: HookedLALM,
    corrupted_tokens: Inputs | Run,
    clean_cache: Clean,
    patching_metric: Metric,
    *,
    site: Stream = "resid_post",
    window_s: float | int = 1.0,
    **options: Unpack[Options],
) -> Float[Tensor, "layer window"]:
    """The metric with one stretch of the clip patched in one block of the audio encoder.

    Windows follow each other, of `window_s` seconds rounded to whole states of the encoder (20 ms in Qwen2-Audio), one
    at least; the last one ends with the clip. For each patch, encoder and adapter run again, and all positions from the
    audio on. Raises `InputError` where no audio is heard.
    """
    run, n_layers, source = as_run(corrupted_tokens), model.lalm_cfg.encoder.n_layers, source_of(clean_cache)
    windows = encoder_windows(model, run, float(window_s))
    patches = [
        Patch(site, layer, window.positions, source, stack="audio_encoder", row=window.row)
        for layer, window in product(range(n_layers), windows)
    ]
    return patched_metric(model, run, patching_metric, patches, **options).reshape(n_layers, len(windows))
