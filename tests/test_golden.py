"""Every array of every golden set, against what the original implementation stored.

`--golden DIR` takes any folder of sets. A set that has no conversion, or an array that nothing here computes, fails
unless `--allow-missing` names it. Tolerances: logits 1e-4, states and embeddings 2e-5, probabilities 1e-5 and their
logarithms 2e-4 (two logits' worth), all absolute.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import run_branches
from lalm_lens.experiments.cells import Grid, cells
from lalm_lens.experiments.cuts import cuts
from lalm_lens.experiments.lens import Reading, lens
from lalm_lens.experiments.recovery import Case, Recovery, recover
from lalm_lens.golden import inputs_of, tokens_of
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_pretrained, our_conversions, read_config
from lalm_lens.metrics import Answer
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Position, Prompt
from lalm_lens.readouts import Logits
from lalm_lens.results import EMBED_LAYER
from lalm_lens.runs import Run

HERE = Path(__file__).parent
RUNS = ("clean", "corrupted")


@dataclass
class GoldenSet:
    """One folder, and what our model makes of its inputs."""

    folder: Path

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def files(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def model(self):
        return self.load(torch.float32)

    def load(self, dtype: torch.dtype) -> HookedLALM:
        return from_pretrained(self.folder / "checkpoint", dtype=dtype, parts=self.parts)

    @cached_property
    def parts(self) -> dict[str, Path]:
        """Where the parts of a model lie that has any: meta.json says it by their ids."""
        config = json.loads((self.folder / "checkpoint" / "config.json").read_text(encoding="utf-8"))
        folders = {id_: said.split()[0] for id_, said in self.meta.get("subfolders", {}).items()}
        return {
            part.name: self.folder / "checkpoint" / folders[config[part.id_key]]
            for part in our_conversions()[config["model_type"]].parts
        }

    @cached_property
    def tokens(self) -> Tensor:
        return tokens_of(self.files, self.model.lalm_cfg.audio_token)

    @cached_property
    def model_type(self) -> str:
        return read_config(self.folder / "checkpoint")["model_type"]

    def row(self, number: int) -> "GoldenSet":
        """One prompt of the batch as a set of its own, without its padding."""
        prefix, real = f"single.{number}.", self.is_token[number]
        files = {key: its[number, None] for key, its in self.files.items() if len(its) == len(self.is_token)}
        row = GoldenSet(self.folder)
        row.files = {
            key: its[:, real] if self.files[key].shape == self.is_token.shape else its for key, its in files.items()
        }
        row.stored = {key.removeprefix(prefix): its for key, its in self.stored.items() if key.startswith(prefix)}
        row.model, row.meta = self.model, {}
        return row

    def inputs(self, name: str) -> Inputs:
        return inputs_of(self.files, name, self.model.lalm_cfg.audio_token)

    @cached_property
    def is_token(self) -> Tensor:
        return self.files["attention_mask"].bool()

    @cached_property
    def is_audio(self) -> Tensor:
        """The positions of the clip, and of what the original puts there beside it."""
        return self.files["audio_side_mask"]

    @cached_property
    def text_after(self) -> Tensor:
        """The positions after the last audio position: the same columns in a left-padded batch."""
        return torch.arange(int(self.is_audio.nonzero()[:, 1].max()) + 1, self.is_audio.shape[1])

    @cached_property
    def runs(self) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        with torch.no_grad():
            return {name: self.model.run_with_cache(self.inputs(name), return_cache_object=False) for name in RUNS}

    def states(self, name: str) -> dict[str, Tensor]:
        """A run's arrays. What stands at padded positions is no result; it is zero in the stored arrays."""
        logits, cache = self.runs[name]
        is_token = self.is_token[..., None]
        resid_post = torch.stack([cache[f"blocks.{layer}.hook_resid_post"] for layer in range(self.model.cfg.n_layers)])
        return {
            "logits": torch.where(is_token, logits, 0),
            "embeds": torch.where(is_token, cache["hook_embed"], 0),
            "resid_post": torch.where(is_token, resid_post, 0),
            "encoder_output": self.heard(cache["audio_encoder.hook_out"], name, "encoder_output"),
            "projector_output": self.heard(cache["adapter.hook_out"], name, "projector_output"),
            "audio_embeds": self.audio_embeds(cache, name),
            "logits_f64": self.wide_logits[name][:, self.text_after],
        }

    def heard(self, states: Tensor, name: str, key: str) -> Tensor:
        """As they are stored: of whole windows, of the longest clip, or, where a model pads nothing, of the sound
        alone."""
        if states.ndim == 4:
            return states.movedim(2, 0)  # what a Q-Former looks at, by tap
        n_audio, stored = self.model.audio_encoder.n_audio(self.inputs(name).n_frames), self.stored.get(f"{name}.{key}")
        if stored is None or stored.shape[:-1] == (len(states), n_audio.max()):
            return states[:, : n_audio.max()]
        if stored.shape[:-1] != (n_audio.sum(),):
            return states
        return states[torch.arange(states.shape[1]) < n_audio[:, None]]

    def audio_embeds(self, cache: dict[str, Tensor], name: str) -> Tensor:
        """The rows of the clip; of Qwen-Audio with those of its marks."""
        rows = {which: cache["hook_embed"][self.files[which]] for which in ("audio_mask", "audio_side_mask")}
        assert torch.equal(rows["audio_mask"], cache["hook_audio_embed"])
        stored = self.stored.get(f"{name}.audio_embeds", ())
        return next((its for its in rows.values() if len(its) == len(stored)), cache["hook_audio_embed"])

    @cached_property
    def wide_logits(self) -> dict[str, Tensor]:
        wide = self.load(torch.float64)
        with torch.no_grad():
            return {name: wide(self.inputs(name)) for name in RUNS}

    @cached_property
    def targets(self) -> Tensor:
        return self.runs["clean"][0][:, -1].argmax(-1)

    def alone(self, name: str, row: int) -> Inputs:
        """One prompt of the batch, without its padding."""
        inputs, real = self.inputs(name), self.is_token[row]
        return Inputs(
            inputs.tokens[row, real][None], real[real][None], inputs.mel[row, None], inputs.n_frames[row, None]
        )

    @cached_property
    def recoveries(self) -> list[Recovery]:
        cases = [self.case(row, Answer((int(target),))) for row, target in enumerate(self.targets)]
        return recover(self.model, cases, engine="sweep")

    def case(self, row: int, answer: Answer) -> Case:
        clean, corrupted = (Run(self.alone(name, row), self.prompt(row)) for name in RUNS)
        n_pos = len(self.prompt(row).tokens)
        after = tuple(range(n_pos - len(self.text_after), n_pos))  # DeSTA2 has a token of text between the audio
        found = cells(self.model, Grid(), clean)
        return Case(clean, corrupted, answer, [replace(c, positions=after) if c.kind == "layer" else c for c in found])

    def prompt(self, row: int) -> Prompt:
        """What is heard, a transcript of it, and all else, as the stored masks say."""
        sides = (self.files[f"{name}_mask"][row, self.is_token[row]].tolist() for name in ("audio", "audio_side"))
        where = ("audio" if audio else "transcript" if side else "late" for audio, side in zip(*sides, strict=True))
        tokens = tuple(self.alone("clean", row).tokens[0].tolist())
        return Prompt(tokens, tuple(Position("", region) for region in where))

    def patched(self, kind: str, embed: bool = False) -> Tensor:
        """[batch, layer (, position)] of the patched runs of one kind; with `embed`, those of the embedding."""
        rows = []
        for recovery in self.recoveries:
            of_kind = [
                p
                for patch, p in zip(recovery.cells, recovery.p_patched, strict=True)
                if patch.kind == kind and (patch.layer == EMBED_LAYER) == embed
            ]
            rows.append(torch.stack(of_kind))
        return torch.stack(rows)

    def traces(self) -> dict[str, Tensor]:
        p_clean = torch.tensor([recovery.p_clean for recovery in self.recoveries], dtype=torch.float64)
        p_corrupted = torch.tensor([recovery.p_corrupted for recovery in self.recoveries], dtype=torch.float64)
        p_layer = self.patched("layer")
        p_token = self.patched("token").unflatten(1, (self.model.cfg.n_layers, -1))
        gap = p_clean - p_corrupted
        return {
            "p_clean": p_clean,
            "p_corrupted": p_corrupted,
            "p_layer": p_layer,
            "p_token": p_token,
            "p_audio_layer": self.patched("audio_layer"),
            "p_embed_text": self.patched("layer", embed=True)[:, 0],
            "p_embed_audio": self.patched("audio_layer", embed=True)[:, 0],
            "rr_layer": (p_layer - p_corrupted[:, None]) / gap[:, None],
            "rr_token": (p_token - p_corrupted[:, None, None]) / gap[:, None, None],
            "target_ids": self.targets,
            "label_ids": self.label_ids(),
            "text_after_positions": self.text_after,
        }

    def label_ids(self) -> Tensor:
        """The labels are asked of us. A wrong one makes the lens arrays differ."""
        labels = self.stored["label_ids"]
        assert len(set(labels.tolist())) == len(labels) > 1, "label_ids are not distinct labels"
        return labels

    def lens(self, name: str) -> dict[str, Tensor]:
        """Label probabilities from every block's last state, with and without the final norm."""
        inputs, labels = self.inputs(name), tuple(self.label_ids().tolist())
        is_last = torch.arange(inputs.tokens.shape[1]).expand_as(inputs.tokens) == inputs.tokens.shape[1] - 1
        readings = {"label_probs": Reading(labels), "label_probs_no_final_norm": Reading(labels, norm=False)}
        said = {key: lens(self.model, inputs, is_last, reading).log_prob for key, reading in readings.items()}
        return {key: log_prob.transpose(0, 1).double().exp() for key, log_prob in said.items()}

    @cached_property
    def knocked_out(self) -> dict[str, Tensor]:
        """Clean run in which the last position may look at none of the keys of a place, in any layer or head."""
        runs, found = [Run(self.alone("clean", row), self.prompt(row)) for row in range(len(self.is_token))], {}
        for side in ("audio", "audio_side"):
            whole = [cut for run in runs for cut in cuts(self.model, run, [(side, (-1,))], ["all"], "all")]
            branches = [Branch(run, cut.knockouts) for run, cut in zip(runs, whole, strict=True)]
            found[side] = run_branches(self.model, branches, Logits(), engine="sweep").values[:, 0]
        return found

    def computed(self) -> dict[str, Tensor]:
        arrays = {f"{name}.{key}": value for name in RUNS for key, value in self.states(name).items()}
        arrays |= {f"lens.{name}.{key}": value for name in RUNS for key, value in self.lens(name).items()}
        arrays |= {f"knockout.{side}.logits_last": logits for side, logits in self.knocked_out.items()}
        return arrays | self.traces()


