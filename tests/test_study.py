"""A study is resumed wherever it was stopped, and ends as if it never had been."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from pyarrow.parquet import read_metadata
from safetensors import SafetensorError
from safetensors.torch import load_file

from lalm_lens import cli, runner
from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.commands.opening import conversion_named
from lalm_lens.conflict import Conflict, make_conflict
from lalm_lens.corrupt import OtherClip, Silence, WhiteNoise
from lalm_lens.datasets import read_folder
from lalm_lens.discovery import Experiment, experiment_named, experiments, value_of
from lalm_lens.errors import DataError, InputError, LensError, PromptError
from lalm_lens.experiments.activations import Activations
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.experiments.suppression import suppression
from lalm_lens.experiments.text_dominance import text_dominance
from lalm_lens.planning import Planned, planned
from lalm_lens.results import CausalTrace
from lalm_lens.runner import Models, run_local, table_of, unfinished, write_list
from lalm_lens.study import Study
from lalm_lens.study_results import compare_models, load_results
from lalm_lens.units import ABOUT, Opened, Unit, claimed, fingerprint

pytestmark = pytest.mark.numbers

STUDY = f"""
prompts = ["P2", "P3"]

[[model]]
path = "{TINY_LALM}"

[[dataset]]
folder = "clips"
attributes = ["gender"]

[[experiment]]
name = "information_score"
shard = 1
prompts = ["P3"]

[[experiment]]
name = "causal_trace"
shard = 2
kinds = ["layer"]
corruption = {{ type = "OtherClip", seed = 1 }}
"""
# Children of a process that has imported what they need, and has no threads: a lock that one holds would stay held.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        "lalm_lens.cli",
        "lalm_lens.runner",
        "lalm_lens.experiments.causal_trace",
        "lalm_lens.experiments.information_score",
    ]
)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A study of six clips that nobody has run."""
    folder = tmp_path_factory.mktemp("study")
    write_clips(folder / "clips", "gender", 6, seed=5, duration_s=0.5)
    (folder / "study.toml").write_text(STUDY)
    return folder / "study.toml"


def done(plan: Planned, out: Path) -> Path:
    """The study, run in a child process: the same it would be in any other."""
    write_list(plan, out)
    child = FORK.Process(target=finish_all, args=(plan, out))
    child.start()
    child.join()
    assert child.exitcode == 0
    return out


def finish_all(plan: Planned, out: Path) -> None:
    torch.set_num_threads(1)
    assert not [its.failure for its in run_local(unfinished(plan.units, out), out) if its.failure]


@pytest.fixture(scope="module")
def plan(study) -> Planned:
    return planned(Study.read(study))


@pytest.fixture(scope="module")
def undisturbed(plan, study) -> Path:
    return done(plan, study.parent / "undisturbed")


def assert_same(out: Path, expected: Path) -> None:
    """Bit for bit, the order of rows too; and nothing else lies there."""
    ours, theirs = load_results(out), load_results(expected)
    assert ours.n_unfinished == 0
    assert ours.experiments == ["information_score", "causal_trace"]
    for name in ours.experiments:
        pd.testing.assert_frame_equal(ours.table(name).frame, theirs.table(name).frame, check_exact=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in expected.iterdir())
    assert not any((out / ".claims").iterdir())


def kill_at_random(plan: Planned, out: Path, n_kills: int, seed: int) -> int:
    """Kill runner after runner, each once it has finished something; returns how many were killed at their work."""
    drawn, n_killed = random.Random(seed), 0
    write_list(plan, out)
    for _ in range(n_kills):
        before = len(unfinished(plan.units, out))
        child = FORK.Process(target=finish_all, args=(plan, out))
        child.start()
        while child.is_alive() and len(unfinished(plan.units, out)) == before:
            time.sleep(0.005)
        time.sleep(drawn.uniform(0, 0.15))
        n_killed += child.is_alive()
        child.kill()
        child.join()
    return n_killed


def test_a_study_that_is_killed_three_times_ends_as_if_it_had_not_been(plan, undisturbed, tmp_path):
    assert kill_at_random(plan, tmp_path, 3, seed=0) == 3
    assert_same(done(plan, tmp_path), undisturbed)


@pytest.mark.stress
def test_a_study_that_is_killed_twenty_times_ends_as_if_it_had_not_been(plan, undisturbed, tmp_path):
    n_killed = 0
    for n in range(5):  # of so few units, four kills leave something to do
        out = tmp_path / str(n)
        n_killed += kill_at_random(plan, out, 4, seed=n + 1)
        assert_same(done(plan, out), undisturbed)
    assert n_killed == 20


def tell(plan: Planned, out: Path, told: Queue) -> None:
    torch.set_num_threads(1)
    found = list(run_local(plan.units, out))
    told.put((len(found), sum(not outcome.was_there for outcome in found)))


