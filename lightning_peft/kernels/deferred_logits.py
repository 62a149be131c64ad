"""Logits that are computed when somebody reads them, and never if all that is asked for is their cross-entropy.

`deferred_linear` answers like ``F.linear``, with a tensor that knows its shape and remembers x, weight and bias. Its
rows may be chosen, reshaped, cast and capped, which is done to x or noted; ``F.cross_entropy`` of it is
`linear_cross_entropy`. Anything else that is done with it computes the logits first, once, and goes on with those.
So code that takes logits and a loss of them, in a model or behind it, needs no change to do without the logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lightning_peft.kernels.linear_cross_entropy import linear_cross_entropy

Step = tuple[Callable[..., Tensor], Any]  # (what is done to each logit, with which number or dtype)


def deferred_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``, computed when it is read.

    Args:
        x: (..., D).
        weight: (V, D), the head.
        bias: (V,), or None.

    Returns:
        (..., V): a `DeferredLogits`; under ``torch.compile`` and ``torch.func`` the logits themselves.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):  # the precision of now, whenever it is read
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return DeferredLogits.of(x, weight, bias)


class DeferredLogits(Tensor):
    """Made by `deferred_linear`. What it holds itself is NaN: nothing reads that, for reading computes the logits."""

    _x: Tensor
    _head: tuple[Tensor, Tensor | None]
    _steps: tuple[Step, ...]  # done to each logit, in this order
    _turned: bool  # (B, V, T) of rows (B, T), as F.cross_entropy wants it
    _origin: tuple["DeferredLogits", Callable[[Tensor], Tensor]] | None  # of what this is a view, and how
    _whole: Tensor | None  # the logits, once somebody has read them

    @staticmethod
    def of(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        steps: tuple[Step, ...] = (),
        turned: bool = False,
        origin: "tuple[DeferredLogits, Callable[[Tensor], Tensor]] | None" = None,
    ) -> "DeferredLogits":
        """From rows ``x`` (..., D) of a head."""
        made = _Unread.apply(x, weight, bias, steps, turned).as_subclass(DeferredLogits)
        made._x, made._head, made._steps, made._turned = x, (weight, bias), steps, turned
        made._origin, made._whole = origin, None
        return made

    def like(self, **changes: Any) -> "DeferredLogits":
        """The same head with some of x, steps, turned, origin replaced."""
        weight, bias = self._head
        kept = {"x": self._x, "weight": weight, "bias": bias, "steps": self._steps, "turned": self._turned}
        return DeferredLogits.of(**{**kept, **changes})

    def known(self) -> Tensor | None:
        """The logits, if they, or those that this is a view of, were read before."""
        if self._whole is None and self._origin is not None:
            source, view = self._origin
            there = source.known()
            self._whole = None if there is None else view(there)
        return self._whole

    def read(self) -> Tensor:
        """The logits."""
        with torch.enable_grad():  # the first who reads may want no gradients, and the next one does
            if self.known() is None:
                self._whole = _computed(self._x, *self._head, self._steps, self._turned)
        return self._whole  # type: ignore[return-value]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            return super().__torch_function__(func, types, args, kwargs)
        defer = _DEFERRED.get(func)
        if defer is not None and args and isinstance(args[0], cls) and args[0].known() is None:
            answer = defer(args[0], func, args[1:], kwargs)
            if answer is not None:
                return answer
        args, kwargs = tree_map(lambda each: each.read() if isinstance(each, cls) else each, (args, kwargs))
        return func(*args, **kwargs)


def _computed(x: Tensor, weight: Tensor, bias: Tensor | None, steps: tuple[Step, ...], turned: bool) -> Tensor:
    y = F.linear(x, weight, bias)
    for do, value in steps:
        y = do(y) if value is None else do(y, value)
    return y.transpose(1, 2) if turned else y


class _Unread(torch.autograd.Function):
    """NaN of the shape of the logits, without memory; its gradient is theirs, for a function that takes it as it is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, steps: tuple[Step, ...], turned: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.steps, ctx.turned = steps, turned
        dtype = next((value for do, value in reversed(steps) if do is Tensor.to), x.dtype)
        shape = (*x.shape[:-1], weight.shape[0])
        unread = torch.full((), torch.nan, dtype=dtype, device=x.device).expand(shape)
        return unread.transpose(1, 2) if turned else unread

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[:3]
        leaves: list[Any] = [
            t if t is None else t.detach().requires_grad_(w) for t, w in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            x, weight, bias = leaves
            y = _computed(x, weight, bias, ctx.steps, ctx.turned)
        found = iter(torch.autograd.grad(y, [t for t, w in zip(leaves, wanted, strict=True) if w], dy))
        return *(next(found) if w else None for w in wanted), None, None


def _reshaped(logits: DeferredLogits, func: Callable[..., Tensor], args: Any, kwargs: Any) -> DeferredLogits | None:
    """Views of whole rows, in their order."""
    (V, D), shape = logits._head[0].shape, logits.shape
    like = torch.empty(shape, dtype=logits.dtype, device="meta")
    new = func(like, *args, **kwargs)
    if logits._turned or new.shape[-1:] != (V,) or new.dtype != like.dtype or new.numel() != like.numel():
        return None
    return logits.like(
        x=logits._x.reshape(*new.shape[:-1], D), origin=(logits, lambda whole: func(whole, *args, **kwargs))
    )


def _chosen(logits: DeferredLogits, func: Callable[..., Tensor], args: Any, kwargs: Any) -> DeferredLogits | None:
    """Rows by slices, numbers, or one mask or tensor of places."""
    index, rows = args[0], logits.dim() - 1
    if logits._turned:
        return None
    if isinstance(index, Tensor):
        n_dims = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
        return logits.like(x=logits._x[index]) if n_dims <= rows else None
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is None or part is ... or isinstance(part, int | slice) for part in parts):
        return None
    if parts.count(...) == 1:
        place = parts.index(...)
        skipped = rows + 1 - sum(part is not None for part in parts if part is not ...)
        parts[place : place + 1] = [slice(None)] * skipped
    if sum(part is not None for part in parts) > rows and parts.pop() != slice(None):
        return None
    return logits.like(x=logits._x[tuple(parts)], origin=(logits, lambda whole: whole[index]))