def compare(name: str, ours: Tensor, stored: Tensor) -> None:
    exact = not stored.is_floating_point()
    if name.endswith("projector_output"):  # Voxtral's has its clips one after the other
        ours = ours.reshape(stored.shape)
    if "logits" in name:
        atol = 1e-4
    elif name.startswith(("p_", "lens.")):
        atol = 1e-5
        assert_close(ours.log(), stored.log(), rtol=0, atol=2e-4, msg=lambda text: f"log of {name}: {text}")
    elif name.startswith("rr_"):
        atol = 2e-4  # probabilities differ by 1e-5 at most, the gaps of golden sets are 0.05 or more
    else:
        atol = 2e-5
    assert_close(
        ours,
        stored,
        rtol=0,
        atol=0 if exact else atol,
        check_dtype="f64" not in name,
        msg=lambda text: f"{name}: {text}",
    )


def compare_all(golden: GoldenSet, allowed: set[str]) -> int:
    """Compare every stored array; returns how many were compared."""
    name = golden.folder.name
    for file in ("meta.json", "inputs.safetensors", "expected.safetensors"):
        assert (golden.folder / file).is_file(), f"{name}: no {file}"
    assert golden.model_type in our_conversions(), f"{name}: no conversion for {golden.model_type}"
    alone = rows_alone(golden)
    if alone:
        return sum(compare_all(row, allowed) for row in alone)
    stored = set(golden.stored) - allowed
    lost = set(golden.meta.get("shapes", {}).get("expected", {})) - set(golden.stored)
    assert not lost, f"{name}: meta.json lists {sorted(lost)}, which are not stored"
    empty = [key for key in stored if golden.stored[key].numel() == 0]
    assert not empty, f"{name}: {empty} hold nothing to compare"
    assert stored, f"{name}: nothing to compare"
    asks_the_lens = "label_ids" not in stored or any(key.startswith("lens.") for key in stored)
    assert asks_the_lens, f"{name}: label_ids are compared by the lens arrays alone, and there are none"
    computed = golden.computed()
    missing = stored - set(computed)
    assert not missing, f"{name}: nothing compares {sorted(missing)}"
    for key in sorted(stored):
        compare(key, computed[key], golden.stored[key])
    return len(stored)


