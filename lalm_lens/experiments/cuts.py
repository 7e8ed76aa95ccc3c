"""Which attention is cut: edges from place to place in a prompt, in some layers and heads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from lalm_lens.engine.branches import check
from lalm_lens.errors import InputError
from lalm_lens.experiments.cells import len_prompt
from lalm_lens.interventions import Knockout, OnScores
from lalm_lens.model import HookedLALM
from lalm_lens.pieces import Region
from lalm_lens.runs import Run

Place = str | tuple[str, ...] | tuple[int, ...] | range  # a region, several, or positions
Chain = tuple[Place, ...]  # what is heard goes from the first of them to the next, and so on
LayerSets = int | Literal["up_to", "from", "all"] | tuple[int, ...] | range
Heads = Literal["all", "each"] | tuple[int, ...]

PERCEIVED = ("audio", "transcript", "image", "video")
AUDIO_SIDE = ("audio", "transcript")  # a transcript says what was heard
TAGS = ("audio_tag", "image_tag", "video_tag")
ANSWER = ("late", "attribute", "last", "answer")  # how it is forced to begin, and what follows
NAMED = ("audio_side", "text", "query", "control", "penultimate", "generated")  # beside the regions of a prompt


@dataclass(frozen=True)
class Cut:
    """One knocked-out run. `kind` is how its layers were chosen, and `layer` which of these choices it is: the middle
    of a window, the last of `up_to`, the first of `from`."""

    edge: str
    kind: str
    layer: int | None
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    knockouts: tuple[OnScores, ...]

    def columns(self) -> dict[str, str | int | None]:
        return {
            "edge": self.edge,
            "kind": self.kind,
            "layer": self.layer,
            "layers": spelled(self.layers),
            "heads": "all" if self.heads is None else spelled(self.heads),
            "n_pairs": sum(len(each.queries_at) * len(each.keys_at) for each in self.knockouts),
        }


def cuts(
    model: HookedLALM, run: Run, chains: Sequence[Chain], layers: Sequence[LayerSets], heads: Heads, n_new: int = 0
) -> list[Cut]:
    """Every chain, and every edge of one by itself, in each of the sets of layers and heads. `n_new` is how many
    positions will be generated behind the prompt and looked from."""
    found, sets = [], sets_of(model, layers, heads)
    for edge, pairs in edges(chains).items():
        keys_of = [(positions(run, source, n_new), positions(run, target, n_new)) for source, target in pairs]
        for kind, layer, chosen, its in sets:
            knockouts = tuple(Knockout(chosen, queries, keys, heads=its) for keys, queries in keys_of)
            found.append(Cut(edge, kind, layer, chosen, its, knockouts))
    return found


def edges(chains: Sequence[Chain]) -> dict[str, list[tuple[Place, Place]]]:
    """The edges that are cut together, by their names: each by itself, and those of a chain at once."""
    found: dict[str, list[tuple[Place, Place]]] = {}
    for chain in chains:
        if not isinstance(chain, tuple) or len(chain) < 2:
            raise InputError(f'A chain names two places or more, as ("audio", "last"); got {chain!r}.')
        pairs = list(pairwise(chain))
        for some in ([pair] for pair in pairs):
            found[name_of(some[0])] = some
        found[name_of(chain)] = pairs
    if not found:
        raise InputError('No edge is cut: name one, as chains=[("audio", "last")].')
    return found


def name_of(chain: Chain) -> str:
    return " -> ".join(place_name(place) for place in chain)


def place_name(place: Place) -> str:
    if isinstance(place, str):
        return place
    names = [each for each in place if isinstance(each, str)]
    return "+".join(names) if names else spelled([n for n in place if isinstance(n, int)])


def positions(run: Run, place: Place, n_new: int = 0) -> tuple[int, ...]:
    """Absolute positions of a place in a run of one prompt. Of several regions, those that the prompt has.

    Beside the regions: `audio_side` is the audio, with its transcript where the prompt has one, `text` all that is
    neither heard nor seen, `control` those of it that are neither tags of what is heard or seen, nor a statement, nor
    the answer's own words, the last position among them; `penultimate` is the position before the last, `generated` the
    last position and the `n_new` that come behind it, `query` the text without the last position. Raises `InputError`
    for what there is not.
    """
    names = (place,) if isinstance(place, str) else tuple(place)
    if not any(isinstance(name, str) for name in names):
        return run.indices(place)  # pyright: ignore[reportArgumentType]  no names, so numbers
    known = (*get_args(Region), *NAMED)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"There is no place {unknown[0]!r}. Name positions, or some of {', '.join(known)}.")
    found = sorted({position for name in names for position in named(run, str(name), n_new)})
    return tuple(found) if found else run.region(str(names[0]))


def named(run: Run, name: str, n_new: int) -> Iterator[int]:
    end = len_prompt(run)
    if name == "generated":
        yield from range(end - 1, end + n_new)
    elif name == "penultimate":
        yield end - 2
    elif run.prompt is None:
        yield from run.region(name)
    else:
        for n, position in enumerate(run.prompt.positions, run.n_pad):
            if is_in(position.region, name):
                yield n


def is_in(region: str, name: str) -> bool:
    if name == "text":
        return region not in (*PERCEIVED, "answer")
    if name == "query":
        return region not in (*PERCEIVED, "last", "answer")
    if name == "control":
        return region not in (*PERCEIVED, *TAGS, "statement", *ANSWER)
    return region in AUDIO_SIDE if name == "audio_side" else region == name


def leaves_blind(model: HookedLALM, cut: Cut) -> bool:
    """Whether a query would have no key left, which is no knockout: where a window is of one position, say."""
    windows = {model.decoder_cfg.windows[layer] for layer in cut.layers}
    return any(
        set(knockout.keys_at).issuperset(range(0 if window is None else max(0, query - window + 1), query + 1))
        for knockout in cut.knockouts
        for query in knockout.queries_at
        for window in windows
    )


def sets_of(
    model: HookedLALM, layers: Sequence[LayerSets], heads: Heads
) -> list[tuple[str, int | None, tuple[int, ...], tuple[int, ...] | None]]:
    """Sets of layers, as `layer_sets` has them, and heads (None is all). Raises `InputError` for none, and for layers
    and heads that there are not."""
    n_layers, n_heads = model.decoder_cfg.n_layers, model.decoder_cfg.n_heads
    found = [
        (*each, its) for choice in layers for each in layer_sets(choice, n_layers) for its in head_sets(heads, n_heads)
    ]
    if not found:
        raise InputError('No layers are chosen: name one way or more to choose them, as layers=["all"].')
    for _, _, chosen, its in found:
        check(chosen, n_layers, "layers")
        check(its or (), n_heads, "heads")
    return found


def layer_sets(choice: LayerSets, n_layers: int) -> list[tuple[str, int | None, tuple[int, ...]]]:
    """The sets of layers that a choice stands for: how they were chosen, which one it is, and the layers.

    A number is the size of a window that slides over the layers, cut off at both ends, one around every layer.
    """
    every = range(n_layers)
    if choice == "all":
        return [("all", None, tuple(every))]
    if choice == "up_to":
        return [("up_to", layer, tuple(every[: layer + 1])) for layer in every]
    if choice == "from":
        return [("from", layer, tuple(every[layer:])) for layer in every]
    if isinstance(choice, int) and choice > 0 and choice % 2:
        half = choice // 2
        return [(f"window {choice}", n, tuple(every[max(0, n - half) : n + half + 1])) for n in every]
    if isinstance(choice, tuple | range) and choice:
        return [("chosen", None, tuple(choice))]
    raise InputError(
        f"Layers are chosen by the odd size of a window, up_to, from, all, or as a tuple of layers; got {choice!r}."
    )


def head_sets(heads: Heads, n_heads: int) -> list[tuple[int, ...] | None]:
    if heads == "all":
        return [None]
    if heads == "each":
        return [(head,) for head in range(n_heads)]
    return [tuple(heads)]


def spelled(numbers: Sequence[int]) -> str:
    """Those that follow each other as "2-5"."""
    stretches: list[list[int]] = []
    for n in sorted(set(numbers)):
        if stretches and stretches[-1][-1] == n - 1:
            stretches[-1].append(n)
        else:
            stretches.append([n])
    return ",".join(f"{its[0]}-{its[-1]}" if len(its) > 1 else str(its[0]) for its in stretches)