def test_two_runners_share_a_folder(plan, undisturbed, tmp_path):
    write_list(plan, tmp_path)
    told = FORK.Queue()
    children = [FORK.Process(target=tell, args=(plan, tmp_path, told)) for _ in range(2)]
    for child in children:
        child.start()
    (seen, ran), (also_seen, also_ran) = told.get(timeout=120), told.get(timeout=120)
    for child in children:
        child.join()
    assert seen == also_seen == len(plan.units) == ran + also_ran  # nothing is run twice
    assert_same(tmp_path, undisturbed)


def hold(unit: Unit, out: Path, ready: Event) -> None:
    with claimed(unit, out) as is_mine:
        assert is_mine
        ready.set()
        time.sleep(60)


def test_a_claim_is_of_one_process_and_ends_with_it(plan, tmp_path):
    unit, ready = plan.units[0], FORK.Event()
    child = FORK.Process(target=hold, args=(unit, tmp_path, ready))
    child.start()
    assert ready.wait(30)
    with claimed(unit, tmp_path) as is_mine:
        assert not is_mine
    child.kill()
    child.join()
    with claimed(unit, tmp_path) as is_mine:
        assert is_mine


def test_a_claim_on_what_is_finished_is_forgotten(plan, undisturbed, tmp_path):
    """Of a runner that was killed between its last two steps."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    for name in (plan.units[0].hash, "another"):
        (tmp_path / ".claims" / name).touch()
    write_list(plan, tmp_path)
    assert [path.name for path in (tmp_path / ".claims").iterdir()] == ["another"]


def fill_the_disk(plan: Planned, out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as if no more fitted
    try:
        finish_all(plan, out)
    except OSError:
        os._exit(7)


def test_a_full_disk_is_an_error_that_loses_nothing(plan, undisturbed, tmp_path):
    write_list(plan, tmp_path)
    n = len(plan.units) // 2
    list(run_local(plan.units[:n], tmp_path))
    child = FORK.Process(target=fill_the_disk, args=(plan, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 7
    assert len(unfinished(plan.units, tmp_path)) == len(plan.units) - n
    assert not list(tmp_path.glob(".*unfinished"))
    assert_same(done(plan, tmp_path), undisturbed)


def command(study: Path, out: Path, log: Path) -> None:
    torch.set_num_threads(1)
    sys.argv = ["lalm-lens", "run", str(study), "--out", str(out)]
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        cli.main()


class Interrupted:
    """Ctrl-C while it is taken out of memory, where Python drops what is raised."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def interrupted_command(study: Path, out: Path, log: Path) -> None:
    """With an interrupt behind the first unit."""
    finish = runner.finish

    def and_interrupted(*args):
        outcome = finish(*args)
        Interrupted()
        return outcome

    runner.finish = and_interrupted
    command(study, out, log)


def test_the_command_goes_on_where_it_was_interrupted(study, plan, undisturbed, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    child = FORK.Process(target=interrupted_command, args=(study, out, log))
    child.start()
    child.join()
    assert child.exitcode == 130
    assert "The same command goes on." in log.read_text()
    left = len(unfinished(plan.units, out))
    assert left == len(plan.units) - 1
    child = FORK.Process(target=command, args=(study, out, log))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert f"{len(plan.units) - left} of them finished" in log.read_text()
    assert_same(out, undisturbed)


def test_rows_are_those_of_the_function_on_the_same_clips(plan, undisturbed, study, tiny_lalm):
    samples = read_folder(study.parent / "clips")
    how = {"attribute": "gender", "form": "P3", "kinds": ("layer",), "progress": False}
    others = OtherClip(1, among=tuple(samples))
    expected = [
        causal_trace(tiny_lalm, samples[n : n + 2], corruption=others, **how).frame for n in range(0, len(samples), 2)
    ]
    found = load_results(undisturbed).table("causal_trace", form="P3")
    pd.testing.assert_frame_equal(found.frame, CausalTrace.concat(expected).frame, check_exact=True)
    whole = causal_trace(tiny_lalm, samples, corruption=OtherClip(1), **how).frame
    assert (whole.corruption == found.frame.corruption).all()  # of all clips, not of a shard's


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing.wav": lambda path: None,
    "text.wav": lambda path: path.write_text("no sound"),
    "empty.wav": lambda path: soundfile.write(path, np.zeros(0), 16_000),
    "silent.wav": lambda path: soundfile.write(path, np.zeros(16_000), 16_000),
    "short.wav": lambda path: soundfile.write(path, np.ones(100), 16_000),
    "constant.wav": lambda path: soundfile.write(path, np.full(16_000, 0.3), 16_000),
    "long.wav": lambda path: soundfile.write(path, 0.1 * np.sin(np.arange(16_000 * 40)), 16_000),
    "nan.wav": lambda path: soundfile.write(path, np.full(16_000, np.nan), 16_000, "FLOAT"),
    "cut.wav": lambda path: (soundfile.write(path, np.ones(16_000) / 2, 16_000), os.truncate(path, 9000)),
    "folder.wav": lambda path: path.mkdir(),
}
REASONS = {
    "missing.wav": "no audio file",
    "text.wav": "not readable audio",
    "empty.wav": "no samples",
    "silent.wav": "digital silence",
    "constant.wav": "digital silence",
    "short.wav": "too short",
    "long.wav": "too long",
    "nan.wav": "NaN",
    "cut.wav": "ends after",
    "folder.wav": "no audio file",
    "odd.wav": "none of the options of gender",
}