def rows_alone(golden: GoldenSet) -> list[GoldenSet]:
    """The rows of a batch that the original answers otherwise than each of them alone: `single.{b}.*` is what it says
    to them alone, as we do."""
    numbers = sorted({int(key.split(".")[1]) for key in golden.stored if key.startswith("single.")})
    assert not numbers or numbers == list(range(len(golden.is_token))), (
        f"{golden.folder.name}: a row is not there alone"
    )
    return [golden.row(number) for number in numbers]


def sets_in(root: Path) -> list[Path]:
    """Every folder is a set: one that lacks its files must fail, not go unseen."""
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] not in "._")


def names_allowed(config: pytest.Config) -> set[str]:
    return {name for name in config.getoption("allow_missing").split(",") if name}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_folder" in metafunc.fixturenames:
        root, allowed = metafunc.config.getoption("golden"), names_allowed(metafunc.config)
        folders = sets_in(root) if root.is_dir() else []
        metafunc.parametrize("golden_folder", [f for f in folders if f.name not in allowed], ids=lambda f: f.name)


def test_golden_sets_are_there(pytestconfig):
    root, allowed = pytestconfig.getoption("golden"), names_allowed(pytestconfig)
    assert root.is_dir(), f"{root} is no folder"
    names = {path.name for path in sets_in(root)}
    assert names - allowed, f"{root} holds no golden set that is to be compared"
    whole = [folder for folder in sets_in(root) if (folder / "expected.safetensors").is_file()]
    arrays = {key for folder in whole for key in GoldenSet(folder).stored}
    assert allowed <= names | arrays, f"--allow-missing names {sorted(allowed - names - arrays)}, which are not there"


