"""What the tests of the engine share: small random models, runs of them, and changes of every kind."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from reference import chirps, hf_batch, tiny_hf
from torch import Tensor
from torch.testing import assert_close

from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Outcome, Plan
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.interventions import BY_HEAD, Add, Change, Edit, Patch, Recompute, Scale
from lalm_lens.loading import from_hf
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import Readout, Score
from lalm_lens.runs import Run, Source

RESID = ("resid_pre", "resid_mid", "resid_post")
SITES = (*RESID, "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "post")
N_LAYERS = 4
N_SHARED = 4  # positions at the beginning, the same in every run of random embeddings


def windowed(window: int, *full: int) -> dict:
    kinds = ["full_attention" if layer in full else "sliding_attention" for layer in range(N_LAYERS)]
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}


MODELS = {
    "grouped": {},
    "a key for each head": {"n_kv_heads": 4},
    "windows": windowed(5),
    "windows and one open block": windowed(1, 2),
    "windows in turn": windowed(4, 0, 2),
}


@lru_cache
def model_of(name: str) -> HookedLALM:
    """Biases, norm weights and positions are all random. Not to be changed: the tests share it."""
    return from_hf(tiny_hf(seed=7, **MODELS[name]))


@lru_cache
def embedded(seed: int, n_pos: int = 18, d_model: int = 64) -> Run:
    """A run of random embeddings, of which the first `N_SHARED` are those of every other."""
    embed = torch.randn(1, n_pos, d_model, generator=torch.Generator().manual_seed(seed))
    embed[:, :N_SHARED] = torch.randn(1, N_SHARED, d_model, generator=torch.Generator().manual_seed(99))
    return Run(Embedded(embed, torch.ones(1, n_pos, dtype=torch.bool)))


@lru_cache
def heard(durations_s: tuple[float, ...], row: int = 0, seed: int = 0) -> Run:
    """One row of a left-padded batch of prompts with a clip each."""
    inputs = Inputs.from_hf(hf_batch(chirps(list(durations_s), seed)))
    assert inputs.mel is not None
    assert inputs.n_frames is not None
    return Run(Inputs(*(x[[row]] for x in (inputs.tokens, inputs.attention_mask, inputs.mel, inputs.n_frames))))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(model: HookedLALM, site: str, n_keys: int, stack: str = "decoder") -> tuple[int, ...]:
    """The shape of a state of one position."""
    cfg = model.decoder_cfg if stack == "decoder" else model.lalm_cfg.encoder
    n_kv_heads = model.decoder_cfg.n_kv_heads if stack == "decoder" else cfg.n_heads
    by_head = {"pattern": n_keys} | dict.fromkeys("qkvz", cfg.d_model // cfg.n_heads)
    if site in BY_HEAD:
        return (n_kv_heads if site in ("k", "v") else cfg.n_heads), by_head[site]
    return (cfg.d_mlp if site == "post" else cfg.d_model,)


def state(model: HookedLALM, site: str, n_at: int, n_keys: int, seed: int = 0, stack: str = "decoder") -> Tensor:
    """Random states of a site; a row of a pattern sums to 1, over keys that it could not see as well."""
    x = noise(n_at, *unit(model, site, n_keys, stack), seed=seed)
    return x.softmax(-1) if site == "pattern" else x


def parts(model: HookedLALM, site: str, n_keys: int) -> list[dict]:
    """Subsets of heads, neurons and keys that a change of a site may be of."""
    if site == "post":
        return [{"neurons": (0, 17, 95)}]
    if site == "pattern":
        return [{"heads": (3, 0)}, {"keys": (0, n_keys // 2)}, {"heads": (2, 1), "keys": (1, 0, n_keys - 1)}]
    if site in BY_HEAD:
        n_heads = unit(model, site, n_keys)[0]
        return [{"heads": (n_heads - 1,)}, {"heads": tuple(reversed(range(n_heads)))}]
    return []


def kinds(
    model: HookedLALM, site: str, layer: int, base: Run, clean: Run, longer: Run, cache: object
) -> Iterator[Edit]:
    """Every kind of change at one place, from every kind of source."""
    n_pos, beside = base.n_pos, (layer + 1) % N_LAYERS
    some = {"keys": (0, 3, n_pos - 2)} if site == "pattern" else {}  # keys that the longer run has as well
    yield Patch(site, layer, (9,), state(model, site, 1, n_pos))
    yield Patch(site, layer, (-1, 6, 2), Source(clean))
    yield Patch(site, layer, (7, 12), Source(clean, layer=beside, positions=(15, 4)))
    yield Patch(site, layer, (7, 12), Source(longer, positions=(-1, 3)), **some)
    yield Patch(site, layer, range(5, 9), Source(cache))
    yield Patch(site, layer, (-2, 8), Source(cache, layer=beside, positions=(3, -3)))
    yield Add(site, layer, (11, 4), state(model, site, 2, n_pos), factor=-0.5)
    yield Add(site, layer, (10,), Source(clean), factor=0.7)
    yield Scale(site, layer, (13, -3), factor=0.3)
    yield Recompute(site, layer, (8, -1))
    for part in parts(model, site, n_pos):
        yield Patch(site, layer, (6, 14), Source(clean, positions=(5, 16)), **part)
        yield Scale(site, layer, (12, -1), factor=0.0, **part)


def branches(run: Run, *changes: Change | tuple[Change, ...]) -> list[Branch]:
    return [Branch(run, its if isinstance(its, tuple) else (its,)) for its in changes]


def both(logits: Tensor) -> Tensor:
    return torch.cat([logits, logits.float().log_softmax(-1)], dim=-1)


LOGITS_AND_LOG_PROBS = Score(both, (-1, -3))


def assert_same(
    model: HookedLALM, its: list[Branch], readout: Readout = LOGITS_AND_LOG_PROBS, token_budget: int | None = None
) -> Outcome:
    """That the sweep, asked for by name, finds what the hooks find. Returns what the sweep found."""
    swept = Plan(model, its, readout, engine="sweep", token_budget=token_budget).run()
    hooked = Plan(model, its, readout, engine="hooks").run()
    assert (swept.engine, hooked.engine) == ("sweep", "hooks")
    assert_close(swept.base, hooked.base)
    for branch, ours, theirs in zip(its, swept.values, hooked.values, strict=True):
        assert_close(ours, theirs, msg=lambda message, its=branch.changes: f"{its}\n{message}")
    return swept
