"""The reach of attention, against the rule for equal windows and by hand."""

import pytest
import torch

from lalm_lens.light_cone import light_cone


def audio(n_pos: int, first: int, last: int) -> torch.Tensor:
    return (torch.arange(n_pos) >= first) & (torch.arange(n_pos) <= last)


@pytest.mark.parametrize(("n_layers", "window"), [(8, 20), (4, 9), (3, 2), (5, 1)])
def test_equal_windows_make_a_cone(n_layers, window):
    """Cell (l, i) can matter only if i <= a + (l + 1)(W - 1) and last - i <= (L - 1 - l)(W - 1)."""
    n_pos, a, last = 60, 31, 59
    cone = light_cone([window] * n_layers, audio(n_pos, 12, a))
    for layer in range(n_layers):
        for i in range(n_pos):
            reached = 12 <= i <= a + (layer + 1) * (window - 1)
            assert bool(cone[layer, i]) == (reached and last - i <= (n_layers - 1 - layer) * (window - 1))


def test_one_open_block_leaves_the_last_position_from_there_on():
    cone = light_cone([1, 1, None, 1], audio(10, 2, 5))
    expected = torch.zeros(4, 10, dtype=torch.bool)
    expected[:2, 2:6] = True  # the audio itself, until the open block has read it
    expected[2:, -1] = True
    assert torch.equal(cone, expected)


def test_without_windows_everything_after_the_sound_can_matter_but_in_the_last_block():
    cone = light_cone([None] * 3, audio(10, 2, 5))
    assert cone[:2, 2:].all()
    assert not cone[:, :2].any()
    assert cone[2].tolist() == [False] * 9 + [True]
