"""Activations in files are those of the model."""

import pandas as pd
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import read_folder
from lalm_lens.errors import HookError, InputError
from lalm_lens.experiments.activations import save_activations

NAMES = ["blocks.2.hook_resid_post", "blocks.5.attn.hook_z"]


def test_files_hold_what_the_model_computes(tiny_lalm, folders, tmp_path):
    samples = read_folder(folders["gender"])
    how = {"attribute": "gender", "names": NAMES, "place": "object", "shard": 3, "progress": False}
    paths = save_activations(tiny_lalm, samples, tmp_path, **how)
    assert [path.name for path in paths] == ["activations-00000.safetensors", "activations-00001.safetensors"]
    rows = pd.concat([pd.read_parquet(path.with_suffix(".parquet")) for path in paths], ignore_index=True)
    assert list(rows["sample"].unique()) == [sample.name for sample in samples]
    processor, states = tiny_lalm.processor, [load_file(path) for path in paths]
    row = rows.index[rows["sample"] == samples[3].name]
    prompt = processor.prompt(ATTRIBUTES["gender"], processor.n_frames(samples[3].waveform), "P3")
    at = prompt.is_region("object").nonzero()[:, 0]
    assert rows.position[row].tolist() == at.tolist()
    assert rows.token[row].tolist() == [prompt.positions[n].token for n in at]
    _, cache = tiny_lalm.run_with_cache(processor.inputs([prompt], [samples[3].waveform]))
    for name in NAMES:
        assert_close(states[1][name], cache[name][0, at])
        assert len(states[0][name]) == (rows.index < row[0]).sum()
    before = paths[1].stat().st_mtime_ns
    paths[0].unlink()
    assert save_activations(tiny_lalm, samples, tmp_path, **how) == paths
    assert paths[0].is_file()
    assert paths[1].stat().st_mtime_ns == before


def test_what_has_no_row_for_each_position_is_refused(tiny_lalm, folders, tmp_path):
    samples = read_folder(folders["gender"])[:1]
    with pytest.raises(HookError, match=r"no hook blocks\.99"):
        save_activations(tiny_lalm, samples, tmp_path, attribute="gender", names=["blocks.99.hook_resid_post"])
    with pytest.raises(InputError, match="no row for each"):
        save_activations(
            tiny_lalm, samples, tmp_path, attribute="gender", names=["audio_encoder.blocks.0.hook_mlp_out"]
        )
    assert not list(tmp_path.iterdir())
