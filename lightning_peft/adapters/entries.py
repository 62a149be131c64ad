"""Changes of some entries of a weight, one number each."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import kernels
from lightning_peft.engine import Adapter, Layer, Target
from lightning_peft.engine.slots import base_class


class Entries(Adapter):
    """``delta`` is zero but for the chosen entries: values (n,) at ``indices`` (n,) of the flattened weight.

    An entry may be held: it keeps its value while others train. Its index i is stored as -1 - i then.

    Args:
        target: whose weight.
        places: (n,) the entries, ascending.
    """

    rank_axes: ClassVar[dict[str, tuple[int, ...]]] = {"values": (0,), "indices": (0,)}

    indices: Tensor

    def __init__(self, target: Target, places: Tensor) -> None:
        super().__init__()
        self.values = target.new_parameter(len(places))
        self.register_buffer("indices", places.to(torch.int32))
        self._kept: Tensor | None = None  # the values before a step of the optimizer

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """No change."""
        self.values.zero_()

    @property
    def held(self) -> Tensor:
        """(n,) which entries are held."""
        return self.indices < 0

    def places(self) -> Tensor:
        """(n,) int64, the places of the entries in the flattened weight."""
        return torch.where(self.held, -1 - self.indices, self.indices).long()

    def current(self, weight: Tensor) -> Tensor:
        """(n,) the entries of ``weight`` with the change added."""
        return weight.detach().flatten()[self.places()].to(self.values.dtype) + self.values

    def trained(self, weight: Tensor) -> Tensor:
        """``weight`` with the change added, and zero but for the entries that train."""
        values = torch.where(self.held, 0.0, self.current(weight))
        return values.new_zeros(weight.numel()).index_copy(0, self.places(), values).view(weight.shape)

    def hold(self, which: Tensor) -> None:
        """Let the entries ``which`` (n,) keep their values from now on."""
        self.indices.copy_(torch.where(which & ~self.held, -1 - self.indices, self.indices))

    def before_step(self) -> None:
        """Take the gradients of held entries away, and remember the values, which weight decay would move."""
        if self.held.any():
            self._kept = self.values.detach().clone()
            if self.values.grad is not None:
                self.values.grad.masked_fill_(self.held, 0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the values of held entries back."""
        if self._kept is not None:
            self.values.copy_(torch.where(self.held, self._kept, self.values))
            self._kept = None

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """layer(x) + x D^T; in one product above a base that does no more than its class."""
        weight, bias = layer.site.get(layer.module)
        if self.takes_the_place(layer, weight):
            return self.product(x, layer.module, weight, bias)
        y = layer(x)
        nothing = x.new_zeros(()).expand(weight.shape)  # a weight of zeros, of which one is stored
        return y + self.product(x, layer.module, nothing, None).to(y.dtype)

    def takes_the_place(self, layer: Layer, weight: Tensor) -> bool:
        """Whether the product of W + D is all that the layer below would compute, and W a tensor that is frozen."""
        patched = "_own_forward" in vars(layer.module)
        plain = type(weight) in (nn.Parameter, Tensor) and not weight.requires_grad
        return layer.is_base and plain and not patched

    def product(self, x: Tensor, module: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + D)^T + b, whose backward pass builds no gradient of a whole weight."""
        return kernels.linear_with_entries(x, weight, bias, self.values, self.indices)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W with the change added to its entries; all others stay bit for bit."""
        exact = weight.to(torch.promote_types(weight.dtype, self.values.dtype))
        return exact.flatten().index_add(0, self.places(), self.values.to(exact.dtype)).view(weight.shape), bias


# the forwards of convolutions that use their weight in a product and no more
_PLAIN = frozenset(cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


class EntriesConv(Entries):
    """The same for convolutions; of the gradient of the weight, a piece is there at a time."""

    def takes_the_place(self, layer: Layer, weight: Tensor) -> bool:  # noqa: D102
        own = base_class(layer.module)._conv_forward  # type: ignore[attr-defined]  # it is a convolution
        return super().takes_the_place(layer, weight) and own in _PLAIN

    def product(self, x: Tensor, module: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x with W + D, as the module makes it."""
        padding = module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        how = module.stride, padding, module.dilation, module.groups
        return kernels.conv_with_entries(x, weight, bias, self.values, self.indices, *how)