ROWS = {
    '{"file_name": "male_000.wav"}': ("male_000.wav", "needs the keys file_name and label"),
    '{"file_name": "none.wav", "label": null}': ("none.wav", "needs the keys file_name and label"),
    '{"file_name": "three.wav", "label": 3}': ("three.wav", "file_name and label must be text"),
    '{"file_name": "", "label": "male"}': ("metadata.jsonl, line", "needs the keys file_name and label"),
    '{"file_name": ["a"], "label": "male"}': ("metadata.jsonl, line", "file_name and label must be text"),
    '{"file_name": "/etc/a.wav", "label": "male"}': ("/etc/a.wav", "inside the folder"),
    '{"file_name": "../a.wav", "label": "male"}': ("../a.wav", "inside the folder"),
    '{"file_name": "told.wav", "label": "male", "transcript": 3}': ("told.wav", "transcript must be text"),
    '{"file_name": "asked.wav", "label": "male", "question": ["?"]}': ("asked.wav", "question must be text"),
    '{"file_name": "a.wav", "label"': ("metadata.jsonl, line", "is not JSON"),
    '"a.wav"': ("metadata.jsonl, line", "needs the keys file_name and label"),
    "[" * 100_000: ("metadata.jsonl, line", "is not JSON"),
    '{"file_name": "\\ud800.wav", "label": "male"}': ("metadata.jsonl, line", "is not UTF-8"),
    '{"file_name": "\udce4.wav", "label": "male"}': ("metadata.jsonl, line", "is not UTF-8"),
    f'{{"file_name": "{"a" * 5000}.wav", "label": "male"}}': ("a" * 5000 + ".wav", "no audio file"),
    '{"file_name": "a\\u0000.wav", "label": "male"}': ("a\0.wav", "no audio file"),
}


def test_broken_clips_are_listed_and_change_nothing_of_the_others(study, undisturbed, tmp_path):
    shutil.copytree(study.parent / "clips", tmp_path / "clips")
    listed = (tmp_path / "clips" / "metadata.jsonl").read_text().splitlines()
    listed += [json.dumps({"file_name": name, "label": label}) for name, label in (("both.wav", "male"),) * 2]
    listed += [listed[0]]
    for n, (name, make) in enumerate(BROKEN.items()):
        make(tmp_path / "clips" / name)
        listed.insert(2 * n % len(listed), f'{{"file_name": "{name}", "label": "male"}}')
    for n, row in enumerate(ROWS):
        listed.insert(3 * n % len(listed), row)
    for name in ("odd.wav", "both.wav"):
        shutil.copy(study.parent / "clips" / "male_000.wav", tmp_path / "clips" / name)
    listed += ['{"file_name": "odd.wav", "label": "neither"}', '{"file_name": "both.wav", "label": "female"}']
    text = "\n".join(listed).encode(errors="surrogateescape")
    (tmp_path / "clips" / "metadata.jsonl").write_bytes(text)
    path = shutil.copy(study, tmp_path)
    out = done(planned(Study.read(path)), tmp_path / "undisturbed")
    assert_same(out, undisturbed)
    results = load_results(out)
    assert not results.failed
    found = [(row["sample"], row["reason"]) for row in results.excluded.to_dict("records")]
    for name, words in REASONS.items():
        (why,) = [why for sample, why in found if sample == name]
        assert words in why
        assert name in why
    for row, (name, words) in ROWS.items():
        assert [why for sample, why in found if sample.startswith(name) and words in why], row
    reasons = [why for _, why in found]
    assert "male_000.wav is listed 2 times, labelled male. Name every clip once. One is kept." in reasons
    assert "both.wav is listed 3 times, labelled female, male. Name every clip once." in reasons
    assert len({why for sample, why in found if sample.startswith("metadata.jsonl, line ")}) == 7


def drawn(folder: Path, dataset: str) -> dict[str, str | None]:
    """The clips that a study has about gender, and who speaks."""
    (folder / "drawn.toml").write_text(STUDY.replace('folder = "clips"', dataset))
    units = planned(Study.read(folder / "drawn.toml")).units
    return {its.clip.name: its.clip.speaker for unit in units for its in unit.clips}