def _turn(logits: DeferredLogits, func: Callable[..., Tensor], args: Any, kwargs: Any) -> DeferredLogits | None:
    """(B, T, V) as (B, V, T)."""
    like = torch.empty(logits.shape, device="meta")
    new = func(like, *args, **kwargs)
    if logits._turned or like.dim() != 3 or new.stride() != (like.stride(0), like.stride(2), like.stride(1)):
        return None
    return logits.like(turned=True, origin=(logits, lambda whole: whole.transpose(1, 2)))


def _same(logits: DeferredLogits, func: Callable[..., Tensor], args: Any, kwargs: Any) -> DeferredLogits | None:
    return None if args or kwargs else logits


def _cast(logits: DeferredLogits, func: Callable[..., Tensor], args: Any, kwargs: Any) -> DeferredLogits | None:
    given = [*args, *kwargs.values()]
    if func is not Tensor.to:
        given = [_CASTS[func]] if not given else []
    # the loss is computed in float32, or in the precision of x: float64 is asked for by those who want all of it
    if len(given) != 1 or given[0] not in (torch.float32, torch.float16, torch.bfloat16, logits.dtype):
        return None
    return logits if given[0] == logits.dtype else logits.like(steps=(*logits._steps, (Tensor.to, given[0])))


def _scaled(logits: DeferredLogits, func: Callable[..., Tensor], args: Any, kwargs: Any) -> DeferredLogits | None:
    number = len(args) == 1 and isinstance(args[0], int | float) and not kwargs
    do = Tensor.div if func in _DIVISIONS else Tensor.mul
    return logits.like(steps=(*logits._steps, (do, args[0]))) if number else None


def _squashed(logits: DeferredLogits, func: Callable[..., Tensor], args: Any, kwargs: Any) -> DeferredLogits | None:
    return None if args or kwargs else logits.like(steps=(*logits._steps, (Tensor.tanh, None)))


def _cross_entropy(
    logits: DeferredLogits, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    names = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    given = dict(zip(names, args, strict=False)) | kwargs
    labels = given.pop("target")
    if any(given.pop(key, None) is not None for key in ("weight", "size_average", "reduce")):
        return None
    softcap = _softcap(logits._steps)
    if labels.dtype != torch.int64 or labels.shape != logits._x.shape[:-1] or softcap is False:
        return None
    if logits.dim() > 2 and not logits._turned:  # F.cross_entropy takes the second axis for the classes
        return None
    loss = linear_cross_entropy(logits._x, logits._head[0], labels, logits._head[1], softcap=softcap, **given)
    return loss if torch.is_autocast_enabled(labels.device.type) else loss.to(logits.dtype)


def _softcap(steps: tuple[Step, ...]) -> float | None | bool:
    """The cap that ``steps`` amount to, None if they change nothing but the precision; False if they do else."""
    match [step for step in steps if step[0] is not Tensor.to]:
        case []:
            return None
        case [(Tensor.div, down), (Tensor.tanh, None), (Tensor.mul, up)] if down == up > 0:
            return float(up)
    return False


def _getter(name: str) -> Any:
    """What ``__torch_function__`` is told of when the attribute is asked for."""
    return getattr(Tensor, name).__get__


_FACTS = {
    *map(_getter, ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf", "grad_fn")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.get_device),
}
_CASTS = {Tensor.float: torch.float32, Tensor.double: torch.float64, Tensor.half: torch.float16}
_CASTS[Tensor.bfloat16] = torch.bfloat16
_DIVISIONS = {torch.div, Tensor.div, Tensor.true_divide, Tensor.__truediv__}
_DEFERRED: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    Tensor.__getitem__: _chosen,
    Tensor.contiguous: _same,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten), _reshaped),
    **dict.fromkeys((Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, _getter("mT")), _turn),
    **dict.fromkeys((Tensor.to, *_CASTS), _cast),
    **dict.fromkeys((*_DIVISIONS, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _scaled),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _squashed),
}
