"""A weight that learns in a subspace of its gradients, as a low-rank product of which one factor is given."""

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.engine import Layer, Target, Training


class Projected(LowRank):
    """``delta = Z P`` or ``P Z``: P the directions, a buffer; Z trained, and folded into the weight after each step.

    Z is zero whenever the layer runs, so the output is that of the layer below. The gradient of Z is that of the
    weight, projected: the full gradient (d_out, d_in) is never made but for finding new directions.

    For d_out >= d_in: lora_B = Z (d_out, r), lora_A = P (r, d_in), orthonormal rows. Else lora_B = P (d_out, r),
    orthonormal columns, lora_A = Z (r, d_in).

    Args:
        target: the layer to adapt.
        r: number of directions.
    """

    missed = False  # whether new directions are due, and there were no finite gradients to take them from

    def __init__(self, target: Target, r: int) -> None:
        super().__init__(target, r, scaling=1.0)
        self.tall = target.d_out >= target.d_in
        self.fix("lora_A" if self.tall else "lora_B")

    @property
    def directions(self) -> Tensor:
        """P."""
        return self.lora_A if self.tall else self.lora_B

    @property
    def coordinates(self) -> nn.Parameter:
        """Z."""
        return self.lora_B if self.tall else self.lora_A

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Random directions until there are gradients, and no change along them."""
        P = self.directions
        random = torch.empty(max(P.shape), min(P.shape), dtype=P.dtype)
        random = nn.init.orthogonal_(random, generator=generator)
        P.copy_(random.T if self.tall else random)
        self.coordinates.zero_()

    @torch.no_grad()
    def turn_to(self, gradient: Tensor) -> None:
        """Take the leading singular directions of ``gradient`` (d_out, d_in), and project it to the gradient of Z."""
        gradient = gradient.to(self.directions.dtype)
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        r = min(self.directions.shape)
        self.directions.copy_(right[:r] if self.tall else left[:, :r])
        P = self.directions
        self.coordinates.grad = gradient @ P.T if self.tall else P.T @ gradient

    @torch.no_grad()
    def fold(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the change to ``weight`` (d_out, d_in), and start again from zero."""
        weight.add_((scale * self.delta()).to(weight.dtype))
        self.coordinates.zero_()


def projected(training: Training) -> list[tuple[nn.Parameter, Projected, bool]]:
    """(weight as it is stored, its adapter, stored as (d_in, d_out)) of each projected layer."""
    return [
        (module._parameters[adapter.site.weight], adapter, adapter.site.transposed)  # type: ignore[misc]
        for _, module, adapter in training.adapters()
        if isinstance(adapter, Projected)
    ]
