"""The interactive page as a reader has it: in Chromium, with a mouse."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from lalm_lens.assets.clips import write_clips
from lalm_lens.corrupt import OtherClip
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.experiments.information_score import InformationScore, information_score
from lalm_lens.experiments.logit_lens import LogitLens, logit_lens
from lalm_lens.report import write_report
from lalm_lens.results import CausalTrace

pytestmark = pytest.mark.numbers

OWN = ("file:", "data:", "blob:")
# Remembers what is played of a decoded sound, of which no element tells anything.
LISTENING = """
const start = AudioBufferSourceNode.prototype.start;
window.started = [];
AudioBufferSourceNode.prototype.start = function (...how) { window.started.push(how); return start.apply(this, how); };
"""
WHERE = """
const [figure, x, y] = arguments, { xaxis, yaxis } = figure.layout;
const its = figure.querySelector(".nsewdrag").getBoundingClientRect();
return [its.left + its.width * (x - xaxis.range[0]) / (xaxis.range[1] - xaxis.range[0]),
        its.bottom - its.height * (y - yaxis.range[0]) / (yaxis.range[1] - yaxis.range[0])];
"""
OUTSIDE = """
return [...document.querySelectorAll(".js-plotly-plot")].filter((figure) => {
  const its = figure.getBoundingClientRect(), drawn = figure.querySelector(".main-svg").getBoundingClientRect();
  return Math.abs(its.height - drawn.height) > 1 || Math.abs(its.width - drawn.width) > 1;
}).map((figure) => figure.className);
"""
CUT_OFF = """
const canScroll = (it) => ["auto", "scroll"].includes(getComputedStyle(it).overflowX);
const scrolls = (it) => it && (canScroll(it) || scrolls(it.parentElement));
const drawn = [...document.querySelectorAll(".js-plotly-plot")];
const titles = drawn.flatMap((figure) => [...figure.querySelectorAll(".gtitle, .xtitle, .ytitle, .legendtext")]);
const boxes = [...document.querySelectorAll("main *")].filter((it) => !it.closest(".figure, .curve") && !scrolls(it));
const outside = (it, its) => {
  const box = it.getBoundingClientRect();
  return box.width && (box.right > its.right + 1 || box.left < its.left - 1);
};
return [...boxes.filter((it) => outside(it, { left: 0, right: innerWidth })),
        ...titles.filter((it) => outside(it, it.closest(".js-plotly-plot").getBoundingClientRect()))]
  .map((it) => it.textContent.slice(0, 80));
