"""TransformerLens' weight names (`W_Q`, `b_K`, ...) as views of the linear layers that hold the numbers."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from lalm_lens.errors import LensError


class WeightView:
    """A weight in TransformerLens' shape, sharing memory with `owner.<module>.weight`.

    `pattern` leads from the stored to the shown axes; the sizes of grouped axes are attributes of the owner.
    Assigning a tensor copies it into the stored weight.
    """

    parameter = "weight"

    def __init__(self, module: str, pattern: str, axis: str = "", size: str = ""):
        self.module = module
        self.pattern = pattern
        self.axis, self.size = axis, size

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: nn.Module | None, kind: type | None = None) -> Any:
        return self if owner is None else self.show(owner, self.stored(owner))

    def __set__(self, owner: nn.Module, value: Tensor) -> None:
        view = self.show(owner, self.stored(owner))
        if value.shape != view.shape:
            raise LensError(f"{self.name} has shape {tuple(view.shape)}, got {tuple(value.shape)}.")
        with torch.no_grad():
            view.copy_(value)

    def show(self, owner: nn.Module, stored: Tensor) -> Tensor:
        sizes = {self.axis: getattr(owner, self.size)} if self.axis else {}
        return rearrange(stored, self.pattern, **sizes)

    def stored(self, owner: nn.Module) -> Tensor:
        module = getattr(owner, self.module)
        if type(module) not in (nn.Linear, nn.Embedding):
            raise self.not_plain(type(module).__name__)
        tensor = getattr(module, self.parameter)
        if tensor.is_meta:
            raise self.offloaded()
        if type(tensor) is not nn.Parameter or not tensor.is_floating_point():
            raise self.not_plain(f"layer of {tensor.dtype} {type(tensor).__name__}")
        return tensor

    def offloaded(self) -> LensError:
        return LensError(f"{self.name} is offloaded: its numbers are not here. Load the model without offloading.")

    def not_plain(self, kind: str) -> LensError:
        return LensError(
            f"{self.name} is a view of a plain linear layer, but {self.module} is a {kind} (quantised or wrapped). "
            "Merge or unwrap it first."
        )


class BiasView(WeightView):
    """A bias in TransformerLens' shape. A layer without one shows zeros, which cannot be written to."""

    parameter = "bias"

    def stored(self, owner: nn.Module) -> Tensor:
        if self.is_there(owner):
            return super().stored(owner)
        weight = getattr(owner, self.module).weight
        if weight.is_meta:  # zeros on the meta device are no numbers
            raise self.offloaded()
        return weight.new_zeros(1).expand(weight.shape[0])  # one zero for all, so that torch refuses a write in place

    def __set__(self, owner: nn.Module, value: Tensor) -> None:
        if not self.is_there(owner):
            raise LensError(f"{self.name} cannot be set: this model has no bias in {self.module}.")
        super().__set__(owner, value)

    def is_there(self, owner: nn.Module) -> bool:
        return getattr(getattr(owner, self.module), "bias", None) is not None


class Viewed(nn.Module):
    """A module whose weights have TransformerLens names: refuses a Parameter where it would shadow a view."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and isinstance(getattr(type(self), name, None), WeightView):
            raise LensError(
                f"{name} is a view of {type(self).__name__}'s own weight: assign a tensor, and it is copied in "
                f"(`.{name} = parameter.data`)."
            )
        if isinstance(value, Tensor) and name.startswith(("W_", "b_")) and not hasattr(type(self), name):
            views = ", ".join(each for each in dir(type(self)) if isinstance(getattr(type(self), each), WeightView))
            raise LensError(f"{type(self).__name__} has no {name}. Its weights are {views}.")
        super().__setattr__(name, value)
