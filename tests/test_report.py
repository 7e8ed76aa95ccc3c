"""The interactive page holds what the tables hold, and nothing from elsewhere."""

import json
import re
import shutil
from base64 import b64decode
from dataclasses import dataclass, replace
from functools import partial
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import soundfile
import torch

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.corrupt import OtherClip, WhiteNoise
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.discovery import experiments
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.experiments.information_score import InformationScore, information_score
from lalm_lens.experiments.logit_lens import LogitLens, logit_lens
from lalm_lens.experiments.text_dominance import TextDominance
from lalm_lens.loading import from_pretrained
from lalm_lens.planning import planned
from lalm_lens.report import write_report
from lalm_lens.report.clips import Given, corrupted
from lalm_lens.report.found import Source
from lalm_lens.report.found import Study as Traced
from lalm_lens.report.maps import Words
from lalm_lens.report.others import tables_of
from lalm_lens.report.overview import NO_BREAK, html, matrix, short
from lalm_lens.report.page import Shown
from lalm_lens.report.page import card as card_of
from lalm_lens.report.sounds import Sounds, compression, opus, spectrogram, text
from lalm_lens.results import CausalTrace
from lalm_lens.runner import run_local, write_list
from lalm_lens.study import Study
from lalm_lens.study_results import load_results
from lalm_lens.tables import Table
from lalm_lens.units import ABOUT

pytestmark = pytest.mark.numbers

N_CLIPS = 2
STUDY = f"""
[[model]]
path = "{TINY_LALM}"

[[dataset]]
folder = "clips"
attributes = ["gender"]
"""
TRACE = """
[[experiment]]
name = "causal_trace"
kinds = ["layer"]
shard = 1
"""
SCORE = """
[[experiment]]
name = "information_score"
label_spaces = [true]
shard = 1
"""


class Page(HTMLParser):
    """What of a page can be wrong: tags left open, scripts and what is fetched."""

    VOID = ("meta", "br", "input")

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.fetched: list[str | None] = []
        self.ids: list[str | None] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "poster")]
        if tag == "script":
            self.scripts.append("")
            self.ids.append(dict(attrs).get("id"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[self.ids.index("data")])


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), "gender", N_CLIPS, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips) -> Path:
    """A trace, scores and a lens of two clips."""
    model, samples = from_pretrained(TINY_LALM), read_folder(clips)
    out = tmp_path_factory.mktemp("tables")
    how: dict = {"attribute": "gender", "progress": False}
    causal_trace(model, samples, corruption=OtherClip(), audio="windows", window_s=0.4, **how).save(out / "a/t.parquet")
    logit_lens(model, samples, positions="audio", top_k=3, **how).save(out / "a/lens.parquet")
    information_score(model, samples, forms=["P3"], label_spaces=(True,), **how).save(out / "b/scores.parquet")
    return out


@pytest.fixture(scope="module")
def page(folder, clips, tmp_path_factory) -> Page:
    return Page(write_report(folder, clips=[clips], out=tmp_path_factory.mktemp("page") / "r.html"))


def card_map(card: dict, kind: str) -> dict:
    (found,) = [its for its in card["maps"] if its["kind"] == kind]
    return found


def test_the_page_is_whole_and_fetches_nothing(page, folder):
    assert not page.open
    assert not page.fetched  # players get their sounds from the page's own data
    own = [script for name, script in zip(page.ids, page.scripts, strict=True) if name != "plotly"]
    assert not any(re.search(r"(?i)https?:|//cdn|import\(|fetch\(", script) for script in own)
    assert "plotly.js v" in page.scripts[page.ids.index("plotly")][:200]


def test_the_policy_of_the_page_forbids_the_network(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0]
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"http|\*|connect", policy)


def test_the_maps_hold_the_recovery_of_the_table(page, folder):
    trace = CausalTrace.load(folder / "a" / "t.parquet").frame
    n_compared = 0
    for card in page.data["cards"]:
        rows = trace[trace["sample"] == card["sample"]]
        assert card["p_clean"] == pytest.approx(rows.p_clean.iloc[0], rel=1e-6)
        for kind, column in (("token", "position"), ("audio_window", "start_s")):
            found = card_map(card, kind)
            grid = rows[rows.kind == kind].pivot(index="layer", columns=column, values="recovery")
            assert found["layers"] == grid.index.tolist()
            names = [its["positions"][0] if kind == "token" else its["start_s"] for its in found["columns"]]
            np.testing.assert_allclose(names, grid.columns.to_numpy(float), atol=1e-6)
            np.testing.assert_allclose(found["recovery"], grid, rtol=1e-6)
            n_compared += grid.size
        tokens = rows[rows.kind == "token"].drop_duplicates("position").sort_values("position")
        assert [its["token"] for its in card_map(card, "token")["columns"]] == tokens.token.tolist()
        segments = tokens.segment.astype(object).where(tokens.segment.notna(), None).tolist()
        assert [its.get("segment") for its in card_map(card, "token")["columns"]] == segments
    assert n_compared == trace.kind.isin(["token", "audio_window"]).sum()


