"""The three tiny models on the same clips, with what is known of them by construction drawn into the pictures."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lalm_lens.assets import TINY_LALM, TINY_LALM_PLANTED, TINY_LALM_RELAY
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.experiments.asked import processor_of
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.light_cone import light_cone
from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM
from lalm_lens.plots import COLOURS, LABELS, curve, furnish, rate, shown, title, token_panel
from lalm_lens.results import EMBED_LAYER, CausalTrace

CONSTRUCTION = {
    TINY_LALM: "trained as it comes: only the ends are known",
    TINY_LALM_PLANTED: "planted: attention reaches the sound in block 4 alone",
    TINY_LALM_RELAY: "relay: attention looks 20 positions back, so words must pass the sound on",
}


@dataclass(frozen=True)
class Known:
    """A trace of one attribute, and which states can matter by the reach of attention, the embedding's first."""

    trace: CausalTrace
    cone: Bool[Tensor, "layer pos"]
    is_audio: Bool[Tensor, " pos"]

    @property
    def after_audio(self) -> Bool[Tensor, "layer after"]:
        return self.cone[:, int(self.is_audio.nonzero().max()) + 1 :]

    def text_recovery(self) -> pd.Series:
        """By layer, what patching all text must bring back: nothing where no text can matter, all where no audio can;
        NaN where both can. Patching all audio must bring back the rest."""
        text, audio = self.cone[:, ~self.is_audio].any(1), self.cone[:, self.is_audio].any(1)
        must = torch.where(~text, 0.0, torch.where(~audio, 1.0, torch.nan))
        return pd.Series(must.numpy(), index=range(EMBED_LAYER, len(must) + EMBED_LAYER))


def demo(out: Path, n_clips: int) -> tuple[CausalTrace, list[Path]]:
    """Trace the three models on all attributes; pictures of them side by side go to `out`. The trace is the natural
    model's; that of all three is saved as known.parquet."""
    clips = {name: read_folder(write_clips(out / "clips" / name, name, n_clips, seed=1)) for name in ATTRIBUTES}
    known: dict[str, list[Known]] = {name: [] for name in ATTRIBUTES}
    for folder in CONSTRUCTION:
        model = from_pretrained(folder)
        print(model)
        for name, samples in clips.items():
            trace = causal_trace(model, samples, attribute=name)
            known[name].append(what_is_known(model, trace, name, samples[0]))
    pictures = [out / f"known_{name}.png" for name in ATTRIBUTES]
    for name, path in zip(ATTRIBUTES, pictures, strict=True):
        known_answers(known[name], name).savefig(path, dpi=130)
    traces = [each.trace.frame for models in known.values() for each in models]
    print(CausalTrace.concat(traces).save(out / "known.parquet"))
    return CausalTrace.concat([models[0].trace.frame for models in known.values()]), pictures


def what_is_known(model: HookedLALM, trace: CausalTrace, attribute: str, sample: Sample) -> Known:
    """By the prompt about one clip; the others are as long."""
    processor = processor_of(model)
    is_audio = processor.prompt(ATTRIBUTES[attribute], processor.n_frames(sample.waveform)).is_region("audio")
    cone = light_cone(model.decoder_cfg.windows, is_audio)
    return Known(trace, torch.cat([is_audio[None], cone]), is_audio)  # words are embedded before anything is heard


def known_answers(known: list[Known], attribute: str) -> Figure:
    """A row for each model: recovery by layer, and the map of single positions with its light cone."""
    figure = Figure(figsize=(17, 4.2 * len(known)), layout="constrained")
    axes = figure.subplots(len(known), 2, width_ratios=[1, 3])
    for (curves, cells), each, said in zip(axes, known, CONSTRUCTION.values(), strict=True):
        draw_curves(curves, each, attribute)
        draw_map(cells, each)
        cells.set_title(f"{each.trace.frame.model.iloc[0]}: {said}", fontsize=11, pad=24)
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"Known answers, {attribute}. Dashed: what must come out. Grey: out of reach, must be 0.", fontsize=12
    )
    return figure


def draw_curves(ax: Axes, known: Known, attribute: str) -> None:
    frame = known.trace.frame
    for kind, label in LABELS.items():
        curve(ax, shown(frame)[shown(frame).kind == kind], label, COLOURS[kind], "-")
    furnish(ax, frame)
    text = known.text_recovery()
    for must, label in ((text, "must be"), (1 - text, None)):
        ax.plot(must.index, must, color="black", ls="--", lw=1.8, marker="s", ms=6, mfc="none", label=label)
    ax.set_title(title(frame, attribute), fontsize=10)
    ax.set_ylabel(rate(frame))


def draw_map(ax: Axes, known: Known) -> None:
    frame = known.trace.frame
    token_panel(ax, frame[frame.kind == "token"])
    out_of_reach = np.ma.masked_where(known.after_audio.numpy(), np.ones(known.after_audio.shape))
    ax.imshow(out_of_reach, aspect="auto", origin="lower", cmap="Greys", vmin=0, vmax=2, alpha=0.35)
