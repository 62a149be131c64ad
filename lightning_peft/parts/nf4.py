"""A weight that is kept in 4 bits and answers as if it were whole."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_peft import kernels
from lightning_peft.engine import AdapterError

aten = torch.ops.aten


class NF4Tensor(Tensor):
    """A tensor with the shape and the dtype of the weight that it stands for, kept as NF4 codes.

    An operation that does not know it gets the weight unpacked to its dtype, and gives a plain tensor; one that writes
    into it (``copy_`` of a checkpoint, an initialiser) packs the result anew. It stays packed when it is moved, copied,
    detached, or transposed. A cast changes the dtype that it unpacks to, not what is kept. For their backward
    ``F.linear`` and other products save the tensor itself, so nothing of the size of the weight outlives an operation.

    It is never trained. Views are no views: what is written into ``tensor[0]`` is lost. ``torch.save`` keeps it packed,
    and ``torch.load`` takes it where this module has been imported; safetensors refuses it, so give it `unpacked`.

    Args:
        packed: what is kept.
        shape: of the weight that was packed.
        dtype: that it answers with.
        transposed: it stands for the transpose.
    """

    codes: Tensor
    absmax: Tensor
    scale: Tensor | None
    transposed: bool
    is_packed = True  # which tells the engine that it cannot be trained

    @staticmethod
    def __new__(
        cls, packed: "kernels.Packed", shape: torch.Size, dtype: torch.dtype, transposed: bool = False
    ) -> "NF4Tensor":
        size, strides = (shape[::-1], (1, shape[1])) if transposed else (shape, None)  # contiguous by default
        device = packed.codes.device
        made = torch.Tensor._make_wrapper_subclass(cls, size, strides, dtype=dtype, device=device)
        made.codes, made.absmax, made.scale = packed
        made.transposed = transposed
        return made

    @classmethod
    def pack(cls, weight: Tensor, block_size: int = 64, double_quant: bool = True) -> Self:
        """``weight`` in 4 bits; see `nf4_pack`."""
        return cls(kernels.nf4_pack(weight, block_size, double_quant), weight.shape, weight.dtype)

    @property
    def packed(self) -> "kernels.Packed":
        """What is kept."""
        return kernels.Packed(self.codes, self.absmax, self.scale)

    @property
    def block_size(self) -> int:
        """Weights that share an absmax."""
        return self.packed.block_size

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that are kept."""
        return sum(part.nbytes for part in self.packed if part is not None)

    def with_parts(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "NF4Tensor":
        """The same with each part of what is kept changed, and perhaps another dtype to answer with."""
        scale = None if self.scale is None else change(self.scale)
        parts = kernels.Packed(change(self.codes), change(self.absmax), scale)
        return NF4Tensor(parts, self._stored_shape, dtype or self.dtype, self.transposed)

    @property
    def _stored_shape(self) -> torch.Size:
        return self.shape[::-1] if self.transposed else self.shape

    def unpacked(self) -> Tensor:
        """The weight that it stands for, as a plain tensor."""
        weight = self._unpacked()
        return weight.t() if self.transposed else weight

    def _unpacked(self) -> Tensor:
        return kernels.nf4_unpack(self.packed, self._stored_shape, self.dtype)

    def pack_anew(self, weight: Tensor) -> None:
        """Keep ``weight`` from now on, in place.

        Raises:
            ValueError: it has NaN or infinite values.
        """
        weight = weight.expand(self.shape) if weight.shape != self.shape else weight
        weight = weight.t() if self.transposed else weight
        kept = self.block_size, self.scale is not None, False
        if isinstance(weight, NF4Tensor) and (weight.block_size, weight.scale is not None, weight.transposed) == kept:
            new = weight.packed
        elif weight.dtype == self.dtype and torch.equal(weight.to(self.device), self._unpacked()):
            return  # what was rounded to bfloat16, say, would be packed a little differently
        else:
            new = kernels.nf4_pack(weight, self.block_size, self.scale is not None)
        for part, value in zip(self.packed, new, strict=True):
            if part is not None and value is not None:
                part.copy_(value)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"NF4Tensor({tuple(self.shape)}, {self.dtype}, {self.block_size} a block, on {self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # that of tensors cannot be read by those who move storages while they load, as Lightning does
        return _rebuild, (*self.packed, self._stored_shape, self.dtype, self.transposed, isinstance(self, nn.Parameter))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, bool]]:
        parts = ["codes", "absmax"] + ([] if self.scale is None else ["scale"])
        return parts, (self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: Any, size: torch.Size, stride: Any) -> "NF4Tensor":
        dtype, transposed = context
        packed = kernels.Packed(parts["codes"], parts["absmax"], parts.get("scale"))
        return NF4Tensor(packed, size[::-1] if transposed else size, dtype, transposed)

    # only what reaches the dispatcher is ours: autocast, autograd and the compiler see an ordinary tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # in inference mode what is made of other operations arrives as a whole: F.linear, a cast
        for take in (_KEPT.get(func), func.decompose):
            result = NotImplemented if take is None else take(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _unpacked_call(func, args, kwargs)


def refuse_packed(model: nn.Module, who: str) -> None:
    """Raise an `AdapterError` if ``who``, which takes weights apart, would unpack those of ``model``."""
    packed = [name for name, p in model.named_parameters() if isinstance(p, NF4Tensor)]
    if packed:
        raise AdapterError(
            f"{who}: it cannot send weights in 4 bits: {len(packed)} are, among them {packed[0]!r}. Keep the base "
            "whole (LoRA), or the model on each device: strategy='peft_ddp'."
        )


def _unpacked_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on plain tensors; what it wrote into them is packed anew."""
    plain: dict[int, Tensor] = {}

    def unpack(value: Any) -> Any:
        if isinstance(value, NF4Tensor):
            return plain.setdefault(id(value), value.unpacked())
        return value

    result = func(*tree_map(unpack, args), **tree_map(unpack, kwargs))
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for owner in tree_leaves(given.get(argument.name)):
                if isinstance(owner, NF4Tensor):
                    owner.pack_anew(plain[id(owner)])
                    result = owner if result is plain[id(owner)] else result
    return result


def _same(tensor: NF4Tensor) -> NF4Tensor:
    return tensor.with_parts(lambda part: part)


def _clone(tensor: NF4Tensor, *, memory_format: Any = None) -> Any:
    if tensor.transposed and memory_format is torch.contiguous_format:
        return NotImplemented
    return tensor.with_parts(torch.clone)


def _to_copy(tensor: NF4Tensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    device = tensor.device if device is None else device
    return tensor.with_parts(lambda part: part.to(device=device, non_blocking=non_blocking, copy=True), dtype)


def _t(tensor: NF4Tensor) -> Any:
    if tensor.dim() != 2:
        return NotImplemented
    return NF4Tensor(tensor.packed, tensor._stored_shape, tensor.dtype, not tensor.transposed)


def _transpose(tensor: NF4Tensor, one: int, other: int) -> Any:
    return _t(tensor) if {one % 2, other % 2} == {0, 1} else NotImplemented


def _permute(tensor: NF4Tensor, dims: list[int]) -> Any:
    return _t(tensor) if [d % 2 for d in dims] == [1, 0] else NotImplemented


def _copy(tensor: Any, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(tensor, NF4Tensor):  # a plain tensor takes the unpacked values
        return NotImplemented
    tensor.pack_anew(source)
    return tensor


def _product(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, NF4Tensor) or x.shape[1] != weight.shape[0] or x.dtype != weight.dtype:
        return NotImplemented  # PyTorch has its own words for what does not fit
    from lightning_peft.kernels.nf4_linear import nf4_product

    return nf4_product(x, weight.packed, weight._stored_shape, bias, transposed=not weight.transposed)


def _product_and_sum(bias: Tensor, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return _product(x, weight, bias) if (beta, alpha, bias.dtype) == (1, 1, x.dtype) else NotImplemented


def _rebuild(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    transposed: bool,
    is_parameter: bool,
) -> Tensor:
    made = NF4Tensor(kernels.Packed(codes, absmax, scale), shape, dtype, transposed)
    return nn.Parameter(made, requires_grad=False) if is_parameter else made


# a file of tensors may hold it, also where nothing but weights is read
torch.serialization.add_safe_globals([_rebuild])

_KEPT: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.mm.default: _product,
    aten.addmm.default: _product_and_sum,
}