def test_a_cell_says_the_most_probable_words_of_its_positions(page, folder):
    lens = LogitLens.load(folder / "a" / "lens.parquet").frame
    words = page.data["words"]
    for card in page.data["cards"]:
        found = card_map(card, "audio_window")
        rows = lens[(lens["sample"] == card["sample"]) & (lens.kind == "top")]
        for n, column in enumerate(found["columns"]):
            first, last = column["positions"]
            its = rows[rows.position.between(first, last)]
            assert its.start_s.min() == pytest.approx(column["start_s"])
            assert its.end_s.max() == pytest.approx(column["end_s"])
            for layer, at in its.groupby("layer"):
                likely = at.loc[at.probability.idxmax()]
                cell = found["words"][found["layers"].index(layer)][n]
                assert words[cell[0]] == likely.word
                assert cell[1] == round(1000 * likely.probability)
                assert len(cell) == 6


def test_curves_hold_the_means_of_the_tables(page, folder):
    trace, scores = CausalTrace.load(folder / "a" / "t.parquet"), InformationScore.load(folder / "b" / "scores.parquet")
    of_trace, of_scores = page.data["curves"]
    means = trace.aggregate()
    for name, kind in (("text positions", "layer"), ("audio positions", "audio_layer")):
        (line,) = [its for its in of_trace["lines"] if its["name"] == name]
        for column in ("mean", "low", "high"):
            np.testing.assert_allclose(line[column], means[means.kind == kind][column], rtol=1e-6)
    curve = scores.curves().query("place == 'last'")
    np.testing.assert_allclose(of_scores["lines"][0]["mean"], curve.score)
    assert of_scores["marks"] == [0.5]


def test_players_hold_the_clean_and_the_other_clip(page, clips):
    data, samples = page.data, {sample.name: sample for sample in read_folder(clips)}
    assert len(data["sounds"]) == N_CLIPS  # each clip is the other's corruption, and stands once
    for card in data["cards"]:
        other = card["corruption"].removeprefix("other clip ")
        for key, name in (("clean", card["sample"]), ("corrupted", other)):
            kind, _, content = data["sounds"][card[key]].partition(",")
            assert kind == "data:audio/ogg;base64"
            heard, rate_hz = soundfile.read(BytesIO(b64decode(content)))
            n = min(len(heard), len(samples[name].waveform))
            assert rate_hz == 16_000
            assert n > 25_000
            assert np.corrcoef(heard[:n], samples[name].waveform[:n])[0, 1] > 0.9
        assert card["mel"]["shape"] == "40, 160"


def test_what_was_heard_is_made_again_from_the_table(clips):
    first, second = read_folder(clips)
    heard, unknown = Given.of([clips]), Source(Path("t.parquet"), CausalTrace, {})
    other = partial(heard.find, unknown, "gender")
    for corruption in (WhiteNoise(3.0, seed=7), OtherClip(1)):
        theirs = corruption.of(first, [first, second])
        again = corrupted(first, theirs.name, 7, other)
        assert isinstance(again, torch.Tensor)
        assert torch.equal(again, theirs.waveform)
    assert corrupted(first, "other_clip gone.wav", 0, other) == "gone.wav is not among the clips that were given"
    silent = corrupted(first, "silence", 0, other)
    assert isinstance(silent, torch.Tensor)
    assert not silent.any()


def test_the_spectrogram_follows_the_pitch():
    seconds = torch.arange(16_000) / 16_000
    rising = torch.sin(2 * torch.pi * (500 + 1000 * seconds) * seconds)
    picture = spectrogram(rising)
    levels = np.frombuffer(b64decode(picture["bdata"]), np.uint8).reshape(40, -1)
    loudest = levels.argmax(0)
    assert levels.max() == 255
    assert (np.diff(loudest[5:-5]) >= 0).all()
    assert loudest[-5] > loudest[5] + 8


def test_without_clips_maps_stand_without_players(folder, tmp_path):
    path = write_report(folder, n_samples=1, out=tmp_path / "r.html")
    (card,) = Page(path).data["cards"]
    assert card_map(card, "token")
    assert "clean" not in card
    assert "no players" in path.read_text(encoding="utf-8")


def test_what_a_table_says_ends_no_script(folder, clips, tmp_path):
    evil = "</script><script>alert(1)</script>"
    frame = CausalTrace.load(folder / "a" / "t.parquet").frame
    CausalTrace(frame.assign(label=evil, token=evil, model=evil)).save(tmp_path / "t.parquet")
    path = write_report(tmp_path)
    found = Page(path)
    assert not found.open
    assert len(found.scripts) == 3
    assert evil not in path.read_text(encoding="utf-8")
    card = found.data["cards"][0]
    assert card["label"] == evil
    assert card_map(card, "token")["columns"][0]["token"] == evil


