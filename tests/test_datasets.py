"""Datasets in the layouts in which they are published: SAKURA on the Hub and on GitHub, audiofolders, and others."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from datasets.table import InMemoryTable

from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES, Attribute
from lalm_lens.audio import read_audio
from lalm_lens.commands.clips import read_study
from lalm_lens.datasets import (
    Clip,
    Refused,
    Sample,
    balance,
    cleaned,
    cut_to,
    list_dataset,
    list_folder,
    list_hub,
    read_attributes,
    read_clips,
    read_folder,
    sakura,
    split,
)
from lalm_lens.datasets.clip import accepted, told_apart, told_once
from lalm_lens.datasets.folder import LISTS, rows_of_folder
from lalm_lens.datasets.hub import rows_of_dataset
from lalm_lens.errors import AudioError, DataError, InputError, PromptError
from lalm_lens.experiments.asked import Question
from lalm_lens.study import Study

SAKURA_COLUMNS = ("attribute_label", "single_instruction", "single_answer", "multi_instruction", "multi_answer")
LABELS = ("dog", "cat", "frog", "cow", "dog", "cat")


def tone(n: int) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * (200 + 40 * n) * np.arange(3200 + 160 * n) / 16_000)


def rows(root: Path) -> list[dict[str, str]]:
    """SAKURA's, with the sounds that they name written to `root`."""
    made = []
    for n, label in enumerate(LABELS):
        soundfile.write(root / f"{n}.wav", tone(n), 16_000, "PCM_16")
        answers = dict.fromkeys(SAKURA_COLUMNS[1:], " (a) Female")
        made.append({"file": f"{n}.wav", **answers, "attribute_label": label})
    return made


@pytest.fixture(scope="module")
def github(tmp_path_factory) -> Path:
    """data/Animal/metadata.csv with a column `file` beside data/Animal/audio/*.wav."""
    root = tmp_path_factory.mktemp("SAKURA")
    audio = root / "data" / "Animal" / "audio"
    audio.mkdir(parents=True)
    listed = rows(audio)
    with (audio.parent / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(listed[0]))
        table.writeheader()
        table.writerows(listed)
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """data/test-00000-of-00001.parquet, whose sounds are structs of bytes and path."""
    root, sounds = tmp_path_factory.mktemp("AnimalQA"), tmp_path_factory.mktemp("sounds")
    table = [
        {**row, "audio": {"bytes": (sounds / row["file"]).read_bytes(), "path": row["file"]}} for row in rows(sounds)
    ]
    (root / "data").mkdir()
    features = datasets.Features(
        {
            "file": datasets.Value("string"),
            "audio": datasets.Audio(sampling_rate=16_000),
            **{name: datasets.Value("string") for name in SAKURA_COLUMNS},
        }
    )
    stored = pa.Table.from_pylist(table, schema=features.arrow_schema)
    pq.write_table(stored, root / "data" / "test-00000-of-00001.parquet")
    return root


def test_sakura_is_the_same_from_the_hub_and_from_github(hub, github):
    from_hub, from_github = read_clips(sakura("animal", hub)), read_attributes(github, ["animal", "gender"])["animal"]
    assert [its.label for its in from_hub] == list(LABELS)
    for n, (one, other) in enumerate(zip(from_hub, from_github, strict=True)):
        assert (one.name, one.label, one.digest) == (other.name, other.label, other.digest)
        assert torch.equal(one.waveform, other.waveform)
        written = torch.from_numpy(tone(n)).float()
        torch.testing.assert_close(one.waveform, written, atol=1e-4, rtol=0)
    assert read_attributes(github / "data", ["animal"]).keys() == {"animal"}


def downloaded(hub: Path, folder: Path) -> Path:
    """Two tracks as they are on the Hub, beside each other."""
    for track in ("AnimalQA", "GenderQA"):
        shutil.copytree(hub, folder / "sakura" / track)
    return folder


