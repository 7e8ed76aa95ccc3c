"""`lalm-lens trace` and `lalm-lens demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.commands.base import EXAMPLES, app, ready
from lalm_lens.commands.clips import asked_about, cut_to_hearing, read_samples
from lalm_lens.commands.opening import opened
from lalm_lens.commands.options import (
    Cut,
    Device,
    DeviceMap,
    Dtype,
    Labels,
    Model,
    Own,
    Part,
    Prefix,
    Question,
    TokenBudget,
    VoiceActivity,
    choice,
    one_of,
)
from lalm_lens.errors import InputError

if TYPE_CHECKING:
    from lalm_lens.corrupt import Corruption
    from lalm_lens.results import CausalTrace


@app.command(epilog=EXAMPLES)
def trace(
    model: Model,
    clips: Annotated[
        Path, typer.Argument(help="A sound file, or a folder with metadata.jsonl (file_name, label on each line).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for trace.parquet, the pictures and trace.html.")],
    attribute: Annotated[str | None, typer.Option(help=f"What is asked: {', '.join(ATTRIBUTES)}.")] = None,
    label: Annotated[str | None, typer.Option(help="The true answer, for a single sound file.")] = None,
    question: Question = None,
    labels: Labels = None,
    prefix: Prefix = None,
    form: Annotated[str, choice("form", "What the user says: nothing, the question, the options too")] = "P3",
    site: Annotated[str, choice("site", "Which state is patched")] = "resid_post",
    metric: Annotated[str, choice("metric", "What is measured of the true label")] = "probability",
    predict: Annotated[str, choice("predict", "Among what an answer is chosen")] = "labels",
    direction: Annotated[str, choice("direction", "Clean states into the corrupted run, or the reverse")] = "denoise",
    corrupt: Annotated[str, choice("corrupt", "What is heard in place of the clip")] = "silence",
    snr_db: Annotated[float | None, typer.Option(help="Clip over noise, in dB, for --corrupt noise; else 0.")] = None,
    seed: Annotated[int, typer.Option(help="Which noise, or which other clip.")] = 0,
    label_space: Annotated[bool, typer.Option(help="Labels begin with a space, as after a word.")] = True,
    cut: Cut = False,
    device: Device = "cpu",
    device_map: DeviceMap = None,
    dtype: Dtype = "float32",
    kinds: Annotated[
        str | None, choice("kinds", "What is patched at a time, with commas between, or none for a search alone")
    ] = None,
    audio: Annotated[str, choice("audio", "How finely the audio is looked at")] = "whole",
    window_s: Annotated[float, typer.Option(help="Seconds of a window of the audio.")] = 1.0,
    transcript: Annotated[
        str | None,
        typer.Option(help="What DeSTA reads of the clip: filler (its length), clean, placeholder, own, or your words."),
    ] = None,
    transcript_is: Annotated[str | None, choice("transcript_is", "What a transcript counts as")] = None,
    voice_activity: VoiceActivity = False,
    engine: Annotated[str, choice("engine", "How patched runs are computed")] = "auto",
    token_budget: TokenBudget = None,
    part: Part = None,
    conversion: Own = None,
) -> None:
    """Trace when and where a model fuses what it hears with what it reads."""
    asked = asked_about(attribute, question, labels, prefix)
    settings = {
        "form": one_of("form", form),
        "site": one_of("site", site),
        "metric": one_of("metric", metric),
        "predict": one_of("predict", predict),
        "direction": one_of("direction", direction),
        "corruption": corruption(one_of("corrupt", corrupt), snr_db, seed),
        "kinds": None if kinds is None else kinds_named(kinds),
        "audio": one_of("audio", audio),
        "engine": one_of("engine", engine),
    }
    settings |= {"transcript": transcript, "voice_activity": voice_activity}
    settings["transcript_is"] = None if transcript_is is None else one_of("transcript_is", transcript_is)
    settings |= {"window_s": window_s, "token_budget": token_budget, "label_space": label_space}
    samples = read_samples(clips, asked, label)
    ready(out)
    from lalm_lens.experiments.causal_trace import causal_trace

    lens = opened(model, part=part, conversion=conversion, device=device, device_map=device_map, dtype=dtype)
    if cut:
        samples = cut_to_hearing(lens, samples)
    traced = causal_trace(lens, samples, attribute=asked, **settings)
    show(traced, [], out)


def kinds_named(kinds: str) -> list[str]:
    return [] if kinds == "none" else [one_of("kinds", kind.strip()) for kind in kinds.split(",") if kind.strip()]


def corruption(kind: str, snr_db: float | None, seed: int) -> "Corruption":
    from lalm_lens.corrupt import OtherClip, Silence, WhiteNoise

    if kind == "noise":
        return WhiteNoise(snr_db or 0.0, seed)
    if snr_db is not None:
        raise InputError(f"--snr-db is for --corrupt noise, not for --corrupt {kind}.")
    return OtherClip(seed) if kind == "clip" else Silence()


@app.command(epilog=EXAMPLES)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the clips, the table and the pictures.")] = Path("demo_out"),
    clips: Annotated[int, typer.Option(min=2, help="Sound files to make for each attribute.")] = 10,
) -> None:
    """Make sound files and trace the tiny models that ship with lalm_lens on them: one as it was trained, and two
    whose answers are known."""
    ready(out)
    from lalm_lens import demo

    show(*demo.demo(out, clips), out)


def show(trace: "CausalTrace", first: "list[Path]", out: Path) -> None:
    """Write table, pictures and a page into `out`, print the summary and where things lie.

    `first` are pictures that are there already."""
    from lalm_lens.results import to_read
    from lalm_lens.trace_page import write_trace_page

    data = trace.save(out / "trace.parquet")
    pictures = [*first]
    for view in trace.views:
        if view != "tokens":
            pictures.append(out / f"{view}.png")
            trace.plot(view).savefig(pictures[-1], dpi=150)
    for name in trace.frame.attribute.unique() if "tokens" in trace.views else ():
        pictures.append(out / f"tokens_{name}.png")
        trace.only(name).plot("tokens").savefig(pictures[-1], dpi=150)
    page = write_trace_page(trace, data, pictures)
    print(to_read(trace.summary()).to_string(index=False, float_format="{:.3f}".format, na_rep="-"))
    if "moments" in trace.views and len(trace.kept):
        print(trace.moments().to_string(index=False, float_format="{:.3f}".format))
    if not len(trace.kept):
        print("No clip was kept, so the pictures show the excluded ones. docs/causal_tracing.md says what excludes.")
    for path in (data, *pictures, page):
        print(path)