def test_twenty_long_clips_stay_under_three_megabytes(folder, tmp_path):
    """Of a model of 32 layers: 30 s each, corrupted by noise, which is hard to compress; windows of 1 s."""
    frame = CausalTrace.load(folder / "a" / "t.parquet").frame
    one = frame[(frame["sample"] == frame["sample"].iloc[0]) & (frame.layer == 0)]
    words = one[one.kind == "token"]
    windows = pd.concat([one[one.kind == "audio_window"].iloc[:1].assign(start_s=n, end_s=n + 1.0) for n in range(30)])
    rng = np.random.default_rng(0)
    layers = pd.concat([pd.concat([words, windows]).assign(layer=layer) for layer in range(32)], ignore_index=True)
    layers["recovery"] = rng.standard_normal(len(layers))
    lens = LogitLens.load(folder / "a" / "lens.parquet").frame
    state = lens[(lens.kind == "top") & (lens.layer == 0)].head(3)
    places = pd.DataFrame({"position": range(750), "layer": 0}).merge(pd.DataFrame({"layer": range(32)}), how="cross")
    places = places.rename(columns={"layer_y": "layer"})[["position", "layer"]]
    said = state.drop(columns=["position", "layer"]).merge(places, how="cross")
    said = said.assign(start_s=said.position * 0.04, end_s=said.position * 0.04 + 0.04)
    said["word"] = rng.choice([f"word{n}" for n in range(2000)], len(said))
    said["token_id"] = rng.integers(0, 100_000, len(said))
    said["probability"] = rng.random(len(said))
    noise = torch.from_numpy(rng.standard_normal((2, 30 * 16_000)).astype(np.float32) * 0.1)

    class Noisy:
        def find(self, source, attribute, name, label=None):
            return Sample(name, "male", noise[int(label is None)])

    words_of_page, sounds = Words(), Sounds()
    study = Traced("m", "gender", "P3", layers)
    source = Source(tmp_path / "t.parquet", CausalTrace, {})
    card = card_of(Shown(study, "a.wav", source, layers, said), Noisy(), sounds, words_of_page)
    level = compression(20 * 2 * 30.0)  # all clips of a page share what there is
    n_sound = sum(len(text(opus(samples, level))) for samples in sounds.waveforms)
    n_bytes = 20 * (len(json.dumps(card, separators=(",", ":"))) + n_sound)
    assert len(sounds.waveforms) == 2
    assert 2e6 < n_bytes + len(json.dumps(list(words_of_page.places))) < 3e6


def test_slots_of_a_q_former_have_no_time(folder, tmp_path):
    lens = LogitLens.load(folder / "a" / "lens.parquet").frame
    LogitLens(lens.assign(start_s=np.nan, end_s=np.nan)).save(tmp_path / "lens.parquet")
    path = write_report(tmp_path)
    assert "patch brings back" not in path.read_text(encoding="utf-8").partition('id="data"')[0]  # nothing was patched
    for card in Page(path).data["cards"]:
        found = card_map(card, "lens")
        assert found["axis"] == "slots"
        assert found["recovery"] is None
        assert not any("start_s" in column for column in found["columns"])


def test_a_search_shows_the_finest_window_at_each_moment(folder, tmp_path):
    frame = CausalTrace.load(folder / "a" / "t.parquet").frame
    one = frame[frame.kind == "audio_window"].iloc[:1].assign(kind="moment", layer=-1, site="embed")
    spans = [(0.0, 0.8, 0.5), (0.8, 1.6, 0.1), (0.0, 0.4, 0.2), (0.4, 0.8, 0.3)]
    rows = pd.concat([one.assign(start_s=start, end_s=end, recovery=rate) for start, end, rate in spans])
    CausalTrace(rows.reset_index(drop=True)).save(tmp_path / "t.parquet")
    found = card_map(Page(write_report(tmp_path)).data["cards"][0], "moment")
    assert [its["of_s"] for its in found["columns"]] == [[0.0, 0.4], [0.4, 0.8], [0.8, 1.6]]
    assert found["recovery"] == [[0.2, 0.3, 0.1]]