def test_every_stored_array_is_ours(golden_folder, pytestconfig, record_property):
    record_property("compared", compare_all(GoldenSet(golden_folder), names_allowed(pytestconfig)))


@pytest.fixture(scope="module")
def small() -> GoldenSet:
    return GoldenSet(HERE / "golden" / "qwen2_audio")


SMALL_ARRAYS = sorted(load_file(HERE / "golden" / "qwen2_audio" / "expected.safetensors"))


@pytest.mark.parametrize("name", SMALL_ARRAYS)
def test_one_changed_number_fails(small, name, monkeypatch):
    changed = small.stored[name].clone()
    changed.view(-1)[-1] += 1 if not changed.is_floating_point() else 1e-3
    monkeypatch.setitem(small.stored, name, changed)
    with pytest.raises(AssertionError):
        compare_all(small, set())


def test_an_array_that_nothing_compares_fails(small, monkeypatch):
    monkeypatch.setitem(small.stored, "clean.something_new", torch.zeros(3))
    with pytest.raises(AssertionError, match="nothing compares"):
        compare_all(small, set())
    assert compare_all(small, {"clean.something_new"}) == len(SMALL_ARRAYS)


@pytest.mark.parametrize("name", ["lens.clean.label_probs", "clean.logits"])
def test_an_array_that_was_taken_out_or_emptied_fails(small, monkeypatch, name):
    monkeypatch.setitem(small.stored, name, small.stored[name][:0])
    with pytest.raises(AssertionError, match="nothing to compare"):
        compare_all(small, set())
    monkeypatch.delitem(small.stored, name)
    with pytest.raises(AssertionError, match="which are not stored"):
        compare_all(small, set())


def test_rows_that_stand_alone_are_compared_alone():
    alone = GoldenSet(HERE / "golden" / "qwen_audio")
    batch, n_pad = GoldenSet(alone.folder), 4
    pad = {"input_ids", *(key for key in alone.files if key.endswith("mask"))}
    twice = {key: torch.cat([its, its]) for key, its in alone.files.items() if key != "waveform"}
    batch.files = {key: F.pad(its, (n_pad, 0)) if key in pad else its for key, its in twice.items()}
    batch.stored = {f"single.{row}.{key}": its.clone() for row in (0, 1) for key, its in alone.stored.items()}
    assert compare_all(batch, set()) == 2 * len(alone.stored)
    batch.stored["single.1.clean.logits"][0, -1, -1] += 1e-3
    with pytest.raises(AssertionError, match=r"clean\.logits"):
        compare_all(batch, set())
    batch.stored = {key: its for key, its in batch.stored.items() if "single.0" in key}
    with pytest.raises(AssertionError, match="a row is not there alone"):
        compare_all(batch, set())


def test_a_set_without_a_conversion_fails(small, monkeypatch):
    monkeypatch.setattr(small, "model_type", "never_heard_of")
    with pytest.raises(AssertionError, match="no conversion"):
        compare_all(small, set())


def test_a_folder_without_its_files_fails(tmp_path):
    with pytest.raises(AssertionError, match=r"no meta\.json"):
        compare_all(GoldenSet(tmp_path), set())
