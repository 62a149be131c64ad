"""Layers as the libraries make them that quantise models, each kept in eight bits with a scale for each row."""

import abc
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Linear):
    """As of bitsandbytes in 8 bits: codes of the shape of the weight, and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        absmax = linear.weight.detach().abs().amax(1, keepdim=True)
        self.weight = nn.Parameter(self.codes(linear.weight.detach() / absmax), requires_grad=False)
        self.register_buffer("absmax", absmax)
        self.bias = linear.bias

    def codes(self, unit: Tensor) -> Tensor:
        return (unit * 127).round().to(torch.int8)

    def whole(self) -> Tensor:
        return self.weight.view(self.out_features, self.in_features) / 127 * self.absmax

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole(), self.bias)


class FlatLinear(Int8Linear):
    """As of bitsandbytes in 4 bits: a column of bytes whose shape says nothing."""

    def codes(self, unit: Tensor) -> Tensor:
        return ((unit * 127).round() + 127).to(torch.uint8).view(-1, 1)

    def whole(self) -> Tensor:
        return (self.weight.view(self.out_features, self.in_features).float() - 127) / 127 * self.absmax


class ColumnLinear(FlatLinear):
    """As of bitsandbytes in 4 bits with ``quant_storage``: a column of what look like ordinary numbers."""

    def codes(self, unit: Tensor) -> Tensor:
        return super().codes(unit).to(torch.bfloat16)


class Float8Linear(Int8Linear):
    """As of block-wise fp8: floating point numbers of one byte, whose scale lies beside them."""

    def codes(self, unit: Tensor) -> Tensor:
        return unit.to(torch.float8_e4m3fn)

    def whole(self) -> Tensor:
        return self.weight.float() * self.absmax


class NamelessLinear(nn.Module):
    """As of GPTQ and HQQ: no ``nn.Linear``, no weight, a bias that is no parameter, and a state of its own making."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        absmax = linear.weight.detach().abs().amax(1, keepdim=True)
        self.register_buffer("qweight", (linear.weight.detach() / absmax * 127).round().to(torch.int32).T)
        self.register_buffer("scales", absmax)
        self.bias = None if linear.bias is None else linear.bias.detach().clone()

    def whole(self) -> Tensor:
        return self.qweight.T / 127 * self.scales

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.whole().T
        return y if self.bias is None else y + self.bias

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = {} if destination is None else destination
        destination[prefix + "qweight"], destination[prefix + "scales"] = self.qweight, self.scales
        return destination


class Codes(Tensor):
    """As of torchao: a tensor that answers with the shape and dtype of the weight, and can be multiplied with."""

    @staticmethod
    def __new__(cls, codes: Tensor, absmax: Tensor) -> "Codes":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=absmax.dtype, device=codes.device)

    def __init__(self, codes: Tensor, absmax: Tensor) -> None:
        self.codes, self.absmax = codes, absmax

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "absmax"], None

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.codes / 127 * self.absmax

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = (*args, None)[:3]
            return F.linear(x, weight.values, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.clone.default, aten.alias.default):
            return cls(args[0].codes.clone(), args[0].absmax.clone())
        if func is aten.equal.default:
            return torch.equal(args[0].codes, args[1].codes) and torch.equal(args[0].absmax, args[1].absmax)
        raise NotImplementedError(f"Codes: {func}")


class Swapped(nn.Linear):
    """A plain ``nn.Linear`` whose weight is such a tensor."""

    def __new__(cls, linear: nn.Linear) -> Any:
        layer = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        absmax = linear.weight.detach().abs().amax(1, keepdim=True)
        layer.weight = nn.Parameter(
            Codes((linear.weight.detach() / absmax * 127).round().to(torch.int8), absmax), False
        )
        layer.bias = linear.bias
        return layer


class Mixin(abc.ABC):  # noqa: B024
    """An abstract class that has nothing abstract left."""


class AbstractLinear(Mixin, Int8Linear):
    """As of quanto: a layer that is below an abstract class."""


KINDS: list[Any] = [Int8Linear, FlatLinear, ColumnLinear, Float8Linear, NamelessLinear, Swapped, AbstractLinear]


def quantised(model: nn.Module, kind: Any) -> nn.Module:
    """``model`` with all linear layers but the head in codes."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and name != "head":
                setattr(parent, name, kind(child).train(child.training))
    return model


def whole(layer: Any) -> Tensor:
    """The weight that a layer stands for."""
    return layer.weight.values if isinstance(getattr(layer, "weight", None), Codes) else layer.whole()
