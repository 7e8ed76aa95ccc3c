"""Every array of every golden set, against what the original implementation stored.

`--golden DIR` takes any folder of sets. A set that has no conversion, or an array that nothing here computes, fails
unless `--allow-missing` names it. Tolerances: logits 1e-4, states and embeddings 2e-5, probabilities 1e-5 and their
logarithms 2e-4 (two logits' worth), all absolute.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from lalm_lens.experiments.cells import Grid, cells
from lalm_lens.experiments.lens import Reading, lens
from lalm_lens.experiments.recovery import Case, Recovery, recover
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_pretrained, our_conversions
from lalm_lens.metrics import Answer
from lalm_lens.prompts import Position, Prompt
from lalm_lens.results import EMBED_LAYER
from lalm_lens.runs import Run

HERE = Path(__file__).parent
INPUT_NAMES = ("input_ids", "attention_mask", "feature_attention_mask", "input_features_mask")
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
        return from_pretrained(self.folder / "checkpoint")

    def inputs(self, name: str) -> Inputs:
        batch = {key: self.files[key] for key in INPUT_NAMES if key in self.files}
        return Inputs.from_hf({**batch, "input_features": self.files[f"{name}.input_features"]})

    @cached_property
    def is_token(self) -> Tensor:
        return self.files["attention_mask"].bool()

    @cached_property
    def is_audio(self) -> Tensor:
        return self.files["input_ids"] == self.model.lalm_cfg.audio_token

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
            "audio_embeds": cache["hook_audio_embed"],
            "logits_f64": self.wide_logits(name)[:, self.text_after],
        }

    def heard(self, states: Tensor, name: str, key: str) -> Tensor:
        """As they are stored: of whole windows, or, where a model pads nothing, of the sound alone."""
        n_audio = self.model.audio_encoder.n_audio(self.inputs(name).n_frames)
        if self.stored[f"{name}.{key}"].shape[:-1] != (n_audio.sum(),):
            return states
        return states[torch.arange(states.shape[1]) < n_audio[:, None]]

    def wide_logits(self, name: str) -> Tensor:
        wide = from_pretrained(self.folder / "checkpoint", dtype=torch.float64)
        with torch.no_grad():
            return wide(self.inputs(name))

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
        tokens = self.alone("clean", row).tokens[0].tolist()
        where = ("audio" if token == self.model.lalm_cfg.audio_token else "late" for token in tokens)
        prompt = Prompt(tuple(tokens), tuple(Position("", region) for region in where))
        clean, corrupted = (Run(self.alone(name, row), prompt) for name in RUNS)
        return Case(clean, corrupted, answer, cells(self.model, Grid(), clean))

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

    def knocked_out(self, keys: Tensor) -> Tensor:
        """Clean run in which the last position may look at none of `keys`, in any layer or head."""

        def close(scores: Tensor, hook: object) -> Tensor:
            scores[:, :, -1].masked_fill_(keys[:, None], -torch.inf)
            return scores

        hooks = [(f"blocks.{layer}.attn.hook_attn_scores", close) for layer in range(self.model.cfg.n_layers)]
        with torch.no_grad():
            return self.model.run_with_hooks(self.inputs("clean"), fwd_hooks=hooks, logits_at=-1)[:, -1]

    def computed(self) -> dict[str, Tensor]:
        arrays = {f"{name}.{key}": value for name in RUNS for key, value in self.states(name).items()}
        arrays |= {f"lens.{name}.{key}": value for name in RUNS for key, value in self.lens(name).items()}
        arrays |= {
            f"knockout.{side}.logits_last": self.knocked_out(self.files[f"{side}_mask"])
            for side in ("audio", "audio_side")
        }
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
    conversions = our_conversions()
    assert golden.meta["model"] in conversions, f"{name}: no conversion for {golden.meta['model']}"
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


def test_a_set_without_a_conversion_fails(small, monkeypatch):
    monkeypatch.setitem(small.meta, "model", "never_heard_of")
    with pytest.raises(AssertionError, match="no conversion"):
        compare_all(small, set())


def test_a_folder_without_its_files_fails(tmp_path):
    with pytest.raises(AssertionError, match=r"no meta\.json"):
        compare_all(GoldenSet(tmp_path), set())
