"""A study shows its models what is listed beside the clips."""

import json

import pandas as pd
import PIL.Image
import pytest

from lalm_lens import attention_knockout, swap_audio
from lalm_lens.assets import TINY_LALM, TINY_LALM_AV
from lalm_lens.assets.audio_visual.clips import write_av_clips
from lalm_lens.audio_visual import list_audio_visual, read_audio_visual, swap_clips
from lalm_lens.errors import InputError
from lalm_lens.loading import from_pretrained
from lalm_lens.planning import planned
from lalm_lens.runner import run_local, write_list
from lalm_lens.study import Study
from lalm_lens.study_results import load_results

pytestmark = pytest.mark.numbers

STUDY = f"""
[[model]]
path = "{TINY_LALM_AV}"

[[model]]
path = "{TINY_LALM}"

[[dataset]]
name = "own"
folder = "clips"
attributes = ["animal"]
seen = "own"

[[dataset]]
name = "swapped"
folder = "clips"
attributes = ["animal"]
seen = "swapped"
seed = 3

[[experiment]]
name = "attention_knockout"
shard = 4
chains = [["image", "last"]]
layers = ["all"]
"""
CUT = {"attribute": "animal", "chains": [("image", "last")], "layers": ["all"], "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_av_clips(folder / "clips", n=9, duration_s=0.6)
    (folder / "study.toml").write_text(STUDY)
    return folder


def test_a_study_shows_what_is_listed_beside_the_clips(folder):
    rows = (folder / "clips" / "metadata.jsonl").read_text().splitlines()
    broken, path = json.loads(rows[0]), folder / "clips" / "metadata.jsonl"
    path.write_text("\n".join([json.dumps(broken | {"image": "none.png"}), *rows[1:]]))
    plan = planned(Study.read(folder / "study.toml"))
    path.write_text("\n".join(rows[1:]))
    assert [its for its in plan.failed if str(TINY_LALM) + "," in its]
    assert set(plan.failed.values()) == {
        f"No clip of {name} can be asked about animal: A qwen2_audio model hears and does not see."
        for name in ("own", "swapped")
    }
    left_out = plan.excluded[plan.excluded["sample"] == broken["file_name"]]
    assert left_out.reason.str.contains("none.png cannot be read as a picture").tolist() == [True, True]
    out = folder / "out"
    write_list(plan, out)
    assert not [its.failure for its in run_local(plan.units, out) if its.failure]
    model = from_pretrained(TINY_LALM_AV)
    samples = read_audio_visual(folder / "clips", model.processor)
    for name, given in (("own", samples), ("swapped", swap_audio(samples, seed=3))):
        found = load_results(out).table("attention_knockout", dataset=name).frame
        parts = [attention_knockout(model, given[n : n + 4], **CUT).frame for n in range(0, len(given), 4)]
        pd.testing.assert_frame_equal(found, pd.concat(parts, ignore_index=True), check_exact=True)


def test_a_clip_is_known_by_its_pictures(folder):
    clips = list_audio_visual(folder / "clips")
    swapped = swap_clips(clips)
    before = [its.digest for its in (*clips, *swapped)]
    seen = next(its for its in swapped if its.seen.name == clips[0].name)
    picture = PIL.Image.open(clips[0].pictures[0])
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(clips[0].pictures[0])
    after = [its.digest for its in (*clips, *swapped)]
    changed = [n for n, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    assert changed == [0, len(clips) + swapped.index(seen)]


def test_what_is_seen_is_listed_in_a_folder(folder):
    (folder / "wrong.toml").write_text(STUDY.replace("seed = 3", "cut = true"))
    with pytest.raises(InputError, match="beside whole clips"):
        Study.read(folder / "wrong.toml")