def test_traces_of_one_question_are_told_apart_wherever_they_stand(folder, tmp_path):
    """By the level of the noise, the direction and the site, in titles and as rows of matrices."""
    frame = CausalTrace.load(folder / "a" / "t.parquet").frame
    asked = {
        "white noise, -10 dB": {"corruption": "white_noise -10 dB"},
        "white noise, -30 dB": {"corruption": "white_noise -30 dB"},
        "noising": {"direction": "noise"},
        "resid mid": {"site": frame.site.replace("resid_post", "resid_mid")},
    }
    for n, changed in enumerate(asked.values()):
        CausalTrace(frame.assign(**changed)).save(tmp_path / f"{n}.parquet")
    path = write_report(tmp_path, n_samples=4)
    page, text = Page(path), path.read_text(encoding="utf-8")
    ways = [*["resid post, denoising"] * 2, "resid post, noising", "resid mid, denoising"]
    titles = [f"tiny_lalm: gender, P3, {its}" for its in ways]
    assert [its["title"] for its in page.data["curves"]] == [its["title"] for its in page.data["cards"]] == titles
    assert [its["heard"] for its in page.data["curves"]] == [*list(asked)[:2], "other clip", "other clip"]
    assert "Of noising, a corrupted state goes into the clean run" in " ".join(text.split())
    for its in re.findall(r'<table class="matrix">.*?</table>', text):
        rows = re.findall(r"<small>(.*?)</small></th>", its)
        assert len(set(rows)) == 4
        assert all(any(said in row for row in rows) for said in asked)


def test_clips_are_taken_from_every_study_kept_ones_first(folder, tmp_path):
    frame = CausalTrace.load(folder / "a" / "t.parquet").frame
    names = sorted(frame["sample"].unique())
    frame["status"] = np.where(frame["sample"] == names[0], "clean_wrong", "kept")
    CausalTrace(frame).save(tmp_path / "a.parquet")
    CausalTrace(frame.assign(metric="log_probability")).save(tmp_path / "b.parquet")
    CausalTrace(frame).save(tmp_path / "again.parquet")
    embed = frame.recovery.where(frame.site != "embed", 0.25)  # another site's table may hold the same state again
    CausalTrace(frame.assign(site=frame.site.replace("resid_post", "resid_mid"), recovery=embed, status="no_gap")).save(
        tmp_path / "site.parquet"
    )
    cards = Page(write_report(tmp_path, n_samples=3)).data["cards"]
    assert [(its["metric"], its["sample"]) for its in cards] == [
        ("probability", names[1]),
        ("log probability", names[1]),
        ("probability", frame["sample"].iloc[0]),
    ]
    assert cards[2]["status"] == "no gap"
    assert card_map(cards[2], "token")["recovery"][0][0] == 0.25
    assert card_map(cards[0], "token")["recovery"][0][0] == 0