STUDY = """
[[model]]
path = "a model"

[[dataset]]
{where}
attributes = ["animal"]

[[experiment]]
name = "information_score"
"""


@pytest.mark.parametrize(
    "where",
    [
        'sakura = "github"',
        'sakura = "github/data"',
        'sakura = "github/data/{attribute}"',
        'folder = "github"',
        'folder = "github/data/{attribute}"',
        'sakura = "sakura"',
        'sakura = "sakura/{attribute}QA"',
        'hub = "sakura/{attribute}QA"\ncolumns = { label = "attribute_label" }',
    ],
)
def test_a_study_reads_any_copy_of_sakura_beside_it(tmp_path, hub, github, monkeypatch, where):
    monkeypatch.chdir(hub)
    (downloaded(hub, tmp_path) / "github").symlink_to(github)
    (tmp_path / "study.toml").write_text(STUDY.replace("{where}", where))
    study = Study.read(tmp_path / "study.toml")
    clips = accepted(study.datasets[0].list(ATTRIBUTES["animal"], study.path.parent))
    expected = sakura("animal", hub)
    assert [(its.name, its.label, its.digest) for its in clips] == [
        (its.name, its.label, its.digest) for its in expected
    ]


def test_sakura_is_asked_for_by_its_name_on_the_hub(monkeypatch):
    asked = []

    def offline(name, config, split):
        asked.append((name, split))
        raise OSError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for attribute in ATTRIBUTES:
        with pytest.raises(DataError, match=rf"SLLM-multi-hop/{attribute.capitalize()}QA cannot be loaded \(.*network"):
            sakura(attribute)
    assert asked[0] == ("SLLM-multi-hop/GenderQA", "test")


def test_a_folder_may_list_its_clips_in_a_csv(tmp_path):
    soundfile.write(tmp_path / "a, b.wav", tone(0), 16_000)
    lines = 'file_name,label,speaker,transcript,prompt\n"a, b.wav",male,7,"He said ""hi"".",\n'
    (tmp_path / "metadata.csv").write_text(lines, encoding="utf-8-sig")
    (clip,) = list_folder(tmp_path)
    about = (clip.name, clip.label, clip.speaker, clip.transcript, clip.question)
    assert about == ("a, b.wav", "male", "7", 'He said "hi".', None)
    (tmp_path / "metadata.csv").write_text('file_name,label\n"a.wav,male\n')
    with pytest.raises(DataError, match=r"metadata.csv, line 2 is not CSV"):
        list_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("name,label\na.wav,male\n")
    with pytest.raises(DataError, match="line 2 needs the keys file_name and label"):
        list_folder(tmp_path)


BROKEN_LINES = {
    '"c.wav" x,male,,': "is not CSV",
    '"d.wav,male,,': "is not CSV",
    "e.wav,male,He said, hi, there": "has 5 fields for 4 columns",
    "f.wav,,,": "needs the keys file_name and label",
    ",male,,": "needs the keys file_name and label",
    "g\udcff.wav,male,,": "is not UTF-8 text",
}


