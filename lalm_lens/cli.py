"""The command `lalm-lens`. What takes seconds to import is imported by the command that needs it."""

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.exceptions import TyperException

from lalm_lens.attributes import ATTRIBUTES, Attribute, attribute_named
from lalm_lens.errors import DataError, InputError, LensError, PromptError

if TYPE_CHECKING:
    from lalm_lens.corrupt import Corruption
    from lalm_lens.datasets import Sample
    from lalm_lens.model import HookedLALM
    from lalm_lens.results import CausalTrace
    from lalm_lens.verify import Verification
    from lalm_lens.weights import Conversion

EXAMPLES = """[bold]Examples[/bold]

lalm-lens trace Qwen/Qwen2-Audio-7B-Instruct clip.wav --attribute emotion --label happy --out traced

lalm-lens demo --out demo_out

lalm-lens trace ./checkpoint ./clips --attribute emotion --out traced --device cuda --dtype bfloat16

lalm-lens verify ./checkpoint

lalm-lens info Qwen/Qwen2-Audio-7B-Instruct

lalm-lens trace ./checkpoint ./clips --question "Is it calm?" --labels yes,no --prefix Answer: --out traced

lalm-lens trace ./checkpoint ./clips --attribute animal --form P2 --corrupt clip --metric logit_difference --out traced

lalm-lens spec ./checkpoint ./clips --attribute animal --out specified

lalm-lens reproduce ./scored ./traced --as checkpoint=Qwen2-Audio-Instruct --out reproduced
"""

# Written out, because importing the types takes seconds; a test compares them.
CHOICES = {
    "form": ("P1", "P2", "P3"),
    "site": ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "post"),
    "kinds": ("layer", "audio_layer", "token", "audio_window", "encoder_window"),
    "metric": ("probability", "log_probability", "logit_difference", "label_probability", "label_score"),
    "predict": ("labels", "vocab"),
    "direction": ("denoise", "noise"),
    "audio": ("whole", "windows", "coarse-to-fine"),
    "corrupt": ("silence", "noise", "clip"),
    "transcript_is": ("audio", "text"),
    "engine": ("auto", "sweep", "hooks"),
}
OWN = "own"  # the name of a user's question, in tables and files

app = typer.Typer(
    name="lalm-lens",
    help="Look inside large audio language models.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, or its id on the Hub.")]
Part = Annotated[
    list[str] | None, typer.Option(help="Where a part of the model is, as llm=FOLDER; repeat it for another part.")
]
Own = Annotated[
    str | None, typer.Option("--conversion", help="Your own conversion, as module:NAME, from here or installed.")
]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")]


