"""SSF: scale and shift the output of every operation.

Paper:    Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", 2022,
          arXiv:2210.08823.
Formula:  y = scale * op(x) + shift, channel by channel, for each linear layer, convolution and normalisation op
Shapes:   scale, shift (C,) for C output features or channels
Init:     scale ~ N(1, 0.02^2), shift ~ N(0, 0.02^2): the output at the start differs a little from the base
Merge:    W <- scale * W (rows), b <- scale * b + shift; a missing bias is created
Deviates from the paper: the channel axis is known from the layer's type, where the reference code compares sizes; of a
          normalisation layer weight and bias are changed, not its output, which is the same where the layer is only
          that, and is right where an activation is fused into it; ConvNeXt's last one sits on ``head.norm``.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft import kernels
from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetedMethod, register
from lightning_peft.engine.limits import NonNegative, Patterns


class ScaleShift(Adapter):
    """Scale and shift of the output channels of one operation."""

    def __init__(self, target: Target, method: "SSF") -> None:
        super().__init__()
        self.init_std = method.init_std
        self.scale, self.shift = target.new_parameter(target.d_out), target.new_parameter(target.d_out)
        self.axes_after = max(len(target.shape) - 2, 0)  # spatial axes behind the channels of an output

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """scale ~ N(1, init_std^2), shift ~ N(0, init_std^2)."""
        for parameter, mean in ((self.scale, 1.0), (self.shift, 0.0)):
            noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            parameter.copy_(mean + self.init_std * noise)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """scale * layer(x) + shift along the channel axis."""
        y = layer(x)
        if not self.axes_after:
            return kernels.scale_shift(y, self.scale, self.shift)
        spatial = (..., *[None] * self.axes_after)
        return (y * self.scale[spatial] + self.shift[spatial]).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows times scale, bias times scale plus shift."""
        rows = (..., *[None] * (weight.dim() - 1))
        shift: Tensor = self.shift
        scale: Tensor = self.scale
        if self.site.kind == "norm":  # its bias has the shape of its weight
            scale, shift = scale[rows], shift[rows].expand_as(weight)
        return weight * self.scale[rows], shift if bias is None else bias * scale + shift

    def unmergeable_because(self) -> str | None:
        """RMSNorm has nowhere to put a shift."""
        return None if self.site.bias else "its layer has no bias that could take the shift."


@register("ssf")
@dataclass(frozen=True, kw_only=True)
class SSF(TargetedMethod):
    """Scale and shift after every operation; the output head is trained whole.

    Args:
        target_modules: by default every linear layer, convolution and normalisation but the head (and but Swin's
            patch-merging ``reduction``, which the paper leaves out, and norms like ``nn.RMSNorm`` that have no bias
            which could take the shift: with them, by name, it does not merge). Norms are those of torch, and what is
            made of them.
        modules_to_save: modules trained whole, by default the output head as in the paper.
        init_std: standard deviation of both initial values (0.02 in the reference code); 0 starts as the base.
        exclude_modules: see `LoRA`; so for ``layers_to_transform``.

    Raises:
        AdapterError: ``init_std`` is negative.
        TargetError: a pattern matches nothing, or no output head is known: name it in ``modules_to_save``.

    >>> from torch import nn, tensor, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 2))
    >>> y = base(ones(1, 3))
    >>> ssf = inject(base, SSF(modules_to_save=()))[0].adapters["default"]
    >>> ssf.scale.data, ssf.shift.data = tensor([2.0, 3.0]), tensor([0.5, -1.0])
    >>> allclose(base(ones(1, 3)), y * tensor([2.0, 3.0]) + tensor([0.5, -1.0]))
    True
    """

    paper: ClassVar[str] = "arXiv:2210.08823"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": ScaleShift, "conv": ScaleShift, "norm": ScaleShift}
    identity_at_init: ClassVar[bool] = False

    target_modules: Patterns = "all-layers"
    modules_to_save: Patterns = "output-head"
    init_std: NonNegative = 0.02

    def targets(self, model: nn.Module) -> list[Target]:
        """The chosen operations; Swin's ``reduction``, and norms without a place for the shift, only if named."""
        found = super().targets(model)
        if self.target_modules != "all-layers":
            return found
        left_out = {t.name for t in found if t.site.kind == "norm" and t.site.bias is None}
        return [t for t in found if t.name not in left_out and t.name.split(".")[-1] != "reduction"]

    def num_trainable(self, target: Target) -> int:
        """2 * C."""
        return 2 * target.d_out

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """As in the paper, and starting as the base on chosen layers."""
        return cls(modules_to_save="head"), cls(target_modules="v_proj", init_std=0.0, modules_to_save=())
