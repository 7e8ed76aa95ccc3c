"""Where attention goes: how much of it each region of the prompt gets, by layer and head.

A share is the attention of one query to all keys of a region; over all regions it sums to 1. Regions are of different
sizes, 750 audio positions against 20 words: `per_token` is the share divided by the number of keys of the region that
the query can see: not behind it, nor outside of its window where a layer has one. Both are averaged over the queries,
`per_token` over those that have such keys.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from lalm_lens.aggregates import refuse_columns
from lalm_lens.attributes import Attribute, Form
from lalm_lens.datasets import Sample
from lalm_lens.errors import InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.cuts import Place, is_in, place_name, positions
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.runs import Run
from lalm_lens.shapes import at_least_float32, typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GENERATED = "generated"  # the region of keys behind the prompt
Regions = Literal["each", "merged"]


def merged(region: str) -> str:
    """What is heard, seen or written, or else of the query."""
    return GENERATED if region in ("last", GENERATED) else "query" if is_in(region, "query") else region


REGIONS: dict[Regions, Callable[[str], str]] = {"each": str, "merged": merged}


@typed
def attention_share(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    queries: Place = "last",
    exclude_sink: int = 0,
    max_new_tokens: int = 0,
    regions: Regions = "each",
    form: Form = "P3",
    progress: bool = True,
) -> "AttentionShare":
    """How much attention each region gets from some queries, by layer and head, averaged over the queries.

    `queries` is a place as in `attention_knockout`. With `max_new_tokens` the model writes, greedily, and the queries
    are those that decided on its tokens: the last of the prompt, and each generated one but the last; what is generated
    is a region of its own as keys. `exclude_sink` leaves out that many first positions as keys, where attention rests
    that has nothing to look for, and what is left is scaled to sum to 1 for each query; a query that sees nothing else
    has no share, NaN. `regions` are those of the prompt, or `merged` into what is heard, what is seen, `generated`,
    which begins with the last position of the prompt, and `query`, which is all else. Each layer's pattern is reduced
    as soon as it is made: none is kept.

    Raises as `attention_knockout` does, and `InputError` if `queries` are chosen where a model writes.
    """
    if exclude_sink < 0 or max_new_tokens < 0:
        raise InputError(f"Numbers of positions and tokens are 0 or more; got {exclude_sink} and {max_new_tokens}.")
    if max_new_tokens and queries not in ("last", GENERATED):
        raise InputError(f"In generation the queries are those that decide on a token; got {queries!r}.")
    question = Question.about(model, samples, attribute, form, True)
    frames = []
    for sample in tqdm(samples, f"looking, {question.attribute.name}", unit="clip", disable=not progress):
        run = question.run(sample)
        windows = tuple(model.decoder_cfg.windows)
        shares = Shares.of(run, queries, exclude_sink, max_new_tokens, REGIONS[regions], windows)
        shares.look(model, run, max_new_tokens)
        said = {"queries": GENERATED if max_new_tokens else place_name(queries), "exclude_sink": exclude_sink}
        frames.append(pd.DataFrame(list(shares.rows())).assign(**question.columns(sample), **said))
    return AttentionShare.concat(frames)


@dataclass(frozen=True)
class Sums:
    """Over the queries that one layer has seen."""

    share: Float[Tensor, "head region"]
    per_token: Float[Tensor, "head region"]
    n_queries: int
    n_with_keys: Int[Tensor, " region"]  # queries that have a key of the region
    n_keys: Float[Tensor, " region"]  # that the last query can see

    def plus(self, new: "Sums") -> "Sums":
        return Sums(
            self.share + new.share,
            self.per_token + new.per_token,
            self.n_queries + new.n_queries,
            self.n_with_keys + new.n_with_keys,
            new.n_keys,
        )


@dataclass
class Shares:
    """Attention by region of one run, summed up layer by layer while it runs."""

    queries: tuple[int, ...]
    regions: list[str]
    is_in: Float[Tensor, "key_pos region"]
    windows: tuple[int | None, ...]  # of each layer
    layers: dict[int, Sums] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        run: Run,
        queries: Place,
        exclude_sink: int,
        n_new: int,
        name: Callable[[str], str],
        windows: tuple[int | None, ...],
    ) -> "Shares":
        assert run.prompt is not None
        region_of = [name(its) for its in (*(each.region for each in run.prompt.positions), *[GENERATED] * n_new)]
        kept = region_of[exclude_sink:]
        if not kept:
            raise InputError(f"exclude_sink leaves none of {len(region_of)} positions; got {exclude_sink}.")
        regions = list(dict.fromkeys(kept))
        is_in = torch.zeros(len(region_of), len(regions))
        for n, region in enumerate(kept, exclude_sink):
            is_in[n, regions.index(region)] = 1
        asked = positions(run, GENERATED, n_new - 1) if n_new else positions(run, queries)
        return cls(asked, regions, is_in, windows)

    def look(self, model: HookedLALM, run: Run, max_new_tokens: int) -> None:
        hooks = [(f"blocks.{layer}.attn.hook_pattern", self.add) for layer in range(model.decoder_cfg.n_layers)]
        if max_new_tokens:
            model.generate(run.inputs, max_new_tokens, fwd_hooks=hooks)
        else:
            with torch.no_grad():
                model.run_with_hooks(run.inputs.to(model.device), fwd_hooks=hooks, logits_at=-1)

    def add(self, pattern: Float[Tensor, "1 head query_pos key_pos"], hook: HookPoint) -> None:
        n_query, n_key = pattern.shape[-2:]
        offset = hook.ctx["offset"]
        here = [query for query in self.queries if offset <= query < offset + n_query]
        if not here:
            return
        seen = at_least_float32(pattern[0][:, [query - offset for query in here]]).cpu()
        share = seen @ self.is_in[:n_key].to(seen)
        share = share / share.sum(-1, keepdim=True)
        layer = hook.layer()
        n_keys = self.n_visible(here, self.windows[layer]).to(seen)
        has_keys = n_keys > 0
        per_token = (share / n_keys).where(has_keys, 0.0)
        new = Sums(share.sum(1), per_token.sum(1), len(here), has_keys.sum(0), n_keys[-1])
        self.layers[layer] = self.layers[layer].plus(new) if layer in self.layers else new

    def n_visible(self, queries: Sequence[int], window: int | None) -> Float[Tensor, "query region"]:
        """How many keys of each region a query can see, itself among them."""
        up_to = pad(self.is_in.cumsum(0), (0, 0, 1, 0))  # [position, region], before it
        begin = [0 if window is None else max(0, query + 1 - window) for query in queries]
        return up_to[[query + 1 for query in queries]] - up_to[begin]

    def rows(self) -> Iterator[dict]:
        for layer, sums in self.layers.items():
            share, per_token = sums.share / sums.n_queries, sums.per_token / sums.n_with_keys
            for head in range(len(share)):
                for n, region in enumerate(self.regions):
                    yield {
                        "layer": layer,
                        "head": head,
                        "region": region,
                        "n_queries": sums.n_queries,
                        "n_keys": int(sums.n_keys[n]),
                        "share": float(share[head, n]),
                        "per_token": float(per_token[head, n]),
                    }


@dataclass(frozen=True, repr=False)
class AttentionShare(Table):
    """Attention by region, one row per clip, layer, head and region."""

    NAME: ClassVar[str] = "a table of attention shares"
    BY_CLIP: ClassVar[bool] = True
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        "seen_label": "str",  # of a counterfactual pair, another one than `label`
        "queries": "str",
        "exclude_sink": "int64",  # how many first positions are left out as keys
        "layer": "int64",
        "head": "int64",
        "region": "str",
        "n_queries": "int64",
        "n_keys": "int64",  # of the region, that the last of the queries can see
        "share": "float64",
        "per_token": "float64",
    }

    def means(self, by: Sequence[str] = ("attribute", "layer", "region")) -> pd.DataFrame:
        """Mean `share` and `per_token` over clips and heads, and layers unless they are in `by`; n is that of clips.
        Raises `DataError` if other settings vary."""
        refuse_columns(self.frame, by)
        self.refuse_mixed(["model", "attribute", "form", "queries", "exclude_sink"], by)
        groups = self.frame.groupby(list(by), sort=False)
        means = groups[["share", "per_token"]].mean()
        return means.assign(n=groups["sample"].nunique()).reset_index()

    @typed
    def overview(self) -> pd.DataFrame:
        """Over all layers and heads."""
        return self.means(("region",))

    def lines(self) -> pd.DataFrame:
        return self.means(("region", "layer")).rename(columns={"region": "line"})[["line", "layer", "share"]]

    def plot(self, value: Literal["share", "per_token"] = "share") -> "Figure":
        """`share` or `per_token` by layer, a line for each region, the mean over clips and heads; a panel per
        attribute."""
        return plots_module().share_curves(self.means(), value, self.frame)

    def __repr__(self) -> str:
        mean = self.frame.groupby("region").share.mean().sort_values(ascending=False)
        told = ", ".join(f"{region} {share:.2f}" for region, share in mean.head(4).items())
        return f"AttentionShare({self.frame['sample'].nunique()} clips, from {self.frame.queries.iloc[0]}: {told})"