def test_what_is_behind_a_broken_line_is_read(tmp_path):
    """Of CSV, whose quotes may span lines; each broken line is refused, and named by its file or its place."""
    good = ["a.wav,male,,", '"b, ""b"".wav",female,"two\nlines",7', "z.wav,male,,"]
    lines = ["file_name,label,transcript,speaker", good[0], *BROKEN_LINES, good[1], *BROKEN_LINES, good[2]]
    (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape", newline="")
    found = rows_of_folder(tmp_path)
    assert [(its.name, its.transcript, its.speaker) for its in found if isinstance(its, Clip)] == [
        ("a.wav", None, None),
        ('b, "b".wav', "two\nlines", "7"),
        ("z.wav", None, None),
    ]
    refused = [its for its in found if isinstance(its, Refused)]
    numbers = [*range(3, 9), *range(11, 17)]
    for its, number, (line, words) in zip(refused, numbers, [*BROKEN_LINES.items()] * 2, strict=True):
        assert f"metadata.csv, line {number}{'' if words.startswith(':') else ' '}{words}" in its.reason
        assert its.name == (line[:5] if line[0] in "ef" else f"metadata.csv, line {number}")
    with pytest.raises(DataError, match="line 3 is not CSV"):
        list_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text('"file_name" x,label\na.wav,male\n')
    with pytest.raises(DataError, match="line 1 is not CSV"):
        rows_of_folder(tmp_path)


def test_clips_of_one_name_are_told_apart():
    a, b, c = Clip("a", "male", b"1"), Clip("b", "male", b"1"), Clip("c", "male", b"1")
    contradicting, other_sound = replace(b, label="female"), replace(c, source=b"2")
    rows = [a, b, Refused("a", "broken"), c, replace(a), contradicting, replace(a), other_sound]
    found = told_apart(rows)
    assert found[:1] == [a]
    assert found[2] == rows[2]
    assert all(isinstance(its, Refused) for its in found[1:])
    assert [its.reason for its in found[1::2] if isinstance(its, Refused)] == [
        "b is listed 2 times, labelled female, male. Name every clip once.",
        "c is listed 2 times, labelled male. Name every clip once.",
        "b is listed 2 times, labelled female, male. Name every clip once.",
        "c is listed 2 times, labelled male. Name every clip once.",
    ]
    assert (
        found[4] == found[6] == Refused("a", "a is listed 3 times, labelled male. Name every clip once. One is kept.")
    )
    with pytest.raises(DataError, match=r"a is listed 3 times, labelled male. Name every clip once\.$"):
        told_once([a, a, b, a])


def test_rows_of_a_dataset_that_are_no_clips_are_refused_one_by_one():
    sounds = [{"bytes": b"RIFF", "path": f"{n}.wav"} for n in range(4)]
    stored = {
        "audio": [sounds[0], None, {"bytes": None, "path": None}, sounds[1], sounds[2], sounds[3], sounds[3]],
        "label": [0, 0, 1, None, -1, 7, 1],
        "speaker": [None, 1, 2, 3, 4, 5, 6],
    }
    features = datasets.Features(
        {
            "audio": datasets.Audio(decode=False),
            "label": datasets.ClassLabel(names=["male", "female"]),
            "speaker": datasets.Value("int64"),
        }
    )
    columns = {name: pa.array(its, features.arrow_schema.field(name).type) for name, its in stored.items()}
    dataset = datasets.Dataset(InMemoryTable(pa.table(columns)), info=datasets.DatasetInfo(features=features))
    found = rows_of_dataset(dataset, speaker="speaker")
    assert found == [
        Clip("0.wav", "male", b"RIFF"),
        Refused("row 1", "Row 1 of the dataset has no audio."),
        Refused("row 2", "Row 2 of the dataset has no audio."),
        Refused("1.wav", "Row 3 of the dataset has no label."),
        Refused("2.wav", "Row 4 of the dataset has no label."),
        Refused("3.wav", "Row 5 of the dataset has no label."),
        Clip("3.wav", "female", b"RIFF", speaker="6"),
    ]
    with pytest.raises(DataError, match="Row 1 of the dataset has no audio"):
        list_dataset(dataset)
    with pytest.raises(DataError, match="The column 'speaker' of the dataset holds no sounds"):
        list_dataset(dataset, audio="speaker")


def test_a_clip_is_asked_its_own_question(tmp_path, tiny_lalm):
    soundfile.write(tmp_path / "a.wav", tone(0), 16_000)
    for key, its in (("prompt", "Who is it?"), ("question", "Who is it?"), ("other", None)):
        row = {"file_name": "a.wav", "label": "male", key: "Who is it?"}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
        (sample,) = read_folder(tmp_path)
        assert sample.question == its
        question = Question.about(tiny_lalm, [sample], "gender", "P2", True)
        said = question.columns(sample)["question"]
        assert said == (its or ATTRIBUTES["gender"].question)
        prompt = question.run(sample).prompt
        assert said in "".join(position.token for position in prompt.positions if position.region == "early")


def test_any_dataset_names_its_columns():
    sounds = {"bytes": None, "path": "sounds/a.wav"}, {"bytes": b"RIFF", "path": None}
    features = datasets.Features(
        {
            "clip": datasets.Audio(decode=False),
            "sex": datasets.ClassLabel(names=["male", "female"]),
            "who": datasets.Value("int64"),
        }
    )
    stored = [dict(zip(features, its, strict=True)) for its in zip(sounds, (1, 0), (4, 5), strict=True)]
    table = pa.Table.from_pylist(stored, schema=features.arrow_schema)
    dataset = datasets.Dataset(InMemoryTable(table), info=datasets.DatasetInfo(features=features))
    clips = list_dataset(dataset, audio="clip", label="sex", speaker="who")
    assert [(its.name, its.label, its.speaker, its.source) for its in clips] == [
        ("a.wav", "female", "4", Path("sounds/a.wav")),
        ("00001", "male", "5", b"RIFF"),
    ]
    with pytest.raises(AudioError, match="00001 is not readable audio"):
        clips[1].read()
    with pytest.raises(DataError, match="no column 'label', only clip, sex, who"):
        list_dataset(dataset, audio="clip")
    with pytest.raises(DataError, match="mood is not read of a clip"):
        list_dataset(dataset, audio="clip", label="sex", mood="who")
    without = datasets.Dataset(InMemoryTable(table.set_column(1, "sex", pa.array([1, -1]))), info=dataset.info)
    with pytest.raises(DataError, match="Row 1 of the dataset has no sex"):
        list_dataset(without, audio="clip", label="sex")
    with pytest.raises(DataError, match="nowhere at all cannot be loaded"):
        list_hub("nowhere at all")


def test_sound_files_are_no_dataset(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine" / "test").mkdir(parents=True)
    soundfile.write(tmp_path / "mine" / "test" / "a.wav", tone(0), 16_000)
    (tmp_path / "mine" / "test" / "metadata.csv").write_text("file_name,label\na.wav,male\n")
    with pytest.raises(DataError, match=r"mine cannot be read \(.*torchcodec.*\)\. .* in a study, folder = ") as raised:
        list_hub(str(tmp_path / "mine"))
    assert "\n" not in str(raised.value)


def test_labels_are_spelled_as_the_attribute_does():
    told = ("Male", " female", "(a) Female", "(b) male ", "male")
    clips = [Clip(f"{n}.wav", label, b"") for n, label in enumerate(told)]
    assert [its.label for its in cleaned(clips, ATTRIBUTES["gender"])] == ["male", "female", "female", "male", "male"]
    with pytest.raises(DataError, match=r"Not options of animal \(dog, .*\): 'Male' \(1\), .*'\(a\) Female' \(1\)"):
        cleaned(clips, ATTRIBUTES["animal"])
    named = Attribute("own", "", ("A", "b c"), "It is")
    assert [its.label for its in cleaned([Clip("x", "B C", b""), Clip("y", "a", b"")], named)] == ["b c", "A"]


def test_labels_may_differ_in_capitals_alone():
    named = Attribute("own", "", ("us", "US"), "It is")
    told = [Clip(f"{n}.wav", label, b"") for n, label in enumerate(("us", "US", "(a) US", " us"))]
    assert [its.label for its in cleaned(told, named)] == ["us", "US", "US", "us"]


def test_a_row_that_contradicts_itself_is_refused(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "label": "male", "label": "female"}')
    with pytest.raises(DataError, match=r"line 1 is not JSON .it has a key twice: file_name, label, label"):
        list_folder(tmp_path)


def test_a_hash_is_of_content_wherever_it_lies(tmp_path):
    for name, n in (("a.wav", 0), ("b.wav", 1), ("c.wav", 0)):
        soundfile.write(tmp_path / name, tone(n), 16_000)
    a, b, c = (Clip(name, "male", tmp_path / name) for name in ("a.wav", "b.wav", "c.wav"))
    in_memory = Clip("a.wav", "male", (tmp_path / "a.wav").read_bytes())
    assert a.digest == c.digest == in_memory.digest != b.digest
    assert a.read().digest == in_memory.read().digest
    others = [Clip("a.wav", "female", a.source), Clip("a.wav", "male", a.source, transcript="Hi.")]
    assert len({its.digest for its in (a, b, *others)}) == 4
    assert len({its.read().digest for its in (a, b, *others)}) == 4
    assert torch.equal(in_memory.read().waveform, read_audio(tmp_path / "a.wav"))


def samples(n: int, n_speakers: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    who = rng.integers(0, n_speakers, n)
    sex = np.where(who % 3 == 0, "male", "female")
    return [Sample(f"{at}.wav", sex[at], torch.zeros(1), speaker=str(who[at])) for at in range(n)]


def test_nobody_speaks_in_both_parts():
    clips = samples(300, 30)
    for seed in range(3):
        first, second = split(clips, 100, seed, by_speaker=True)
        assert len(first) + len(second) == 300
        assert abs(len(first) - 100) < 15
        assert not {its.speaker for its in first} & {its.speaker for its in second}
        share = [np.mean([its.label == "male" for its in part]) for part in (first, second, clips)]
        assert np.ptp(share) < 0.08
        assert [its.name for its in split(clips, 100, seed, by_speaker=True)[0]] == [its.name for its in first]
    with pytest.raises(DataError, match="Who speaks in x is not known"):
        split([*clips, Sample("x", "male", torch.zeros(1))], 100, by_speaker=True)
    with pytest.raises(DataError, match="The speakers of 9 clips cannot be split"):
        split(samples(9, 1), 3, by_speaker=True)


def test_the_balance_of_a_set_is_counted():
    table = balance(samples(300, 30))
    expected = pd.Series([its.label for its in samples(300, 30)]).value_counts()
    assert dict(zip(table.label, table.n, strict=True)) == expected.to_dict()
    assert table.share.sum() == pytest.approx(1)
    assert table.speakers.sum() == 30
    assert list(balance([Clip("a", "x", b"")]).columns) == ["label", "n", "share"]


def test_a_prompt_without_words_is_refused(tiny_lalm):
    silent = Sample("a.wav", "male", torch.rand(3200), question="")
    with pytest.raises(PromptError):
        Question.about(tiny_lalm, [silent], "gender", "P2", True).run(silent)


@pytest.mark.parametrize("name", LISTS)
def test_a_command_reads_a_folder_of_one_attribute_from_any_list(tmp_path, name):
    write_clips(tmp_path, "gender", 2, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    if name == "metadata.csv":
        (tmp_path / "metadata.jsonl").unlink()
        lines = ["file_name,label", *(f"{row['file_name']},{row['label']}" for row in rows)]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    study = read_study(tmp_path, "gender", None, None, None)
    assert [(its.name, [each.label for each in samples]) for its, samples in study.items()] == [
        ("gender", [row["label"] for row in rows])
    ]
    with pytest.raises(DataError, match=r"holds the clips of one attribute. Say which"):
        read_study(tmp_path, None, None, None, None)


def test_what_cannot_be_drawn_or_cut():
    clips = [Sample(f"{n}.wav", "male", torch.zeros(800), speaker=str(n)) for n in range(4)]
    for by_speaker in (False, True):
        with pytest.raises(InputError, match="0 or more; got -1"):
            split(clips, 2, seed=-1, by_speaker=by_speaker)
    with pytest.raises(InputError, match="1 or more; got 0"):
        cut_to(clips, 0)