def test_what_cannot_be_shown_is_refused(folder, clips, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="holds no table"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        write_report(tmp_path / "gone")
    with pytest.raises(DataError, match="has neither metadata"):
        write_report(folder, clips=[tmp_path])
    frame = CausalTrace.load(folder / "a" / "t.parquet").frame
    CausalTrace(frame).save(tmp_path / "a.parquet")
    CausalTrace(frame.assign(recovery=0.0)).save(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="disagree on"):
        write_report(tmp_path)
    (tmp_path / "c.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is not a Parquet file"):
        write_report(tmp_path)
    other = tmp_path / "clips"
    write_clips(other, "gender", N_CLIPS, seed=4)
    with pytest.raises(DataError, match="Two clips are named"):
        write_report(folder, clips=[clips, other])


def test_the_command_writes_the_page(folder, clips, tmp_path, capsys, monkeypatch):
    from test_cli import lalm_lens

    out = tmp_path / "r.html"
    assert lalm_lens(monkeypatch, "report", folder, "--clips", clips, "--samples", 1, "--out", out) == 0
    assert str(out) in capsys.readouterr().out
    assert len(Page(out).data["cards"]) == 1


def written(folder: Path, text: str) -> Path:
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with clips, a study and its results; one clip of the four is the corruption of another."""
    folder = tmp_path_factory.mktemp("study")
    write_clips(folder / "clips", "gender", 4, seed=5, duration_s=0.5)
    other = TRACE + 'corruption = { type = "OtherClip", seed = 1 }\n'
    plan = planned(Study.read(written(folder, STUDY + other + SCORE)))
    write_list(plan, folder / "study")
    assert not [its.failure for its in run_local(plan.units, folder / "study") if its.failure]
    return folder


def moved(study: Path, to: Path) -> Path:
    """A copy of the whole, whose study says nothing of a place that is still there."""
    shutil.copytree(study, to, dirs_exist_ok=True)
    change_list(to, path="/nowhere/study.toml")
    return to / "study"


def change_list(folder: Path, **changed: object) -> None:
    path = folder / "study" / "study.study.json"
    told = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: its for name, its in told.items() if its is not None}))


def test_a_finished_study_is_heard_without_being_told_where_its_clips_are(study, tmp_path, monkeypatch, capsys):
    from test_cli import lalm_lens

    heard = {its.name: its.waveform for its in read_folder(study / "clips")}
    for where in (study / "study", moved(study, tmp_path)):
        assert lalm_lens(monkeypatch, "report", where) == 0
        page = Page(where / "report.html")
        assert len(page.data["sounds"]) == len(page.data["cards"]) == 4
        for card in page.data["cards"]:
            for key, name in (("clean", card["sample"]), ("corrupted", card["corruption"].removeprefix("other clip "))):
                sound, _ = soundfile.read(BytesIO(b64decode(page.data["sounds"][card[key]].partition(",")[2])))
                assert np.corrcoef(sound[: len(heard[name])], heard[name])[0, 1] > 0.9
        assert (where / "report.html").read_text().count("0.50&nbsp;s") == 4


def test_only_what_was_analysed_is_played(study, tmp_path):
    where, clips = moved(study, tmp_path), tmp_path / "clips"
    listed = (clips / "metadata.jsonl").read_text().splitlines()
    changed, gone, missing, kept = (json.loads(line)["file_name"] for line in listed)
    (clips / changed).write_bytes((clips / kept).read_bytes())
    (clips / gone).unlink()
    (clips / "metadata.jsonl").write_text("\n".join(each for each in listed if f'"{missing}"' not in each))
    page = Page(write_report(where))
    cards = {its["sample"]: its for its in page.data["cards"]}
    assert cards[changed]["unheard"] == f"{changed} is not what it was when it was analysed"
    assert cards[gone]["unheard"] == f"{gone} cannot be read: the file {clips / gone} is not there (any more)"
    assert cards[missing]["unheard"] == f"{missing} is not a clip of clips (any more)"
    assert "clean" in cards[kept]
    other = cards[kept]["corruption"].removeprefix("other clip ")
    assert cards[kept]["no_corrupted"] == cards[other]["unheard"]
    assert "clean" in Page(write_report(where, clips=[study / "clips"])).data["cards"][0]  # those that are given win
    given = {its["sample"]: its for its in Page(write_report(where, clips=[clips])).data["cards"]}
    assert given[gone]["unheard"] == cards[gone]["unheard"]
    assert "clean" in given[kept]


def test_a_page_says_why_no_clip_is_played(study, tmp_path):
    where = moved(study, tmp_path)
    shutil.rmtree(tmp_path / "clips")
    text = write_report(where).read_text()
    assert "the clips of clips cannot be found: " in text
    change_list(tmp_path, path=None, from_here=None)  # as an older version wrote it
    assert "no clips were given (--clips), and no study says where they are" in write_report(where).read_text()


def test_a_list_is_not_taken_from_another_study(study, tmp_path):
    where = moved(study, tmp_path)
    mine = planned(Study.read(study / "study.toml"))
    write_list(mine, where)  # the same text, moved
    text = (study / "study.toml").read_text()
    edited = replace(mine, study=replace(mine.study, text=text + "# more"))
    write_list(edited, where)  # the same file, edited
    with pytest.raises(InputError, match=r"is the list of another study, .*Give .* another --out"):
        write_list(replace(mine, study=replace(mine.study, path=tmp_path / "study.toml")), where)
    assert json.loads((where / "study.study.json").read_text())["study"].endswith("# more")


def test_the_page_of_a_study_shows_what_the_study_holds(tmp_path, capsys, monkeypatch):
    from test_cli import lalm_lens

    clips = write_clips(tmp_path / "clips", "gender", 2, seed=5, duration_s=0.5)
    study = written(tmp_path, STUDY + TRACE + SCORE)
    assert lalm_lens(monkeypatch, "run", study, "--report") == 0
    page = Page(tmp_path / "study" / "report.html")
    assert page.data["curves"][-1]["n"] == len(page.data["cards"]) == len(page.data["sounds"]) - 1 == 2
    listed = (clips / "metadata.jsonl").read_text().splitlines()
    (clips / "metadata.jsonl").write_text(listed[0])
    assert lalm_lens(monkeypatch, "run", study, "--report") == 0
    page = Page(tmp_path / "study" / "report.html")
    assert page.data["curves"][-1]["n"] == 1
    left = {json.loads(listed[0])["file_name"]}
    assert {card["sample"] for card in page.data["cards"]} == left
    assert len(list((tmp_path / "study").glob("*.parquet"))) == 4
    (tmp_path / "study" / "study.study.json").unlink()  # tables without a study are all shown
    assert len(Page(write_report(tmp_path / "study")).data["cards"]) == 2


def test_what_no_column_tells_apart_is_named(tmp_path, capsys, monkeypatch):
    """Two datasets with the same file names, and a model in two dtypes; each clip is played that was heard."""
    from test_cli import lalm_lens

    for name, seed in (("clips", 5), ("others", 9)):
        write_clips(tmp_path / name, "gender", 2, seed=seed, duration_s=0.5)
    others = '[[dataset]]\nfolder = "others"\nattributes = ["gender"]\n'
    bfloat16 = f'[[model]]\npath = "{TINY_LALM}"\ndtype = "bfloat16"\n'
    assert lalm_lens(monkeypatch, "run", written(tmp_path, STUDY + others + bfloat16 + TRACE + SCORE), "--report") == 0
    data = Page(tmp_path / "study" / "report.html").data
    found = load_results(tmp_path / "study")
    heard = {name: {its.name: its.waveform for its in read_folder(tmp_path / name)} for name in ("clips", "others")}
    cards = {(card["model"], card["sample"]): card for card in data["cards"]}
    assert len(cards) == len(data["cards"]) == 8
    for dataset in heard:
        for dtype in ("float32", "bfloat16"):
            name = f"tiny_lalm (dataset {dataset}, dtype {dtype})"
            trace = found.table("causal_trace", dataset=dataset, dtype=dtype).frame
            for sample, rows in trace.groupby("sample"):
                card = cards[name, sample]
                assert card["p_clean"] == pytest.approx(rows.p_clean.iloc[0], rel=1e-6)
                sound, _ = soundfile.read(BytesIO(b64decode(data["sounds"][card["clean"]].partition(",")[2])))
                ours = heard[dataset][str(sample)]
                assert np.corrcoef(sound[: len(ours)], ours)[0, 1] > 0.9
            (curve,) = [
                its for its in data["curves"] if its["title"].startswith(name) and its["y"] == "information score"
            ]
            table = found.table("information_score", dataset=dataset, dtype=dtype)
            scores = InformationScore(table.frame).curves()
            np.testing.assert_allclose(curve["lines"][0]["mean"], scores[scores.place == "last"].score)


def test_traces_that_disagree_are_named_by_what_they_were_asked(tmp_path, capsys, monkeypatch):
    from test_cli import lalm_lens

    write_clips(tmp_path / "clips", "gender", 2, seed=5, duration_s=0.5)
    lens = '[[experiment]]\nname = "logit_lens"\npositions = "audio"\n'
    windows = [
        f'[[experiment]]\nname = "causal_trace"\nkinds = ["layer", "audio_window"]\nwindow_s = {each}\n'
        for each in (0.2, 0.3)
    ]
    assert lalm_lens(monkeypatch, "run", written(tmp_path, STUDY + lens + "".join(windows)), "--report") == 0
    cards = Page(tmp_path / "study" / "report.html").data["cards"]
    assert len(cards) == 4
    for card in cards:
        found = card_map(card, "audio_window")
        assert found["words"]
        first = found["columns"][0]
        assert card["title"] == f"tiny_lalm: gender, P3, window_s {first['end_s']:.1f}"


SMALLER = {  # than by default, so that they are quick, or can be done with four clips
    "back_patch": "windows = [1]\nsources = [6]\ntargets = [2]",
    "enrich": "n_probing = 2\nfactors = [0.0, 1.0]\nn_seeds = 1\ngap = 2",
    "probe": "n_folds = 2\nn_controls = 1",
}


SLOW = {"causal_trace", "logit_lens", "pathways", "specification_curve", "ablate", "neuron_gain", "scale_attention"}


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> Path:
    """The results of the experiments that a study can run, about four clips; those that are slow have the same base as
    others, or are drawn by their own tests."""
    folder = tmp_path_factory.mktemp("every")
    write_clips(folder / "clips", "gender", 4, seed=5, duration_s=0.5)
    asked = [
        f'[[experiment]]\nname = "{name}"\n{SMALLER.get(name, "")}\n' for name in experiments() if name not in SLOW
    ]
    plan = planned(Study.read(written(folder, STUDY + "".join(asked))))
    write_list(plan, folder / "study")
    assert not [its.failure for its in run_local(plan.units, folder / "study") if its.failure]
    return folder / "study"


def test_every_experiment_is_on_the_page(every, tmp_path):
    path = write_report(every, n_samples=0, out=tmp_path / "r.html")
    page, text = Page(path), path.read_text(encoding="utf-8")
    results, n_drawn = load_results(every), 0
    for name in set(experiments()) - SLOW - {"information_score"}:
        table, said = results.table(name), name.replace("_", " ")
        assert f"<h2>{said[0].upper() + said[1:]}</h2>" in text
        if name == "object_effect":  # whose clips are all answered right
            assert "Without a summary: tiny_lalm, gender, P3: Of 4 clips 4 are answered right" in text
            continue
        shown = text[text.index(f"<h2>{said[0].upper() + said[1:]}</h2>") :].partition("</section>")[0]
        assert shown.count("<tr") > 1
        lines = table.lines()
        assert ('class="curve"' in shown) == (len(lines) > 0)
        for curve in [its for its in page.data["curves"] if its["title"] == f"{said}: tiny_lalm, gender, P3"]:
            value = next(each for each in lines if each not in ("line", "layer", "low", "high"))
            for line in curve["lines"]:
                its = lines[lines.line == line["name"]].sort_values("layer")
                assert line["layers"] == its.layer.tolist()
                np.testing.assert_allclose(np.array(line["mean"], float), its[value], rtol=1e-6)
                n_drawn += 1
    assert n_drawn > 15
    dominance = TextDominance(results.table("text_dominance").frame).tdr()
    assert f'<td style="--share:{dominance.tdr[0]:.3f}' in text
    assert f"{dominance.tdr[0]:.3f} ({dominance.tdr_low[0]:.3f} to {dominance.tdr_high[0]:.3f})" in text.replace(
        "\N{NO-BREAK SPACE}", " "
    )


@dataclass(frozen=True, repr=False)
class Tomorrow(Table):
    """A table of an experiment that nobody has written yet."""

    NAME: ClassVar[str] = "a table of things of tomorrow"
    HEADLINE: ClassVar[tuple[str, str] | None] = "size", "How large it is"
    COLUMNS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("model", "attribute", "form", "sample", "label"), "str"),
        "thing": "float64",
    }

    def overview(self) -> pd.DataFrame:
        if (self.frame.thing < 0).any():
            raise DataError("No thing is negative.")
        return pd.DataFrame([{"size": self.frame.thing.mean(), "low": 0.125, "high": 0.75}])

    def lines(self) -> pd.DataFrame:
        return pd.DataFrame({"line": "things", "layer": [0, 1], "size": [0.5, self.frame.thing.mean()]})


def test_a_table_of_a_new_kind_is_shown_as_it_says_itself(tmp_path):
    about = {"form": "P3", "sample": "a.wav", "label": "male"}
    asked = [("one", "gender", 0.25), ("one", "animal", 0.75), ("other", "gender", 0.5), ("bad", "gender", -1.0)]
    rows = [{"model": model, "attribute": name, "thing": thing, **about} for model, name, thing in asked]
    Tomorrow.concat([pd.DataFrame(rows)]).save(tmp_path / "t.parquet")
    text = write_report(tmp_path).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert "<h2>Things of tomorrow</h2>" in text
    assert "<td>0.250 (0.125 to 0.750)</td>" in text
    cells = [("0.250", "0.25"), ("0.750", "0.75"), ("0.500", "0.50")]
    small = "<br><small>0.12 to 0.75</small></td>"
    assert re.findall(rf'<td style="--share:([\d.]+)">([\d.]+){small}', text) == cells
    assert re.search(rf'row">other</th><td [^>]*>0.50{small}<td>-</td>', text)
    assert "<figcaption>How large it is</figcaption>" in text
    assert "Without a summary: bad, gender, P3: No thing is negative." in text
    curves = Page(tmp_path / "report.html").data["curves"]
    assert [its["lines"][0]["mean"][1] for its in curves] == [0.25, 0.75, 0.5]


def test_models_and_attributes_stand_in_the_order_of_the_study(folder, tmp_path):
    trace, scores = (
        load(folder / path).frame
        for load, path in ((CausalTrace.load, "a/t.parquet"), (InformationScore.load, "b/scores.parquet"))
    )
    asked = [("z", "emotion"), ("z", "animal"), ("a", "emotion"), ("a", "animal")]
    for n, (model, attribute) in enumerate(asked):
        CausalTrace(trace.assign(model=model, attribute=attribute)).save(tmp_path / f"{n}.parquet")
        InformationScore(scores.assign(model=model, attribute=attribute)).save(tmp_path / f"{n}s.parquet")
    text = write_report(tmp_path, n_samples=0).read_text(encoding="utf-8")
    for its in re.findall(r'<table class="matrix">.*?</table>', text):
        assert re.findall(r"<th>(\w+)</th>", its) == ["emotion", "animal"]
        assert re.findall(r'row">(\w+)</th>', its) == ["z", "a"]
    titles = [its["title"].partition(",")[0] for its in Page(tmp_path / "report.html").data["curves"]]
    assert titles == 2 * [f"{model}: {attribute}" for model, attribute in asked]


def test_the_overview_holds_the_numbers_of_the_tables(page, folder, clips, tmp_path):
    text = write_report(folder, clips=[clips], out=tmp_path / "r.html").read_text(encoding="utf-8")
    trace, scores = CausalTrace.load(folder / "a" / "t.parquet"), InformationScore.load(folder / "b" / "scores.parquet")
    found = {
        title: re.findall(r'--share:([\d.]+)">([^<]*)<', figure)
        for title, figure in re.findall(r"<figcaption>([\w ]+) <span.*?(<table.*?</table>)", text, re.DOTALL)
    }
    n_layers = trace.frame.layer.max() + 1
    fusion, last = trace.summary().fusion_layer[0], scores.table().query("place == 'last'").iloc[0]
    assert found["Fusion layer"] == [(f"{fusion / n_layers:.3f}", f"{fusion:.0f}")]
    means = trace.aggregate(("segment", "layer"))
    peak = means[means.segment.isin(["early", "object", "late"])]["mean"].max()
    assert found["Peak recovery of one word"][0][1] == short(peak)
    assert found["Clips that are kept"][0][1] == f"{trace.kept['sample'].nunique()} of {N_CLIPS}"
    assert found["Critical layer"] == [(f"{last.critical_layer / n_layers:.3f}", f"{last.critical_layer:.2f}")]
    assert found["Accuracy"] == [(f"{last.accuracy:.3f}", f"{last.accuracy:.2f}")]
    interval = f"{last.accuracy_low:.2f} to {last.accuracy_high:.2f}, n = {last.n}"
    assert f"{last.accuracy:.2f}<br><small>{interval}</small>" in text.replace(NO_BREAK, " ")


def test_a_matrix_says_why_it_is_empty_and_small_numbers_are_no_zeros():
    rows = pd.DataFrame({"model": "m", "attribute": "gender", "layer": [0, 1], "size": [-1e-4, -0.0]})
    for table, why in ((rows, "several numbers"), (rows.assign(size=np.nan), "not known")):
        found = matrix(table, "size", "Size", "")
        assert found is not None
        assert why in found.note
        assert not found.html
    assert matrix(rows[:0], "size", "Size", "") is None
    cells = re.findall("<td>(.*?)</td>", html(rows.assign(size_low=-2e-4, size_high=0.5)).replace(NO_BREAK, " "))
    assert cells[3::4] == ["-1.0e-04 (-2.0e-04 to 0.500)", "0.000 (-2.0e-04 to 0.500)"]


def test_a_page_tells_of_its_study(study, tmp_path):
    where = moved(study, tmp_path)
    left_out = [
        {"model": "m", "dataset": "clips", "attribute": "gender", "sample": "x.wav", "reason": "It is <silent>."}
    ]
    listed = json.loads((where / "study.study.json").read_text())["units"]
    failures = {
        "probe-1.parquet": {"of": "probe, P3", "reason": "It is <broken>."},
        listed[0]: {"of": "x", "reason": "y"},
    }
    units = {"units": [*listed, "probe-1.parquet", "back_patch-1.parquet"], "failures": failures}
    change_list(tmp_path, excluded=left_out, failed={"gone/model": "There is none."}, **units)
    text = write_report(where, n_samples=0).read_text(encoding="utf-8")
    units = load_results(where).units
    for said in (
        "About this study: study",
        f"tiny_lalm (float32, on cpu, weights {units.fingerprint[0][:8]})",
        "clips, gender: 4 clips (2 ",
        f"torch {units.versions[0]['torch']}",
        "causal trace, information score",
        "x.wav (clips, gender): It is &lt;silent&gt;.",
        "gone/model: There is none.",
        "1 unit is not there yet",
        "<dt>nothing is finished of</dt><dd><div>probe, back patch</div>",
        "<dt>failed</dt><dd><div>probe, P3: It is &lt;broken&gt;.</div></dd>",
        f"work in {len(units)} units",
    ):
        assert said in text, said
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", text)


def test_studies_that_share_runs_show_the_first(study, tmp_path):
    """They differ in their batches alone, and so in last digits."""
    where = moved(study, tmp_path)
    told = json.loads((where / "study.study.json").read_text())
    again = []
    for name in told["units"]:
        kind = CausalTrace if name.startswith("causal_trace") else InformationScore
        about = pyarrow.parquet.read_schema(where / name).metadata[ABOUT].decode()
        frame = kind.load(where / name).frame
        number = "recovery" if kind is CausalTrace else "probability"
        kind(frame.assign(**{number: frame[number] + 1e-9})).write(
            where / f"{name}.again.parquet", {ABOUT.decode(): about}
        )
        again.append(f"{name}.again.parquet")
    (where / "study_of_other_shards.study.json").write_text(json.dumps(told | {"units": again}))
    page, alone = Page(write_report(where)), Page(write_report(study / "study", out=tmp_path / "r.html"))
    assert page.data["curves"] == alone.data["curves"]
    assert "(recovery differs by 1e-09 at most)" in (where / "report.html").read_text()
    assert "in other batches" not in (tmp_path / "r.html").read_text()


def test_a_clip_of_two_units_counts_once(tmp_path):
    """Of other batches, of two studies: the first of them is taken."""
    about, sources = {"model": "m", "attribute": "gender", "form": "P3", "label": "male"}, []
    for n, clips in enumerate((["a.wav", "b.wav"], ["b.wav", "c.wav"])):
        rows = pd.DataFrame([{**about, "sample": name, "thing": float(n)} for name in clips])
        sources.append(Source(Tomorrow.concat([rows]).save(tmp_path / f"{n}.parquet"), Tomorrow, {}))
    ((_, table),) = tables_of(sources)
    assert table.frame["sample"].tolist() == ["a.wav", "b.wav", "c.wav"]
    assert table.frame.thing.tolist() == [0.0, 0.0, 1.0]