def test_what_is_drawn_is_drawn_of_good_clips(study, tmp_path):
    whole, broken = (shutil.copytree(study.parent / "clips", tmp_path / name / "clips") for name in ("a", "b"))
    rows = [json.loads(line) for line in (whole / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"speaker": n // 2 % 2} for n, row in enumerate(rows)]
    (whole / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    BROKEN["cut.wav"](broken / "cut.wav")
    bad = [{"file_name": "odd.wav", "label": "neither"}, {"file_name": "cut.wav", "label": "male"}, {"label": "male"}]
    (broken / "metadata.jsonl").write_text("\n".join(map(json.dumps, bad + rows)))
    for seed in range(3):
        how = f'folder = "clips"\nseed = {seed}\nn_clips = 4'
        found = drawn(tmp_path / "a", how)
        assert len(found) == 4
        assert drawn(tmp_path / "b", how) == found
    how = 'folder = "clips"\nn_clips = 3\nby_speaker = true'
    found, others = drawn(tmp_path / "a", how), {row["file_name"]: str(row["speaker"]) for row in rows}
    assert len(set(found.values())) == 1
    assert found.items() == {pair for pair in others.items() if pair[1] in found.values()}
    with pytest.raises(DataError, match=r"Nothing of .* can be run\. Who speaks in .* is not known"):
        drawn(study.parent, how)


def test_a_dataset_without_a_good_clip_stops_no_other(study, undisturbed, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    shutil.copytree(study.parent / "clips", folder / "clips")
    (folder / "bad").mkdir()
    (folder / "bad" / "metadata.jsonl").write_text('{"label": "male"}\n{"file_name": "gone.wav", "label": "male"}')
    for name, duration_s in (("long", 40), ("one", 0.5)):  # the model hears 2 s, and one clip has no other
        (folder / name).mkdir()
        soundfile.write(folder / name / "a.wav", np.sin(np.arange(int(16_000 * duration_s))) / 2, 16_000)
        (folder / name / "metadata.jsonl").write_text('{"file_name": "a.wav", "label": "male"}')
    where = [f'folder = "{name}"' for name in ("nowhere", "bad", "long", "one")] + ['hub = "nowhere/at_all"']
    tables = "".join(f'[[dataset]]\n{its}\nattributes = ["gender"]\n\n' for its in where)
    (folder / "study.toml").write_text(STUDY.replace("[[dataset]]", f"{tables}[[dataset]]"))
    plan = planned(Study.read(folder / "study.toml", folder / "out"))
    expected = {
        "nowhere, gender": "no metadata.jsonl",
        "nowhere/at_all, gender": "nowhere/at_all cannot be loaded",
        "bad, gender": "No clip of bad can be asked about gender: .*line 1 needs the keys",
        f"{TINY_LALM}, long, gender": "No clip of long .* is too long",
        f"causal_trace, {TINY_LALM}, one, gender": "a.wav",
    }
    assert set(plan.failed) == set(expected)
    for what, words in expected.items():
        assert re.search(words, plan.failed[what])
    of = {name: {unit.hash for unit in plan.units if unit.dataset == name} for name in ("clips", "one")}
    assert of["clips"] == {path.stem[-32:] for path in load_results(undisturbed).units.path}
    assert len(of["one"]) == 1
    assert {"gone.wav", "metadata.jsonl, line 1", "a.wav"} == set(plan.excluded["sample"])
    monkeypatch.setattr(sys, "argv", ["lalm-lens", "run", str(folder / "study.toml"), "--out", str(folder / "out")])
    shutil.copytree(undisturbed, folder / "out")
    (folder / "out" / "study.study.json").unlink()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said, results = capsys.readouterr().out, load_results(folder / "out")
    assert results.failed == plan.failed
    assert results.n_unfinished == 0
    for what, why in plan.failed.items():
        assert said.count(f"Left out, {what}: {why}") == 2
        assert f"{what} left out" in repr(results)


def test_a_clip_that_an_experiment_refuses_is_left_out_of_its_unit(plan, tiny_lalm):
    unit = plan.units[-1]
    first = unit.clips[0].clip.name

    def refuses(model, samples, **how) -> CausalTrace:
        if first in [sample.name for sample in samples]:
            raise InputError(f"{first} is not finite.")
        return causal_trace(model, samples, **how)

    changed = type(unit)(**{**vars_of(unit), "experiment": Experiment("causal_trace", refuses, CausalTrace)})
    table, excluded = table_of(changed, tiny_lalm)
    assert excluded == {first: f"{first} is not finite."}
    assert list(table.frame["sample"].unique()) == [unit.clips[1].clip.name]


def test_what_goes_wrong_in_a_unit_stops_no_other(study, plan, tmp_path, monkeypatch):
    shutil.copytree(study.parent / "clips", tmp_path / "clips")
    units = planned(Study.read(shutil.copy(study, tmp_path))).units[:4]
    (tmp_path / "clips" / units[1].clips[0].clip.name).unlink()  # since it was looked at
    run = Experiment.run

    def full(experiment, model, samples, **how):
        if samples[0].name == units[2].clips[0].clip.name:
            raise torch.OutOfMemoryError("The memory is full.\nIn detail: ...")
        return run(experiment, model, samples, **how)

    monkeypatch.setattr(Experiment, "run", full)
    failures = [outcome.failure for outcome in run_local(units, tmp_path / "out")]
    assert [failure is None for failure in failures] == [True, False, False, True]
    assert "No such file" in (failures[1] or "")
    assert re.fullmatch(r"OutOfMemoryError in test_study\.py, line \d+: The memory is full\.", failures[2] or "")
    assert len(unfinished(units, tmp_path / "out")) == 2


def vars_of(unit) -> dict:
    return {name: getattr(unit, name) for name in unit.__dataclass_fields__}


def test_a_unit_is_known_by_all_that_decides_it(study, plan, tmp_path):
    def hashes(change: Callable[[str], str], folder: Path = study.parent) -> list[str]:
        (folder / "other.toml").write_text(change(STUDY))
        return [unit.hash for unit in planned(Study.read(folder / "other.toml")).units]

    whole = [unit.hash for unit in plan.units]
    assert len(set(whole)) == len(whole) == 12
    assert hashes(str) == whole
    assert not set(hashes(lambda text: text.replace("[[data", 'dtype = "bfloat16"\n[[data'))) & set(whole)
    assert hashes(lambda text: text.replace("seed = 1", "seed = 2"))[:6] == whole[:6]
    assert not set(hashes(lambda text: text.replace("seed = 1", "seed = 2"))[6:]) & set(whole)
    shutil.copytree(study.parent / "clips", tmp_path / "clips")
    path = tmp_path / "clips" / "male_000.wav"
    samples, rate_hz = soundfile.read(path)
    soundfile.write(path, samples * 0.5, rate_hz, "PCM_16")
    assert sum(a != b for a, b in zip(hashes(str, tmp_path), whole, strict=True)) >= 3  # its own, and where it is heard


def test_a_fingerprint_is_of_what_a_model_is_read_from(tmp_path):
    model = shutil.copytree(TINY_LALM, tmp_path / "model")
    opened = Opened(str(model), "float32")
    before = fingerprint(opened)
    assert before == fingerprint(Opened(str(TINY_LALM), "float32"))
    (model / "README.md").write_text("another")
    assert fingerprint(opened) == before
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert fingerprint(opened) != before


def test_a_conversion_of_ones_own_is_known_by_its_code(study, tmp_path, monkeypatch):
    own = tmp_path / "mine.py"
    source = "from dataclasses import replace\nfrom conversions.qwen2_audio import QWEN2_AUDIO\n"
    source += "def config(hf): return QWEN2_AUDIO.config(hf)\nMINE = replace(QWEN2_AUDIO, config=config)\n"
    monkeypatch.syspath_prepend(tmp_path)
    (study.parent / "own.toml").write_text(STUDY.replace("[[dataset]]", 'conversion = "mine:MINE"\n[[dataset]]'))
    found = []
    for code in (source, source, source + "# another\n"):
        own.write_text(code)
        sys.modules.pop("mine", None)
        found.append(planned(Study.read(study.parent / "own.toml"), conversion_named).units[0])
    first, again, changed = (unit.hash for unit in found)
    assert first == again != changed
    assert found[0].fingerprint == found[2].fingerprint


def test_a_dry_run_counts_and_measures(study, undisturbed, plan, tmp_path, monkeypatch, capsys):
    for out, words in ((tmp_path, "0 of them finished"), (undisturbed, "12 of them finished")):
        monkeypatch.setattr(sys, "argv", ["lalm-lens", "run", str(study), "--out", str(out), "--dry-run"])
        with pytest.raises(SystemExit):
            cli.main()
        said = capsys.readouterr().out
        assert words in said
        assert re.search(r"gender, 6 clips:\n +label +n +share\n *female +3 +0\.5\n +male +3 +0\.5\n", said)
        assert out == undisturbed or "P2, corruption=OtherClip(seed=1), kinds=('layer',): 6 clips, " in said
    assert not list(tmp_path.iterdir())
    assert "Still to do: about 00:00:00." in said


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ("shard = 2", "shards = 2", InputError, "no setting 'shards'"),
        ('kinds = ["layer"]', 'kinds = ["layers"]', InputError, "kinds of causal_trace is one of layer, audio_layer"),
        ('kinds = ["layer"]', "window_s = true", InputError, "window_s of causal_trace is True"),
        ('"causal_trace"', '"causal_tracing"', InputError, "no experiment 'causal_tracing'"),
        ("seed = 1", "sed = 1", InputError, "Did you mean seed"),
        ('"OtherClip"', '"Other"', InputError, 'it may be {type = "Silence"}'),
        ('["P2", "P3"]', '["P4"]', InputError, "one of P1, P2, P3"),
        ('["gender"]', '["age"]', PromptError, "no attribute 'age'"),
        ("[[model]]", "[model]", InputError, "double brackets"),
        ('folder = "clips"', "", InputError, "one of a folder"),
        ('folder = "clips"', 'folder = "nowhere"', DataError, "no metadata.jsonl"),
        ('folder = "clips"', 'folder = "clips"\nn_clips = 0', InputError, "n_clips of a dataset is 0"),
        ('folder = "clips"', 'folder = "clips"\nby_speaker = true', InputError, "give n_clips too"),
        (
            '["gender"]',
            '["animal"]',
            DataError,
            "Nothing of .* can be run.*labelled 'male', which is none of the options",
        ),
        ("prompts", "prompts =", InputError, "cannot be read as a study"),
        ("shard = 2", 'models = ["other"]', InputError, "No .*model.* has the path 'other'"),
        ("shard = 2", 'form = "P3"', InputError, "no setting 'form'"),
        ('folder = "clips"', 'folder = "clips"\nseed = -1', InputError, "0 or more; got -1"),
        ('folder = "clips"', 'folder = "clips"\nmade = -1', InputError, "made is how many clips"),
        ('folder = "clips"', 'folder = "clips"\nsplit = "dev"', InputError, "belong to a dataset of the hub"),
        (
            "[[dataset]]",
            '[[dataset]]\nfolder = "clips"\nattributes = ["gender"]\n[[dataset]]',
            InputError,
            "Two datasets",
        ),
        ("path =", "name =", InputError, "model needs path"),
        ('["gender"]', '"gender"', InputError, "must be a list of str"),
        ("shard = 1", "conflict = true", InputError, "write what make_conflict takes"),
        ("shard = 1", 'conflict = { framing = "none" }', InputError, "no framing 'none'"),
        ("shard = 1", 'conflict = { orders = "none" }', InputError, "Did you mean order"),
        ("shard = 2", "conflict = {}", InputError, "not by other clips"),
    ],
)
def test_a_study_that_cannot_be_run_says_why(study, old, new, error, words):
    path = study.parent / "wrong.toml"
    path.write_text(STUDY.replace(old, new))
    with pytest.raises(error, match="(?s)" + words.replace("{", "\\{")) as raised:
        planned(Study.read(path))
    assert isinstance(raised.value, LensError)


def test_experiments_are_found():
    found = experiments()
    assert {"causal_trace", "information_score", "attention_knockout", "enrich", "probe"} <= set(found)
    assert not {"circuits", "steer", "patchscope", "neuron_scores"} & set(found)  # they need more than clips
    assert found["causal_trace"].table.BY_CLIP
    assert not found["enrich"].table.BY_CLIP


def test_settings_are_what_the_function_takes():
    trace = experiment_named("causal_trace")
    assert trace.settings({})["corruption"] == Silence()
    assert trace.settings({"corruption": {"type": "OtherClip", "seed": 3}})["corruption"] == OtherClip(3)
    cut = {"type": "Knockout", "layers": "all", "queries": [-1], "keys": "audio"}
    (knockout,) = experiment_named("information_score").settings({"knockouts": [cut]}, n_layers=5)["knockouts"]
    assert knockout.layers == (0, 1, 2, 3, 4)
    noise = trace.settings({"corruption": {"type": "WhiteNoise", "snr_db": 0}})["corruption"]
    assert repr(noise) == repr(WhiteNoise(0.0))
    assert value_of({"range": [2, 6]}, tuple[int, ...] | range, "positions") == range(2, 6)


def test_results_say_what_they_are_of(undisturbed, plan):
    results = load_results(undisturbed)
    assert (results.units.fingerprint == plan.units[0].fingerprint).all()
    assert {"torch", "python", "lalm_lens"} <= set(results.units.versions[0])
    assert (results.units.threads == 1).all()
    assert results.units.seed.dropna().unique().tolist() == ["1"]
    assert "computed on" not in repr(results)
    results.units.loc[0, "device"] = "cuda:0"
    assert "computed on cuda, torch" in repr(results)
    trace = results.table("causal_trace", corruption=OtherClip(1))
    assert trace.frame["sample"].nunique() == 6
    with pytest.raises(DataError, match="No finished unit is of causal_trace, metric = 'logit_difference'"):
        results.table("causal_trace", metric="logit_difference")


def test_what_no_column_tells_apart_is_not_mixed(study, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    other = STUDY.replace('kinds = ["layer"]', 'kinds = ["layer", "audio_layer"]').replace('"P2", ', "")
    (study.parent / "more.toml").write_text(other)
    more = planned(Study.read(study.parent / "more.toml"))
    write_list(more, tmp_path)
    list(run_local(more.units[6:7], tmp_path))
    results = load_results(tmp_path)
    assert results.n_unfinished == 2
    with pytest.raises(DataError, match="more than one kinds"):
        results.table("causal_trace")
    assert len(results.table("causal_trace", kinds=("layer",)).frame) == 2 * 6 * 9


def test_a_clip_of_two_studies_counts_once(study, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (study.parent / "wider.toml").write_text(STUDY.replace("shard = 1", "shard = 4"))
    wider = planned(Study.read(study.parent / "wider.toml"))
    write_list(wider, tmp_path)
    list(run_local(wider.units[:2], tmp_path))
    results = load_results(tmp_path)
    with pytest.raises(DataError, match=r"in more than one of these units \(6 such clips\)"):
        results.table("information_score")
    assert results.table("causal_trace").frame["sample"].nunique() == 6  # the same units in both
    for name in ("study", "wider"):
        (one := load_results(tmp_path, study=name)).table("information_score")
        assert one.n_unfinished == 0
    with pytest.raises(DataError, match="no study 'other', only study, wider"):
        load_results(tmp_path, study="other")


def test_what_a_column_tells_apart_may_be_mixed(study, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    cut = 'shard = 6\nknockouts = [{ type = "Knockout", layers = "all", queries = [-1], keys = "audio" }]'
    (study.parent / "cut.toml").write_text(STUDY.replace("shard = 1", cut))
    more = planned(Study.read(study.parent / "cut.toml"))
    write_list(more, tmp_path)
    list(run_local(more.units[:1], tmp_path))
    scores = load_results(tmp_path).table("information_score").frame
    assert scores.groupby("knockout")["sample"].nunique().tolist() == [6, 6]


OF_A_CONFLICT = """
[[experiment]]
name = "text_dominance"
conflict.framing = ["statement", "A friend says: {label}."]
conflict.order = ["audio_first", "text_first"]
conflict.strength = "adversarial"

[[experiment]]
name = "logit_lens"
shard = 2
conflict = { conditions = ["conflict"], seed = 3 }

[[experiment]]
name = "suppression"
order = "text_first"

[[experiment]]
name = "convergence"
n_permutations = 10

[[experiment]]
name = "back_patch"
conflict = { conditions = ["audio_only", "conflict"] }
sources = [4]
targets = [2]
windows = [1]

[[experiment]]
name = "probe"
conflict = { conditions = ["aligned", "conflict"] }
stacks = ["decoder"]
seed = 7
n_folds = 2
n_controls = 1
max_iter = 10

[[experiment]]
name = "activations"
names = ["blocks.2.hook_resid_post"]
place = "audio"
shard = 4
"""


@pytest.fixture(scope="module")
def conflicts(study) -> tuple[Planned, Path]:
    path = study.parent / "conflicts.toml"
    path.write_text(STUDY[: STUDY.index("[[experiment]]")].replace('"P2", ', "") + OF_A_CONFLICT)
    plan = planned(Study.read(path))
    write_list(plan, path.parent / "conflicts")
    assert not [its.failure for its in run_local(plan.units, path.parent / "conflicts") if its.failure]
    return plan, path.parent / "conflicts"


def test_clips_of_a_study_are_made_conflicts(conflicts, study, tiny_lalm):
    samples, results = read_folder(study.parent / "clips"), load_results(conflicts[1])
    how: dict = {"framing": ("statement", "A friend says: {label}."), "order": ("audio_first", "text_first")}
    items = make_conflict(samples, "gender", strength="adversarial", **how)
    expected = text_dominance(tiny_lalm, items, progress=False).frame
    found = results.table("text_dominance", conflict=Conflict(strength="adversarial", **how))
    pd.testing.assert_frame_equal(found.frame, expected, check_exact=True)
    assert found.frame.order.nunique() == 2
    items = make_conflict(samples, "gender", conditions=["conflict"], seed=3)
    read = results.table("logit_lens").frame
    assert read["sample"].unique().tolist() == [item.name for item in items]  # of three units, as of all clips at once
    expected = suppression(tiny_lalm, samples, attribute="gender", order="text_first", progress=False).frame
    pd.testing.assert_frame_equal(results.table("suppression").frame, expected, check_exact=True)
    assert {"convergence", "back_patch", "probe"} < set(results.experiments)
    assert results.n_unfinished == 0


def test_a_unit_of_a_conflict_is_known_by_what_is_stated(conflicts, study):
    def lens(old: str, new: str) -> list[str]:
        text = (study.parent / "conflicts.toml").read_text()
        (study.parent / "other.toml").write_text(text.replace(old, new))
        units = planned(Study.read(study.parent / "other.toml")).units
        return [unit.hash for unit in units if unit.experiment.name == "logit_lens"]

    whole = lens("", "")
    assert not set(lens("seed = 3", "seed = 4")) & set(whole)
    assert not set(lens(", seed = 3", ', seed = 3, order = "text_first"')) & set(whole)


def test_a_unit_says_its_seed(conflicts, undisturbed):
    paths = [path for out in (conflicts[1], undisturbed) for path in out.glob("*.parquet")]
    told = [json.loads(read_metadata(path).metadata[ABOUT]) for path in paths]
    said = {its["experiment"]: its["seed"] for its in told}
    expected = {"probe": "7", "logit_lens": "3", "causal_trace": "1", "activations": None}
    assert {name: said[name] for name in expected} == expected


def test_activations_on_a_full_disk_are_an_error_in_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    monkeypatch.setattr("lalm_lens.experiments.activations.save_file", full)
    table = Activations(pd.DataFrame({name: [] for name in Activations.COLUMNS}), {})
    with pytest.raises(OSError, match=r"some\.safetensors cannot be written \(Error while serializing: .*too large"):
        table.save(tmp_path / "some.parquet")
    assert not list(tmp_path.iterdir())


def test_activations_are_units(conflicts, study, tiny_lalm):
    plan, out = conflicts
    paths = [unit.path(out) for unit in plan.units if unit.experiment.name == "activations"]
    assert len(paths) == 2
    states = torch.cat([load_file(path.with_suffix(".safetensors"))["blocks.2.hook_resid_post"] for path in paths])
    rows = load_results(out).table("activations").frame
    assert len(rows) == len(states)
    question = Question.about(tiny_lalm, samples := read_folder(study.parent / "clips"), "gender", "P3", True)
    for sample in samples[::5]:
        run = question.run(sample)
        _, cache = tiny_lalm.run_with_cache(run.inputs, names_filter="blocks.2.hook_resid_post")
        its = rows[rows["sample"] == sample.name]
        torch.testing.assert_close(states[its.index], cache["blocks.2.hook_resid_post"][0, its.position.to_list()])
    assert set(rows.region) == {"audio"}


def test_models_of_one_folders_name_have_names_of_their_own(study, tmp_path):
    """As two runs of a training, the last of each in a folder of one name."""
    for name in ("one", "other"):
        shutil.copytree(TINY_LALM, tmp_path / name / "last")
    weights = bytearray((tmp_path / "other" / "last" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "other" / "last" / "model.safetensors").write_bytes(weights)
    models = "".join(f'[[model]]\npath = "{name}/last"\nname = "{name}"\n' for name in ("one", "other"))
    rest = STUDY[STUDY.index("[[dataset]]") : STUDY.rindex("[[experiment]]")].replace("shard = 1", "shard = 6")
    (tmp_path / "names.toml").write_text(models + rest.replace('"clips"', f'"{study.parent / "clips"}"'))
    plan = planned(Study.read(tmp_path / "names.toml"))
    write_list(plan, tmp_path / "out")
    assert not [its.failure for its in run_local(plan.units, tmp_path / "out") if its.failure]
    scores = load_results(tmp_path / "out").table("information_score").frame
    assert scores.model.unique().tolist() == ["one", "other"]
    assert {"one", "other"} == set(compare_models(scores, "probability")[["model", "other"]].iloc[0])


def test_models_are_compared_on_the_clips_that_both_have():
    rng = np.random.default_rng(0)
    rows = [
        {"model": model, "attribute": "gender", "sample": f"{n}.wav", "score": rng.normal() + (model == "b")}
        for model, clips in (("a", range(30)), ("b", range(5, 35)))
        for n in clips
        for _ in range(2)
    ]
    frame = pd.DataFrame(rows)
    (row,) = compare_models(frame, "score").to_dict("records")
    wide = frame.groupby(["sample", "model"]).score.mean().unstack().dropna()
    assert row["n"] == len(wide) == 25
    assert np.isclose(row["difference"], (wide.a - wide.b).mean())
    error = (wide.a - wide.b).std() / 5
    assert np.isclose(row["high"] - row["low"], 2 * 1.96 * error, rtol=0.2)
    with pytest.raises(DataError, match="nothing to compare"):
        compare_models(frame[frame.model == "a"], "score")


def test_models_are_compared_in_the_prompts_that_both_were_asked_in():
    rows = [("a", "P1", 0.0), ("a", "P3", 1.0), ("b", "P3", 1.0)]
    frame = pd.DataFrame(
        [
            {"model": model, "attribute": "gender", "form": form, "sample": f"{n}.wav", "score": score}
            for model, form, score in rows
            for n in range(5)
        ]
    )
    (row,) = compare_models(frame, "score").to_dict("records")
    assert (row["n"], row["mean"], row["difference"]) == (5, 1.0, 0.0)


def test_a_model_that_cannot_be_opened_stops_no_other(study, undisturbed, tmp_path, monkeypatch, capsys):
    for name in ("torn", "bare"):
        shutil.copytree(TINY_LALM, study.parent / name, dirs_exist_ok=True)
    (study.parent / "bare" / "config.json").write_text('{"model_type": "unheard_of"}')
    whole = bytearray((study.parent / "torn" / "model.safetensors").read_bytes())
    (study.parent / "torn" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    models = "".join(f'[[model]]\npath = "{name}"\n\n' for name in ("torn", "gone", "bare"))
    (study.parent / "models.toml").write_text(STUDY.replace("[[model]]", f"{models}[[model]]"))
    monkeypatch.setattr(sys, "argv", ["lalm-lens", "run", str(study.parent / "models.toml"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "Left out, gone: There is no model at gone" in said
    assert "Left out, bare: " in said
    assert "Failed, 12 units" in said
    assert "torn cannot be opened: " in said
    assert "12 of 24 units are finished" in said
    results = load_results(tmp_path)
    assert list(results.failed) == ["gone", "bare"]
    assert len(results.failures) == results.n_unfinished == 12
    assert all("torn cannot be opened: " in why for why in results.failures.values())
    assert "failed: information_score, torn, gender, P3, " in repr(results)
    expected = load_results(undisturbed).table("causal_trace").frame
    pd.testing.assert_frame_equal(results.table("causal_trace").frame, expected, check_exact=True)
    (study.parent / "models.toml").write_text(STUDY.replace(str(TINY_LALM), "gone"))
    with pytest.raises(InputError, match=r"No model of .* can be opened\. There is no model at gone"):
        planned(Study.read(study.parent / "models.toml"))


def test_a_model_is_opened_once(plan):
    models = Models()
    first = models.of(plan.units[0].model)
    assert models.of(plan.units[-1].model) is first
