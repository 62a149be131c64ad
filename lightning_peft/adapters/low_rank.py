"""Low-rank products: a weight change B A of rank r, for linear, convolution and embedding layers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import Adapter, Layer, Target
from lightning_peft.engine.slots import Samples
from lightning_peft.kernels.lora_linear import lora_product
from lightning_peft.kernels.recipes import leave


class LowRank(Adapter):
    """``delta = scaling * B A``: lora_A (r, d_in, ...) as the weight of the layer below, lora_B (d_out, r).

    Args:
        target: the layer to adapt.
        r: rank.
        scaling: factor of the product.
        dropout: probability of dropping a feature of the adapter's input, in training only.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: Tensor

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_A = target.new_parameter(r, *target.shape[1:])
        self.lora_B = target.new_parameter(target.d_out, r)
        # a tensor: changing it does not recompile a compiled model
        self.register_buffer("scaling", self.lora_B.new_tensor(scaling), persistent=False)
        self.dropout = dropout

    def fix(self, factor: str) -> None:
        """Make the parameter ``factor`` a buffer: saved, and never trained."""
        self.register_buffer(factor, self._parameters.pop(factor).detach())  # type: ignore[union-attr]

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """``lora_A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))``, ``lora_B = 0``."""
        random = torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype)
        self.lora_A.copy_(nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator))
        self.lora_B.zero_()

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """y = layer(x) + scaling * B (A dropout(x)); two thin products, the delta is never built."""
        y = layer(x)
        return y + _cast(self.product(x, layer), y.dtype)

    @property
    def adds_product(self) -> bool:
        """Whether the change of the weight is the product of the factors, and nothing else."""
        return type(self).merged is LowRank.merged

    @classmethod
    def together(cls, adapters: Sequence[Any], x: Tensor, layer: Layer, samples: Samples) -> Tensor | None:
        """The layer below runs once for all; each product sees the samples of its own."""
        if any(type(adapter).forward is not LowRank.forward for adapter in adapters):
            return None
        y = layer(x)
        change = _by_segments(adapters, x, samples.index) if x.is_cuda else None
        if change is None:
            pairs = zip(adapters, samples.parts(x), strict=False)
            parts = [_cast(adapter.product(part, layer), y.dtype) for adapter, part in pairs]
            parts += [y.new_zeros(without, *y.shape[1:]) for without in samples.lengths[len(parts) :]]
            change = samples.joined(parts)
        return y + _cast(change, y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The two factors of the delta: (n, d_in, ...) and (d_out, n), the scaling in the second."""
        B, scaling = self.lora_B, self.scaling  # asking a module for them takes time, and this runs for every layer
        # made again where it is needed: the parameter is there anyway
        return self.lora_A, leave(scaling * B, torch.mul, scaling, B)

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """Factors of the whole change, as `factors`, for a plain low-rank adapter that computes the same."""
        return self.factors()

    @property
    def plain_class(self) -> "type[LowRank]":
        """The plain low-rank adapter for this kind of layer."""
        return next(cls for cls in (LowRankEmbedding, LowRankConv, LowRank) if isinstance(self, cls))

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """The change of the output alone, scaled; (..., d_out) for x (..., d_in)."""
        return self.through(x, layer, *self.factors(), dropout=self.dropout if self.training else 0.0)

    def through(self, x: Tensor, layer: Layer, down: Tensor, up: Tensor, dropout: float = 0.0) -> Tensor:
        """``dropout(x)`` through two factors; (..., d_out) for x (..., d_in)."""
        return lora_product(x, down, up, dropout=dropout)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout, in training only."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def delta(self) -> Tensor:
        """(d_out, d_in, ...)."""
        return dense(*self.factors())

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + the delta."""
        return weight + self.delta(), bias


def dense(down: Tensor, up: Tensor) -> Tensor:
    """The product (d_out, d_in, ...) of factors (n, d_in, ...) and (d_out, n)."""
    return (up @ down.flatten(1)).unflatten(1, down.shape[1:])


@torch.no_grad()
def truncated(down: Tensor, up: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of rank r of the product, and the relative error of it (Frobenius).

    Nothing of the size of the product is built. Factors of a rank of r or less come back as they are.

    Args:
        down: (R, d_in, ...).
        up: (d_out, R).
        r: rank; where the product has fewer directions, as many as it has.

    Returns:
        (r, d_in, ...) and (d_out, r), which share the singular values evenly; |product - result| / |product|.
    """
    if len(down) <= r:
        return down, up, 0.0
    exact = torch.promote_types(down.dtype, torch.float32)
    left, above = torch.linalg.qr(up.to(exact))
    right, below = torch.linalg.qr(down.flatten(1).T.to(exact))
    U, values, Vh = torch.linalg.svd(above @ below.T, full_matrices=False)
    root = values[:r].sqrt()
    whole, lost = torch.linalg.vector_norm(values), torch.linalg.vector_norm(values[r:])
    down = ((root[:, None] * Vh[:r]) @ right.T).unflatten(1, down.shape[1:]).to(down.dtype)
    return down, (left @ (U[:, :r] * root)).to(up.dtype), (lost / whole).item() if whole else 0.0


def _by_segments(adapters: Sequence[Any], x: Tensor, index: Tensor) -> Tensor | None:
    """The changes of all samples in a few launches, however many adapters there are; None if they cannot be stacked.

    ``index`` (samples,) is the adapter of each, -1 for none. Smaller ranks are filled up with zeros.
    """
    from lightning_peft.kernels import segment_lora  # here, as it loads triton

    ways = ("product", "through")
    if any(getattr(type(adapter), way) is not getattr(LowRank, way) for adapter in adapters for way in ways):
        return None
    if any(adapter.dropout and adapter.training for adapter in adapters):
        return None
    pairs: list[tuple[Tensor, Tensor]] = [adapter.factors() for adapter in adapters]
    if len({factor.dtype for pair in pairs for factor in pair}) > 1:
        return None
    r = max(len(down) for down, _ in pairs)
    down = torch.stack([F.pad(down, (0, 0, 0, r - len(down))) if len(down) < r else down for down, _ in pairs])
    up = torch.stack([F.pad(up, (0, r - up.shape[1])) if up.shape[1] < r else up for _, up in pairs])
    return segment_lora(x, down, up, index.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1]), 1.0)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # asking first is cheaper: this runs for every layer


def difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors of one product less another."""
    return torch.cat([one[0], other[0]]), torch.cat([one[1], -other[1]], dim=1)


class LowRankConv(LowRank):
    """The same for convolutions: A is a convolution to r channels, B one of kernel size 1.

    With groups, all of them share A (r, c_in / groups, ...), which any r allows and depthwise layers need.
    """

    def through(self, x: Tensor, layer: Layer, down: Tensor, up: Tensor, dropout: float = 0.0) -> Tensor:
        """``dropout(x)`` through two factors; (N, c_out, ...) for x (N, c_in, ...)."""
        conv, x = layer.module, F.dropout(_cast(x, down.dtype), dropout)
        spatial = down.dim() - 2
        h = conv._conv_forward(x, down.repeat(conv.groups, *[1] * (down.dim() - 1)), None)
        one_by_one = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
        return one_by_one(h, up[(..., *[None] * spatial)], groups=conv.groups)


class LowRankEmbedding(LowRank):
    """The same for embeddings: lora_A (r, vocabulary) is the factor that starts at zero, lora_B (d, r) ~ N(0, 1)."""

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """``lora_A = 0``, ``lora_B ~ N(0, 1)``."""
        self.lora_A.zero_()
        self.lora_B.copy_(torch.randn(self.lora_B.shape, dtype=self.lora_B.dtype, generator=generator))

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """The change of the output alone, scaled; (..., d) for indices x (...)."""
        down, up = self.factors()
        h = F.embedding(x, down.T, padding_idx=layer.module.padding_idx)
        return F.linear(self.drop(h), up)


class Recentred(LowRank):
    """``delta = scaling * (B A - B_0 A_0)``: a product that starts at ``start`` and acts as if it started at zero.

    The papers take the first product out of the weight (W <- W - scaling B_0 A_0) and add the trained one. That is the
    same function with the same gradients. Keeping B_0 A_0 beside it instead leaves the base bit for bit as it is, in
    any precision, and makes the start exact; it costs a second pair of thin products, which is not trained.

    ``start(weight, r, generator)`` gives A_0 (r, d_in) and B_0 (d_out, r) for a weight (d_out, d_in), not scaled yet:
    the product is what is to be taken out.
    """

    start: Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]]
    start_A: Tensor
    start_B: Tensor

    def __init__(self, target: Target, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(target, r, scaling, dropout)
        self.register_buffer("start_A", torch.zeros_like(self.lora_A))
        self.register_buffer("start_B", torch.zeros_like(self.lora_B))

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Both pairs at the start."""
        weight = layer.weight.detach().flatten(1).to(self.lora_A.dtype)
        self.restart(*self.start(weight, len(self.lora_A), generator))

    @torch.no_grad()
    def restart(self, A: Tensor, B: Tensor) -> None:
        """Start at the product of A (r, d_in) and B (d_out, r), which is what is taken out, not scaled yet."""
        # measured on the accelerator, while the adapter is not there yet
        self.lora_A.copy_(A.reshape(self.lora_A.shape)).div_(self.scaling.sqrt())
        self.lora_B.copy_(B).div_(self.scaling.sqrt())
        self.start_A.copy_(self.lora_A)
        self.start_B.copy_(self.lora_B)

    def first_factors(self) -> tuple[Tensor, Tensor]:
        """The two factors of the first product, the scaling in the second."""
        return self.start_A, self.scaling * self.start_B

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """The change of the output alone: what goes through the trained pair, less what goes through the first."""
        x = self.drop(x)
        return self.through(x, layer, *self.factors()) - self.through(x, layer, *self.first_factors())

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """The trained pair beside the first one, which is taken off."""
        return difference(self.factors(), self.first_factors())

    def delta(self) -> Tensor:
        """(d_out, d_in, ...)."""
        return super().delta() - dense(*self.first_factors())


class MeasuredStart(Recentred):
    """The same with a start that is measured on data; it is zero until then."""

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Zero."""
        for tensor in (self.lora_A, self.lora_B, self.start_A, self.start_B):
            tensor.zero_()


class RecentredConv(Recentred, LowRankConv):
    """The same for convolutions; the weight is flattened to (c_out, c_in / groups * kernel) for the start."""
