"""The benchmark compares like with like: every rival computes the same map, and the needed arithmetic is counted."""

from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import arithmetic, lens
from benchmarks.hf import PlainHooks
from benchmarks.rivals import RIVALS
from benchmarks.task import SHAPES, Task, build
from benchmarks.tracing import write_section

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def task() -> Task:
    return build(TINY)


INSTALLED = [name for name in RIVALS if name not in ("nnsight", "pyvene") or find_spec(name)]  # the extra `bench`


@pytest.mark.parametrize("name", INSTALLED)
@torch.no_grad()
def test_every_rival_computes_the_same_map(name, task):
    theirs_map = PlainHooks(task.hf)(task.clean, task.corrupt, TINY.patches, task.token)
    ours_map = RIVALS[name].build(task.hf)(task.clean, task.corrupt, TINY.patches, task.token)
    torch.testing.assert_close(ours_map, theirs_map)
    assert (ours_map - task.log_probability[1]).abs().max() > 0.1


@torch.no_grad()
def test_every_rival_reads_the_same_lens(task):
    clips = torch.cat([task.clean, task.corrupt])
    answers = {name: rival() for name, rival in lens.rivals(task.hf, clips).items()}
    expected = answers[lens.ONE_EACH]
    assert expected.shape == (TINY.n_layers, 2, len(lens.TOKENS))
    for answer in answers.values():
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[-1]).abs().max() > 0.1
    assert lens.OURS in lens.compare(TINY, 2, 1, "cpu", "float32")


def test_a_sample_takes_each_part_of_the_map():
    assert [layer for layer, _ in TINY.sample(3)] == [0, 1, 2]
    assert TINY.sample(10_000) == TINY.patches


@torch.no_grad()
def test_a_base_run_needs_what_torch_counts():
    task = build(TINY)
    task.hf.set_attn_implementation("eager")  # torch cannot count the fused kernel of the CPU
    with FlopCounterMode(display=False) as counter:
        PlainHooks(task.hf).last_logits(task.clean)
    unseen = TINY.n_layers * 4 * TINY.d_model * TINY.n_pos * (TINY.n_pos - 1) // 2  # keys that causality hides
    unread = (TINY.n_pos - 1) * arithmetic.unembedding(TINY)
    assert arithmetic.base_run(TINY) == counter.get_total_flops() - unseen - unread


def test_a_patch_of_the_last_block_needs_the_last_logits_alone():
    last_layer, last = TINY.n_layers - 1, TINY.n_pos - 1
    assert arithmetic.patched_run(TINY, last_layer, last) == arithmetic.unembedding(TINY)
    assert arithmetic.patched_run(TINY, last_layer, last - 1) == 0


def test_a_table_is_written_twice_as_once(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Benchmarks\n\nBy hand.\n")
    for text in ("old", "other", "new"):
        write_section(readme, "other" if text == "other" else "reference", text)
    written = readme.read_text()
    write_section(readme, "reference", "new")
    assert readme.read_text() == written
    assert "By hand." in written
    assert "old" not in written
    assert written.index("new") < written.index("other")
