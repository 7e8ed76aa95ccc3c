"""What a trace patches: which states of which layer, for one number of the map."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from lalm_lens.errors import InputError
from lalm_lens.interventions import BY_HEAD, BlockSite, Patch, Stack
from lalm_lens.model import HookedLALM
from lalm_lens.results import EMBED_LAYER, GridKind, Kind
from lalm_lens.runs import Run, Source
from lalm_lens.transcripts import SIDES, Side
from lalm_lens.windows import audio_windows, encoder_windows, refuse_window

Units = dict[str, tuple[int, ...]]  # `heads` or `neurons`; empty for the whole state


@dataclass(frozen=True)
class Cell:
    """One patched run: where the states of the other run go. `layer` -1 is the merged embedding; `span_s` is the
    stretch of the clip that the positions hold, where they are a window of it."""

    kind: Kind
    site: BlockSite
    layer: int
    positions: tuple[int, ...]
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    stack: Stack = "decoder"
    span_s: tuple[float, float] | None = None
    row: int | None = None  # of the encoder's states

    def patch(self, source: Run, positions: tuple[int, ...] | None = None) -> Patch:
        """By states of `source`, from other `positions` where it has others."""
        site, layer = ("resid_pre", 0) if self.layer == EMBED_LAYER else (self.site, self.layer)
        of = {"heads": self.heads, "neurons": self.neurons}
        value = Source(source, positions=positions)
        return Patch(site, layer, self.positions, value, **of, stack=self.stack, row=self.row)


@dataclass(frozen=True)
class Grid:
    """Which cells a trace has.

    `layer`: all text positions; `audio_layer`: all audio positions; `token`: one text position after the audio;
    `audio_window`: the audio positions of `window_s` seconds; `encoder_window`: as much of the states of the audio
    encoder, in each of its blocks. Every kind in every layer. A site by head has a cell for each head, and `post` one
    for every `n_neurons` neurons. A transcript counts as audio, or as text: `transcript_is`.
    """

    site: BlockSite = "resid_post"
    kinds: tuple[GridKind, ...] | None = None
    window_s: float = 1.0
    n_neurons: int = 128
    transcript_is: Side = "audio"

    def __post_init__(self) -> None:
        refuse_window(self.window_s)
        if self.n_neurons < 1:
            raise InputError(f"Groups of {self.n_neurons} neurons hold nothing.")
        if self.transcript_is not in SIDES:
            raise InputError(f"A transcript is one of {', '.join(SIDES)}; got {self.transcript_is!r}.")
        if unknown := set(self.kinds or ()) - set(get_args(GridKind)):
            raise InputError(f"There are no cells of kind {sorted(unknown)}, only {', '.join(get_args(GridKind))}.")

    @property
    def chosen(self) -> tuple[GridKind, ...]:
        """The kinds asked for; by default text, audio and single words, and without the words where there are heads."""
        if self.kinds is not None:
            return self.kinds
        return ("layer", "audio_layer") if self.site in (*BY_HEAD, "post") else ("layer", "audio_layer", "token")

    def audio(self, run: Run) -> tuple[int, ...]:
        """Where the clip is, and its transcript where that counts as audio."""
        return tuple(pos for region in SIDES[self.transcript_is] if run.has(region) for pos in run.indices(region))

    @property
    def of_transcript(self) -> tuple[GridKind, ...]:
        """The kinds that patch states of a transcript, as those of all positions do in a pattern."""
        if self.site == "pattern":
            return tuple(kind for kind in self.chosen if kind != "encoder_window")
        kinds = ("audio_layer",) if self.transcript_is == "audio" else ("layer", "token")
        return tuple(kind for kind in self.chosen if kind in kinds)


def cells(model: HookedLALM, grid: Grid, run: Run) -> list[Cell]:
    """The cells of one prompt, by layer."""
    decoder, encoder = model.lalm_cfg.decoder, model.lalm_cfg.encoder
    places = list(decoder_places(model, grid, run))
    first = EMBED_LAYER if grid.site.startswith("resid") else 0
    n_heads = decoder.n_kv_heads if grid.site in ("k", "v") else decoder.n_heads
    found = [
        Cell(kind, grid.site, layer, where, stack="decoder", span_s=span, row=None, **units)
        for layer in range(first, decoder.n_layers)
        for kind, where, span in places
        for units in units_of(grid, n_heads, decoder.d_mlp)
    ]
    if "encoder_window" in grid.chosen:
        found += [
            Cell("encoder_window", grid.site, layer, where, stack="audio_encoder", span_s=span, row=row, **units)
            for layer in range(encoder.n_layers)
            for where, span, row in encoder_windows(model, run, grid.window_s)
            for units in units_of(grid, encoder.n_heads, encoder.d_mlp)
        ]
    return found


def units_of(grid: Grid, n_heads: int, d_mlp: int) -> list[Units]:
    if grid.site in BY_HEAD:
        return [{"heads": (head,)} for head in range(n_heads)]
    if grid.site == "post":
        starts = range(0, d_mlp, grid.n_neurons)
        return [{"neurons": tuple(range(start, min(start + grid.n_neurons, d_mlp)))} for start in starts]
    return [{}]


Place = tuple[Kind, tuple[int, ...], tuple[float, float] | None]


def decoder_places(model: HookedLALM, grid: Grid, run: Run) -> Iterator[Place]:
    """Text is every position outside the audio, template and audio tags included."""
    audio, kinds = grid.audio(run), grid.chosen
    text = tuple(pos for pos in range(run.n_pad, len_prompt(run)) if pos not in set(audio))
    if "layer" in kinds:
        yield "layer", text, None
    if "audio_layer" in kinds:
        yield "audio_layer", audio, None
    if "token" in kinds:
        for pos in range(audio[-1] + 1, text[-1] + 1):
            yield "token", (pos,), None
    if "audio_window" in kinds:
        for where, span, _ in audio_windows(model, run, grid.window_s):
            yield "audio_window", where, span


def len_prompt(run: Run) -> int:
    """Positions up to the prompt's last; those of an answer that is forced stand behind it."""
    assert run.prompt is not None
    answer = sum(position.region == "answer" for position in run.prompt.positions)
    return run.n_pos - answer
