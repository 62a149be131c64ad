"""Weights that another library keeps in codes: known by what they are, and read through the layer that has the key."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 512  # unit vectors that go through a layer at a time


def is_code(tensor: Tensor) -> bool:
    """Whether the numbers in ``tensor`` are not the values that it stands for.

    So it is with integers, with floating point numbers of one byte, whose scale lies elsewhere, and with the tensor
    classes of other libraries, which know how to be multiplied and little else.
    """
    return not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or is_foreign(tensor)


def holds_codes(module: nn.Module, name: str) -> bool:
    """Whether the parameter ``name`` of ``module`` is in codes: by `is_code`, or as a column where a matrix belongs.

    bitsandbytes stores its bytes as floating point numbers if it is told to, so that they can be sharded with others.
    """
    tensor = module._parameters.get(name)
    if tensor is None or is_code(tensor):
        return tensor is not None
    return isinstance(module, nn.Linear) and name == "weight" and module.in_features > 1 and tensor.shape[1:] == (1,)


def is_foreign(tensor: Tensor) -> bool:
    """Whether the class of ``tensor`` is of another library, and does not answer as an ordinary tensor would."""
    own = inspect.getattr_static(type(tensor), "__torch_dispatch__") is not _NO_DISPATCH
    return own and type(tensor).__module__.partition(".")[0] not in ("torch", __package__.partition(".")[0])


_NO_DISPATCH = inspect.getattr_static(Tensor, "__torch_dispatch__")


def can_train(parameter: Tensor) -> bool:
    """Whether a gradient may change ``parameter``: not if its values are in codes, nor if it says that it is packed."""
    return not is_code(parameter) and not getattr(parameter, "is_packed", False)


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a layer that keeps the weight of a linear map in codes, by whatever name; None of any other.

    It is known by its ``in_features``, ``out_features`` and codes: few libraries make it a subclass of ``nn.Linear``.
    """
    size = tuple(getattr(module, f"{end}_features", None) for end in ("out", "in"))
    if not all(isinstance(features, int) for features in size):
        return None
    coded = any(map(is_code, own_tensors(module))) or holds_codes(module, "weight")
    return size if coded else None  # type: ignore[return-value]


def own_tensors(module: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers of ``module`` itself."""
    return (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def parts(tensor: Any) -> list[Tensor]:
    """The plain tensors that one of a foreign class is made of; any other as it is."""
    if not is_foreign(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def first_and_last(tensor: Tensor) -> Tensor:
    """The first and the last 64 values, in bfloat16 on the CPU; of a foreign class, those of each of its parts."""
    flat = [part.detach().flatten() for part in parts(tensor)]
    return torch.cat([end.to("cpu", torch.bfloat16) for part in flat for end in (part[:64], part[-64:])])


def answers_in(module: Any) -> tuple[torch.dtype, torch.device]:
    """Dtype and device in which a module computes, whatever it is made of: as its own tensors say, or those inside."""
    there = [*own_tensors(module), *module.parameters(), *module.buffers()]
    codes = {id(p) for name, p in module.named_parameters(recurse=False) if holds_codes(module, name)}
    floating = [t.dtype for t in there if t.is_floating_point() and t.dtype.itemsize > 1 and id(t) not in codes]
    dtype = getattr(module, "compute_dtype", None) or next(iter(floating), torch.float32)
    return dtype, there[0].device if there else torch.device("cpu")


@torch.compiler.disable
def decoded(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Weight (d_out, d_in) and bias of a linear layer whose ``forward`` alone can read its codes; no library is asked.

    They are what it answers to the unit vectors, and to zero.
    """
    d_out, d_in = linear_size(module)  # type: ignore[misc]  # asked for before
    dtype, device = answers_in(module)
    weight = torch.empty(d_out, d_in, dtype=dtype, device=device)
    # bitsandbytes packs its codes anew, and not without loss, for a CPU that evaluates what requires no gradients
    zero = torch.zeros(2, d_in, dtype=dtype, device=device, requires_grad=True)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        bias = forward(zero)[0].to(dtype)
        with _without_bias(module):  # which would touch the rounding
            rest = forward(zero)[0]
            for columns in torch.arange(d_in, device=device).split(_ROWS):
                unit = torch.zeros(len(columns), d_in, dtype=dtype, device=device).scatter_(1, columns[:, None], 1)
                weight[:, columns] = (forward(unit.requires_grad_()) - rest).T.to(dtype)
    return weight, bias if bias.any() or getattr(module, "bias", None) is not None else None


@contextlib.contextmanager
def _without_bias(module: Any) -> Iterator[None]:
    places = [place for place in (module._parameters, module._buffers, vars(module)) if place.get("bias") is not None]
    kept = [place["bias"] for place in places]
    for place in places:
        place["bias"] = None
    try:
        yield
    finally:
        for place, bias in zip(places, kept, strict=True):
            place["bias"] = bias