def main() -> None:
    """Run the command line; what a user can mend ends in one line and exit code 2."""
    try:
        sys.exit(app(prog_name="lalm-lens", standalone_mode=False))
    except TyperException as error:
        line = usage(error)
    except (LensError, OSError) as error:  # OSError: a full disk, a folder that has gone
        line = str(error)
    if line:
        print(f"lalm-lens: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(2)


def usage(error: TyperException) -> str:
    """What was wrong with the arguments. Nothing, if there were none: then the help has been shown."""
    message, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    end = "" if message.endswith("?") else "."
    return f"{message}{end} See {context.command_path} --help." if message and context else message


def choice(option: str, says: str) -> Any:
    return typer.Option(help=f"{says}: {', '.join(CHOICES[option])}.")


@app.command(epilog=EXAMPLES)
def trace(
    model: Model,
    clips: Annotated[
        Path, typer.Argument(help="A sound file, or a folder with metadata.jsonl (file_name, label on each line).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for trace.parquet, the pictures and report.html.")],
    attribute: Annotated[str | None, typer.Option(help=f"What is asked: {', '.join(ATTRIBUTES)}.")] = None,
    label: Annotated[str | None, typer.Option(help="The true answer, for a single sound file.")] = None,
    question: Annotated[str | None, typer.Option(help="Your own question, in place of --attribute.")] = None,
    labels: Annotated[str | None, typer.Option(help="Its answers, with commas between.")] = None,
    prefix: Annotated[str | None, typer.Option(help="How its answer is forced to begin, as 'The animal is'.")] = None,
    form: Annotated[str, choice("form", "What the user says: nothing, the question, the options too")] = "P3",
    site: Annotated[str, choice("site", "Which state is patched")] = "resid_post",
    metric: Annotated[str, choice("metric", "What is measured of the true label")] = "probability",
    predict: Annotated[str, choice("predict", "Among what an answer is chosen")] = "labels",
    direction: Annotated[str, choice("direction", "Clean states into the corrupted run, or the reverse")] = "denoise",
    corrupt: Annotated[str, choice("corrupt", "What is heard in place of the clip")] = "silence",
    snr_db: Annotated[float | None, typer.Option(help="Clip over noise, in dB, for --corrupt noise; else 0.")] = None,
    seed: Annotated[int, typer.Option(help="Which noise, or which other clip.")] = 0,
    label_space: Annotated[bool, typer.Option(help="Labels begin with a space, as after a word.")] = True,
    cut: Annotated[bool, typer.Option("--cut", help="Cut clips that are longer than the model hears.")] = False,
    device: Device = "cpu",
    device_map: Annotated[str | None, typer.Option(help="auto: spread over GPUs, CPU and disk, as it fits.")] = None,
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
    voice_activity: Annotated[bool, typer.Option("--voice-activity", help="No speech, no transcript.")] = False,
    engine: Annotated[str, choice("engine", "How patched runs are computed")] = "auto",
    token_budget: Annotated[
        int | None, typer.Option(min=1, help="Tokens that share a block: less needs less memory.")
    ] = None,
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
    parts, samples = parts_named(part), read_samples(clips, asked, label)
    ready(out)
    import torch

    from lalm_lens.experiments.causal_trace import causal_trace
    from lalm_lens.loading import from_pretrained

    how = {"parts": parts, "conversion": conversion_named(conversion)}
    lens = from_pretrained(model, device=device, device_map=device_map, dtype=getattr(torch, dtype), **how)
    if cut:
        samples = cut_to_hearing(lens, samples)
    traced = causal_trace(lens, samples, attribute=asked, **settings)
    show(traced, [], out)


def parts_named(part: list[str] | None) -> dict[str, str]:
    """The parts of a model, as they are given: name=path."""
    parts = {name: path for name, _, path in (each.partition("=") for each in part or [])}
    if not all(name and path for name, path in parts.items()) or len(parts) < len(part or []):
        raise InputError(f"--part names each part once and where it is, as llm=FOLDER; got {', '.join(part or [])}.")
    return parts


def conversion_named(named: str | None) -> "Conversion | None":
    """A `Conversion` of the user's own, which is found as Python finds modules, and in this folder first."""
    if named is None:
        return None
    from lalm_lens.weights import Conversion

    module, _, name = named.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise InputError(f"--conversion {named} cannot be imported ({error}). Give it as module:NAME.") from error
    if not isinstance(found, Conversion):
        raise InputError(f"--conversion names a Conversion as module:NAME, as my_model:MINE; {named} is none.")
    return found


def kinds_named(kinds: str) -> list[str]:
    return [] if kinds == "none" else [one_of("kinds", kind.strip()) for kind in kinds.split(",") if kind.strip()]


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


@app.command("verify", epilog=EXAMPLES)
def verify_command(
    model: Model,
    clip: Annotated[list[Path] | None, typer.Option(help="Your own sound file; repeat it for a batch.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    golden: Annotated[
        Path | None, typer.Option(help="Compare with what the original computed, stored in this folder, instead.")
    ] = None,
    part: Part = None,
    conversion: Own = None,
) -> None:
    """Run a checkpoint here and in transformers, and compare logits and every block. Exit code 1 if they differ."""
    parts = parts_named(part)
    if golden is not None:
        if clip or dtype != "float32":
            raise InputError("A golden set has its own clips, and is of float32: leave out --clip and --dtype.")
        from lalm_lens.golden import verify_golden

        own = conversion_named(conversion)
        report(verify_golden(model, golden, device=device, parts=parts, conversion=own))
    if parts:
        raise InputError("transformers has no class for a model of parts: compare with --golden.")
    from lalm_lens.audio import read_audio

    waveforms = [read_audio(path) for path in clip or []] or None
    import torch

    from lalm_lens.verify import verify

    own = conversion_named(conversion)
    report(verify(model, dtype=getattr(torch, dtype), device=device, waveforms=waveforms, conversion=own))


def report(verification: "Verification") -> NoReturn:
    print(verification)
    raise typer.Exit(0 if verification.passed else 1)


@app.command("info", epilog=EXAMPLES)
def info_command(model: Model, part: Part = None, conversion: Own = None) -> None:
    """Describe a checkpoint from its config.json: sizes, memory, what it hears, hook points. Reads no weights."""
    from lalm_lens.info import info

    print(info(model, parts=parts_named(part), conversion=conversion_named(conversion)))


@app.command("spec", epilog=EXAMPLES)
def spec_command(
    model: Model,
    clips: Annotated[Path, typer.Argument(help="A folder with metadata.jsonl (file_name, label on each line).")],
    attribute: Annotated[str, typer.Option(help=f"What is asked: {', '.join(ATTRIBUTES)}.")],
    out: Annotated[Path, typer.Option(help="Folder for specification.parquet, .csv and .png.")],
    form: Annotated[str, choice("form", "What the user says in the prompts that are traced")] = "P3",
    snr_db: Annotated[float, typer.Option(help="Clip over noise, in dB, where noise is what is heard instead.")] = 0.0,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples of the clips.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the noise, of the choice of other clips, and of the resamples.")] = 0,
    device: Device = "cpu",
    device_map: Annotated[str | None, typer.Option(help="auto: spread over GPUs, CPU and disk, as it fits.")] = None,
    dtype: Dtype = "float32",
    token_budget: Annotated[
        int | None, typer.Option(min=1, help="Tokens that share a block: less needs less memory.")
    ] = None,
    part: Part = None,
    conversion: Own = None,
) -> None:
    """Do the papers' claims survive what they leave open? Every combination of those choices, and one picture."""
    from lalm_lens.datasets import read_folder

    asked, form = attribute_named(attribute), one_of("form", form)
    parts, samples = parts_named(part), read_folder(clips)
    ready(out)
    import torch

    from lalm_lens.corrupt import OtherClip, Silence, WhiteNoise
    from lalm_lens.experiments.specification import specification_curve
    from lalm_lens.loading import from_pretrained

    how = {"parts": parts, "conversion": conversion_named(conversion)}
    lens = from_pretrained(model, device=device, device_map=device_map, dtype=getattr(torch, dtype), **how)
    corruptions = (Silence(), WhiteNoise(snr_db, seed), OtherClip(seed))
    settings = {"form": form, "corruptions": corruptions, "token_budget": token_budget}
    found = specification_curve(lens, samples, attribute=asked, **settings, n_resamples=resamples, seed=seed)
    print(found)
    for reason, n_rows in found.reasons().itertuples(index=False):
        print(f"not measured, {n_rows} rows: {reason}")
    print(found.save(out / "specification.parquet"))
    found.frame.to_csv(out / "specification.csv", index=False)
    found.plot().savefig(out / "specification.png", dpi=130)
    for name in ("specification.csv", "specification.png"):
        print(out / name)


@app.command("reproduce", epilog=EXAMPLES)
def reproduce_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders with result tables (.parquet), in any depth.")],
    named: Annotated[
        list[str] | None,
        typer.Option("--as", help="Which published model a table's model is, as FOLDER=Qwen2-Audio-Instruct; repeat."),
    ] = None,
    claims: Annotated[
        bool, typer.Option("--claims", help="Evaluate the papers' claims on any model; this reproduces nothing.")
    ] = False,
    layer_base: Annotated[
        int | None, typer.Option(help="Number of the first layer; else 1 for AudioLens, 0 for causal tracing.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples of the clips.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the table as Parquet, CSV and Markdown.")] = None,
) -> None:
    """Compare result tables with the numbers and claims of AudioLens and of Causal Tracing."""
    names = names_given(named or [])
    if claims and names:
        raise InputError("--claims evaluates every model as what it is: leave out --as.")
    if out is not None:
        writable(out)
    from lalm_lens.reproduce import evaluate_claims, reproduce, show_reproduction

    how = {"layer_base": layer_base, "n_resamples": resamples, "seed": seed}
    found = evaluate_claims(folders, **how) if claims else reproduce(folders, named=names, **how)
    show_reproduction(found, out)


def names_given(named: list[str]) -> dict[str, str]:
    """name=published, of each."""
    pairs = {name: its for name, _, its in (each.rpartition("=") for each in named)}
    if not all(name and its for name, its in pairs.items()) or len(pairs) < len(named):
        raise InputError(f"--as names each model once, as FOLDER=Qwen2-Audio-Instruct; got {', '.join(named)}.")
    return pairs


def asked_about(attribute: str | None, question: str | None, labels: str | None, prefix: str | None) -> Attribute:
    """The attribute of that name, or the user's own question."""
    own = (question, labels, prefix)
    if attribute is not None:
        if own != (None, None, None):
            raise PromptError("--question, --labels and --prefix stand in place of --attribute: give one or the other.")
        return attribute_named(attribute)
    if labels is None or prefix is None:
        raise PromptError(
            f"Say what is asked: --attribute {'|'.join(ATTRIBUTES)}, or your own --question with --labels and --prefix."
        )
    words = tuple(label.strip() for label in labels.split(",")) if labels.strip() else ()
    return Attribute(OWN, question or "", words, prefix)


def one_of(option: str, value: str) -> Any:
    """`value`, as the literal type that it is; raises `InputError` if it is no choice."""
    if value not in CHOICES[option]:
        raise InputError(f"--{option.replace('_', '-')} is {value!r}. Choose one of {', '.join(CHOICES[option])}.")
    return value


def corruption(kind: str, snr_db: float | None, seed: int) -> "Corruption":
    from lalm_lens.corrupt import OtherClip, Silence, WhiteNoise

    if kind == "noise":
        return WhiteNoise(snr_db or 0.0, seed)
    if snr_db is not None:
        raise InputError(f"--snr-db is for --corrupt noise, not for --corrupt {kind}.")
    return OtherClip(seed) if kind == "clip" else Silence()


def cut_to_hearing(lens: "HookedLALM", samples: "list[Sample]") -> "list[Sample]":
    """The clips as far as the model hears them; a line for each that is cut."""
    from lalm_lens.audio import RATE_HZ
    from lalm_lens.datasets import cut_to
    from lalm_lens.experiments.causal_trace import processor_of

    heard = cut_to(samples, processor_of(lens).n_samples)
    for before, after in zip(samples, heard, strict=True):
        if len(after.waveform) < len(before.waveform):
            lengths_s = [len(each.waveform) / RATE_HZ for each in (before, after)]
            print(
                f"{before.name} is cut from {lengths_s[0]:.2f} s to {lengths_s[1]:.2f} s, which is all the model hears."
            )
    return heard


def read_samples(clips: Path, attribute: Attribute, label: str | None) -> "list[Sample]":
    from lalm_lens.datasets import read_folder, read_sample

    if not clips.exists():
        raise DataError(f"There is nothing at {clips}. Give a sound file, or a folder with metadata.jsonl.")
    if clips.is_dir():
        if label is not None:
            raise DataError("--label is for a single sound file; a folder has its labels in metadata.jsonl.")
        return read_folder(clips)
    if label is None:
        raise DataError(f"Say what is true of {clips} with --label: {', '.join(attribute.labels)}.")
    return [read_sample(clips, label)]


def ready(out: Path) -> None:
    """Find out before the long work whether its result can be drawn and kept; make nothing yet."""
    from lalm_lens.results import plots_module

    plots_module()
    writable(out)


def writable(out: Path) -> None:
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DataError(f"Nothing can be written to {out}: {there} is no folder that you may write to.")


def show(trace: "CausalTrace", first: "list[Path]", out: Path) -> None:
    """Write table, pictures and report into `out`, print the summary and where things lie.

    `first` are pictures that are there already."""
    from lalm_lens.report import write_report
    from lalm_lens.results import to_read

    data = trace.save(out / "trace.parquet")
    pictures = [*first]
    for view in trace.views:
        if view != "tokens":
            pictures.append(out / f"{view}.png")
            trace.plot(view).savefig(pictures[-1], dpi=150)
    for name in trace.frame.attribute.unique() if "tokens" in trace.views else ():
        pictures.append(out / f"tokens_{name}.png")
        trace.only(name).plot("tokens").savefig(pictures[-1], dpi=150)
    report = write_report(trace, data, pictures)
    print(to_read(trace.summary()).to_string(index=False, float_format="{:.3f}".format, na_rep="-"))
    if "moments" in trace.views and len(trace.kept):
        print(trace.moments().to_string(index=False, float_format="{:.3f}".format))
    if not len(trace.kept):
        print("No clip was kept, so the pictures show the excluded ones. docs/causal_tracing.md says what excludes.")
    for path in (data, *pictures, report):
        print(path)
