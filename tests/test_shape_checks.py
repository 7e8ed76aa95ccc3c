"""That shapes are checked while everything else is tested: of arguments, of results, and from one to another."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import shape_checks
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintReturnViolation
from jaxtyping import Float
from torch import Tensor

from lalm_lens.nn.norm import RMSNorm
from lalm_lens.transformer import at_positions

SQUARE, WIDE = torch.zeros(3, 3), torch.zeros(3, 4)


@shape_checks.checked
def product(x: Float[Tensor, "row inner"], y: Float[Tensor, "inner col"]) -> Float[Tensor, "row col"]:
    return x @ y


@shape_checks.checked
def turned(x: Float[Tensor, "row col"]) -> Float[Tensor, "row col"]:
    return product(x, x.T).new_zeros(x.shape[::-1])


@shape_checks.checked
def rows(x: Float[Tensor, "row col"]) -> Iterator[Float[Tensor, " col"]]:
    yield from x


def test_an_axis_has_one_size_in_a_call():
    assert product(SQUARE, WIDE).shape == product(torch.zeros(5, 3), WIDE)[:3].shape
    with pytest.raises(BeartypeCallHintParamViolation):
        product(WIDE, SQUARE)
    with pytest.raises(BeartypeCallHintParamViolation):
        product(SQUARE, WIDE.int())


def test_results_are_checked_against_arguments():
    assert turned(SQUARE).shape == (3, 3)
    with pytest.raises(BeartypeCallHintReturnViolation):
        turned(WIDE)


def test_generators_are_checked_when_they_are_called():
    assert len(list(rows(WIDE))) == 3
    with pytest.raises(BeartypeCallHintParamViolation):
        next(rows(WIDE[0]))


def test_fields_of_a_dataclass_share_their_axes():
    @dataclass
    class Two:
        x: Float[Tensor, " pos"]
        y: Float[Tensor, " pos"]

    checked = shape_checks.jaxtyped(Two, typechecker=lambda function: beartype(function))
    assert len(checked(WIDE[0], WIDE[1]).x) == 4
    with pytest.raises(BeartypeCallHintParamViolation):
        checked(WIDE[0], SQUARE[0])


def test_the_package_is_checked():
    assert at_positions(WIDE[None], -1).shape == (1, 1, 4)
    for wrong in (WIDE, WIDE[None].int()):
        with pytest.raises(BeartypeCallHintParamViolation):
            at_positions(wrong, -1)
    with pytest.raises(BeartypeCallHintParamViolation):
        RMSNorm(4.0, 1e-5)