"""
MANY_LINES = """
const flat = { layers: [0, 1], mean: [0, 1], low: [null, null], high: [null, null] };
const lines = [...Array(25).keys()].map((n) => ({ ...flat, name: String(n), hidden: n % 10 !== 1 }));
const place = document.createElement("div");
place.dataset.curve = data.curves.push({ title: "many", n: 1, y: "y", marks: [], lines }) - 1;
document.querySelector("main").append(place);
drawCurve(place);
const paints = (traces) => traces.map(({ line }) => [line.color, line.dash]);
return { shown: paints(place.data.filter((its) => its.visible === true)), all: paints(place.data) };
"""
LABEL = """
[...document.querySelectorAll(".hovertext text.nums")].map((label) => {
  const lines = [...label.querySelectorAll("tspan.line")];
  return (lines.length ? lines : [label]).map((line) => line.textContent);
})[0];
"""


def needed(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is missing: apt-get install chromium chromium-driver.", pytrace=False)
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Chrome]:
    """Without a network and with a profile of its own; it tells of each request and each line on the console."""
    options = ChromeOptions()
    options.binary_location = needed("chromium")
    profile = tmp_path_factory.mktemp("profile")
    for how in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1300,900",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(how)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = Chrome(options, ChromeService(needed("chromedriver")))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": LISTENING})
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> tuple[Path, dict[str, Sample]]:
    folder = write_clips(tmp_path_factory.mktemp("clips"), "gender", 2, seed=3)
    return folder, {sample.name: sample for sample in read_folder(folder)}


@pytest.fixture(scope="module")
def tables(tiny_lalm, samples, tmp_path_factory) -> Path:
    out, clips = tmp_path_factory.mktemp("tables"), list(samples[1].values())
    how: dict = {"attribute": "gender", "progress": False}
    causal_trace(tiny_lalm, clips, corruption=OtherClip(), audio="windows", window_s=0.4, **how).save(out / "t.parquet")
    logit_lens(tiny_lalm, clips, positions="audio", **how).save(out / "lens.parquet")
    information_score(tiny_lalm, clips, forms=["P3"], label_spaces=(True,), **how).save(out / "scores.parquet")
    return out


@pytest.fixture(scope="module")
def report(tables, samples) -> Path:
    return write_report(tables, clips=[samples[0]])


@pytest.fixture
def page(chromium, report) -> Iterator[Chrome]:
    """All of it drawn. Whatever is done with it, it fetches nothing, and nothing goes wrong."""
    show(chromium, report)
    yield chromium
    assert complaints(chromium) == []


def show(browser: Chrome, report: Path) -> None:
    complaints(browser)
    browser.get(report.as_uri())
    for place in browser.find_elements(By.CSS_SELECTOR, "[data-curve], [data-card]"):
        into_view(browser, place)
        until(browser, "it.dataset.drawn", place)


def complaints(browser: Chrome) -> list[str]:
    """Requests that leave the page and its file, and errors on the console, since the last time."""
    told = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [its["params"] for its in told if its["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated")]
    urls = [its["request"]["url"] if "request" in its else its["url"] for its in sent]
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    return [url for url in urls if not url.startswith(OWN)] + errors


def until(browser: Chrome, expression: str, *about: object) -> Any:
    """What is found in the page, as soon as it is anything; `it` and `other` are what it is about."""
    script = f"const [it, other] = arguments; return {expression.strip()}"
    return WebDriverWait(browser, 20, poll_frequency=0.02).until(lambda _: browser.execute_script(script, *about))


def into_view(browser: Chrome, element: WebElement) -> None:
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", element)


def point(browser: Chrome, x: float, y: float, *, click: bool = False) -> None:
    mouse = ActionBuilder(browser, duration=0)
    mouse.pointer_action.move_to_location(round(x), round(y))
    if click:
        mouse.pointer_action.click()
    mouse.perform()


def label_at(browser: Chrome, figure: WebElement, x: float, y: float) -> str:
    """What is said where the mouse points, its lines joined."""
    into_view(browser, figure)
    point(browser, 1, 1)
    until(browser, "document.querySelector('.hovertext') === null")
    point(browser, *browser.execute_script(WHERE, figure, x, y))
    return "\n".join(until(browser, LABEL))


def cards(browser: Chrome) -> dict[str, WebElement]:
    """The articles by clip."""
    found = browser.find_elements(By.TAG_NAME, "article")
    return {its.find_element(By.TAG_NAME, "h3").text.split()[0]: its for its in found}


def maps(card: WebElement) -> tuple[WebElement, WebElement]:
    """Of the audio, of the text."""
    audio, text = card.find_elements(By.CSS_SELECTOR, ".map")
    return audio, text


def numbers(said: str) -> list[float]:
    return [float(its) for its in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", said)]


def test_a_page_that_fetches_is_seen(chromium, tmp_path):
    evil = tmp_path / "evil.html"
    evil.write_text("<script>fetch('http://example.org/a'); nothing();</script>")
    complaints(chromium)
    chromium.get(evil.as_uri())
    seen = complaints(chromium)
    assert "http://example.org/a" in seen
    assert any("nothing is not defined" in each for each in seen)


def test_it_loads_without_a_request_or_an_error(page, tables):
    trace = CausalTrace.load(tables / "t.parquet").frame
    assert set(cards(page)) == set(trace["sample"])
    assert all(len(maps(card)) == 2 for card in cards(page).values())
    assert len(page.find_elements(By.CSS_SELECTOR, ".curve .main-svg")) >= 2
    figure = page.find_element(By.CSS_SELECTOR, ".curve")
    into_view(page, figure)
    hidden = "[...it.querySelectorAll('.traces')].filter((line) => line.style.opacity === '0.5').length"
    n_hidden = until(page, hidden, figure)
    its = until(page, "[...it.querySelectorAll('.legendtoggle')].at(-1).getBoundingClientRect()", figure)
    point(page, its["left"] + 20, its["top"] + its["height"] / 2, click=True)
    until(page, f"{hidden} === other", figure, n_hidden - 1)
    page.find_element(By.ID, "theme").click()
    assert until(page, hidden, figure) == n_hidden - 1  # what was switched on stays


def test_visible_lines_have_colours_of_their_own(page):
    drawn = page.execute_script(MANY_LINES)
    assert len({tuple(its) for its in drawn["shown"]}) == 3
    assert len({colour for colour, _ in drawn["shown"]}) == 3
    assert len({tuple(its) for its in drawn["all"]}) == len(drawn["all"]) == 25


def test_a_narrower_window_draws_again(page):
    figure = page.find_element(By.CSS_SELECTOR, ".map")
    wide = page.execute_script("return arguments[0].layout.margin.l", figure)
    screen = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    until(page, "it.layout.margin.l < other", figure, wide)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_players_play(page, samples):
    page.execute_script("document.querySelectorAll('audio').forEach((it) => { it.loop = true; })")
    for name, card in cards(page).items():
        into_view(page, card)
        for player in card.find_elements(By.TAG_NAME, "audio"):
            duration_s = until(page, "it.duration", player)
            assert duration_s == pytest.approx(len(samples[1][name].waveform) / 16_000, abs=0.05)
            its = until(page, "it.getBoundingClientRect()", player)
            assert player.get_property("paused")
            point(page, its["left"] + 18, its["top"] + its["height"] / 2, click=True)  # its button
            until(page, "it.currentTime > 0.1", player)
            assert player.get_property("error") is None
            playing = page.execute_script("return [...document.querySelectorAll('audio')].filter((it) => !it.paused)")
            assert playing == [player]  # one sound at a time
    page.execute_script("document.querySelectorAll('audio').forEach((it) => it.pause())")


def test_pointing_at_a_word_tells_its_row(page, tables):
    trace = CausalTrace.load(tables / "t.parquet").frame
    for name, card in cards(page).items():
        rows = trace[(trace["sample"] == name) & (trace.kind == "token")]
        positions, layers = sorted(rows.position.unique()), sorted(rows.layer.unique())
        assert layers[0] == -1
        for column, row in ((0, 0), (len(positions) // 2, 3), (len(positions) - 1, len(layers) - 1)):
            its = rows[(rows.position == positions[column]) & (rows.layer == layers[row])].iloc[0]
            where, layer, recovery = label_at(page, maps(card)[1], column, row).split("\n")
            said = [its.token.replace("\n", "\\n").replace(" ", "\u2423"), f"position {its.position}"]
            assert where.split(", ")[-3:-1] == said
            assert layer == f"layer {'embed' if its.layer < 0 else its.layer}"
            assert numbers(recovery) == pytest.approx([its.recovery], rel=1e-3)


def test_pointing_at_the_audio_tells_its_row_and_words(page, tables):
    trace, lens = CausalTrace.load(tables / "t.parquet").frame, LogitLens.load(tables / "lens.parquet").frame
    for name, card in cards(page).items():
        rows = trace[(trace["sample"] == name) & (trace.kind == "audio_window")].sort_values(["layer", "start_s"])
        layers = sorted(rows.layer.unique())
        for layer in layers[1:4:2]:
            its = rows[rows.layer == layer].iloc[1]
            said = label_at(page, maps(card)[0], (its.start_s + its.end_s) / 2, layers.index(layer)).split("\n")
            assert f"{its.start_s:.2f} to {its.end_s:.2f} s" in said[0]
            assert said[1] == f"layer {layer}"
            assert numbers(said[2]) == pytest.approx([its.recovery], rel=1e-3)
            heard = (lens.start_s + lens.end_s).between(2 * its.start_s, 2 * its.end_s) & (lens.kind == "top")
            top = lens[(lens["sample"] == name) & (lens.layer == layer) & heard].nlargest(1, "probability").iloc[0]
            word = top.word.replace(" ", "\u2423")
            word = word if any(map(str.isalnum, word)) else f"\u201c{word}\u201d"
            assert said[3].startswith(f"the lens says: {word} {top.probability:.3f}")


def test_pointing_at_a_curve_tells_its_means(page, tables):
    means = CausalTrace.load(tables / "t.parquet").aggregate()
    scores = InformationScore.load(tables / "scores.parquet").curves()
    of_trace, of_scores = page.find_elements(By.CSS_SELECTOR, ".curve")
    text = means[means.kind == "layer"].set_index("layer")
    last = scores[scores.place == "last"].set_index("layer").assign(mean=lambda its: its.score)
    for figure, table, layer in ((of_trace, text, 2), (of_scores, last, 4)):
        row = table.loc[layer]
        said = numbers(label_at(page, figure, layer, row.to_dict()["mean"]).split("\n")[0])
        assert said == pytest.approx([layer, row["mean"], row.low, row.high], abs=6e-4)


def test_a_click_seeks_and_plays_what_was_clicked(page, tables):
    trace = CausalTrace.load(tables / "t.parquet").frame
    name, card = next(iter(cards(page).items()))
    windows = trace[(trace["sample"] == name) & (trace.kind == "audio_window")].drop_duplicates("start_s")
    start_s, end_s = windows.sort_values("start_s")[["start_s", "end_s"]].iloc[2]
    (audio, text), spectrogram = maps(card), card.find_element(By.CSS_SELECTOR, ".spectrogram")
    clean, corrupted = card.find_elements(By.TAG_NAME, "audio")
    told = card.find_element(By.CSS_SELECTOR, ".told")
    for player, which, figure, row in ((clean, "clean", audio, 2), (corrupted, "corrupted", spectrogram, 20)):
        card.find_element(By.XPATH, f".//option[text()='{which}']").click()
        label_at(page, figure, (start_s + end_s) / 2, row)
        point(page, *page.execute_script(WHERE, figure, (start_s + end_s) / 2, row), click=True)
        expected = f"Played {start_s:.2f} to {end_s:.2f} s of the {which} clip."
        until(page, "it.textContent === other", told, expected)
        assert page.execute_script("return window.started.pop()") == pytest.approx([0, start_s, end_s - start_s])
        assert player.get_property("currentTime") == pytest.approx(start_s, abs=0.01)
        assert player.get_property("paused")
    assert page.execute_script("return window.started") == []
    label_at(page, text, 3, 2)
    point(page, *page.execute_script(WHERE, text, 3, 2), click=True)
    until(page, "it.textContent === 'This is text: there is nothing to play.'", told)
    assert page.execute_script("return window.started") == []


def test_nothing_long_is_cut_off(chromium, tables, tmp_path):
    """A long name of a model, a wide list and six attributes: what does not fit is wrapped, or scrolls by itself."""
    scores = InformationScore.load(tables / "scores.parquet").frame
    name = "An-Organisation/a-model-with-a-very-long-name-of-many-parts-instruct-v2-and-more"
    for n in range(6):
        InformationScore(scores.assign(model=name, attribute=f"attribute{n}")).save(tmp_path / f"{n}.parquet")
    report = write_report(tmp_path)
    for width in (1300, 390):
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        show(chromium, report)
        chromium.find_element(By.TAG_NAME, "summary").click()
        lists = chromium.find_elements(By.CSS_SELECTOR, ".wide")
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
        scrolls = chromium.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", lists[-1])
        assert scrolls or width == 1300
        assert chromium.execute_script(CUT_OFF) == []
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert complaints(chromium) == []


def test_clips_are_compared_on_one_scale_or_looked_at_on_their_own(page, tables):
    trace = CausalTrace.load(tables / "t.parquet").frame
    windows = trace[trace.kind == "audio_window"]
    largest = windows.recovery.abs().groupby(windows["sample"]).max()
    assert largest.nunique() == 2
    ends = "return arguments[0].data[0].zmax"
    for is_own, said in ((False, "common scale"), (True, "its own scale")):
        if is_own:
            page.find_element(By.ID, "own").click()
        for name, card in cards(page).items():
            expected = min(1.0, largest[name] if is_own else largest.max())
            assert page.execute_script(ends, maps(card)[0]) == pytest.approx(expected, rel=1e-6)
            assert page.execute_script(ends, maps(card)[1]) == 1
            assert said in maps(card)[0].text


def test_it_fits_the_screen_in_light_and_dark(page, report, tmp_path):
    for width in (1300, 390):
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        show(page, report)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        height = page.execute_script("return document.documentElement.scrollHeight")
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**screen, "height": height})
        until(page, "innerHeight === it", height)
        light, dark = (picture(page, scheme, tmp_path / f"{scheme}_{width}.png") for scheme in ("light", "dark"))
        assert light.shape == dark.shape == (height, width, 3)
        assert np.median(light) > 0.9
        assert np.median(dark) < 0.2
        assert page.execute_script(OUTSIDE) == []
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def picture(browser: Chrome, scheme: str, path: Path) -> np.ndarray:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    until(browser, "document.documentElement.dataset.theme === it", scheme)
    assert browser.save_screenshot(str(path))
    return plt.imread(path)[..., :3]
