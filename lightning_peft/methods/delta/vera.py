"""VeRA: train two vectors for each layer, around two random matrices that all layers share.

Paper:    Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", 2024, arXiv:2310.11454.
Formula:  y = W x + b + diag(lambda_b) B diag(lambda_d) A dropout(x)
Shapes:   x (..., d_in), A (r, d_in), B (d_out, r), the leading columns of one A and rows of one B for all layers;
          lambda_d (r,), lambda_b (d_out,); in a convolution d_in = c_in / groups * kernel
Init:     A ~ U(-sqrt(6 / d_in), sqrt(6 / d_in)), B ~ U(-sqrt(6 / r), sqrt(6 / r)), not trained;
          lambda_d = d_initial, lambda_b = 0; y starts as the base
Merge:    W <- W + diag(lambda_b) B diag(lambda_d) A
Deviates from HF PEFT: A is scaled by the d_in of each layer, not by the largest of those adapted, and the rows of the
          shared numbers do not depend on how many there are: an adapter does not depend on which others there are.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.adapters.low_rank import LowRank, LowRankConv
from lightning_peft.engine import Adapter, Kind, Layer, Target, TargetedMethod, register
from lightning_peft.engine.limits import Count, NonZero, Probability
from lightning_peft.parts.bank import Banked, bank


class SharedProduct(Banked, LowRank):
    """``delta = diag(lambda_b) B diag(lambda_d) A``, A and B of banks."""

    def __init__(self, target: Target, method: "VeRA") -> None:
        Adapter.__init__(self)
        self.vera_lambda_b, self.vera_lambda_d = target.new_parameter(target.d_out), target.new_parameter(method.r)
        self.d_initial, self.dropout, self.shape = method.d_initial, method.dropout, target.shape
        self.banks = bank("vera_A", method.seed, method.r), bank("vera_B", method.seed, method.r)
        bounds = 6 / (target.d_in * method.r) ** 0.5  # of A and B
        self.register_buffer("scaling", self.vera_lambda_b.new_tensor(bounds), persistent=False)
        self.numbers()

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """The same for every layer; nothing is drawn."""
        self.vera_lambda_d.fill_(self.d_initial)
        self.vera_lambda_b.zero_()

    def numbers(self) -> tuple[Tensor, Tensor]:
        """A^T (d_in, r) and B (d_out, r), both without their bounds."""
        A, B = self.banks
        return A.rows(self.shape[1:].numel(), self.vera_lambda_d), B.rows(self.shape[0], self.vera_lambda_d)

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """lambda_b * (B (lambda_d * (A x))): beside the vectors, activations are all that the backward pass keeps."""
        A, B = self.numbers()
        h = F.linear(self.drop(x.to(A.dtype)), A.T) * (self.scaling * self.vera_lambda_d)
        return F.linear(h, B) * self.vera_lambda_b

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, d_in, ...), and B with both vectors and the bounds (d_out, r)."""
        A, B = self.numbers()
        return A.T.unflatten(1, self.shape[1:]), self.scaling * self.vera_lambda_b[:, None] * B * self.vera_lambda_d


class SharedProductConv(SharedProduct, LowRankConv):
    """The same for convolutions, whose factors are built."""

    product = LowRank.product


@register("vera")
@dataclass(frozen=True, kw_only=True)
class VeRA(TargetedMethod):
    """Two trained vectors for each layer around random matrices that follow from ``seed``.

    No checkpoint holds these matrices. The files of `save_adapter` do, for HF PEFT, which draws others from a seed.

    Args:
        r: rank of the shared matrices; it may exceed what a layer can use, and costs one number per layer each.
        d_initial: initial value of ``lambda_d``.
        seed: of the shared matrices, which are the same on every machine.
        dropout: probability of dropping an input feature of the update, in training only.
        target_modules: see `LoRA`; so for the arguments that follow it.

    Raises:
        AdapterError: ``r``, ``d_initial`` or ``dropout`` is out of range.

    >>> from torch import nn, ones, allclose
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(3, 2))
    >>> x, y = ones(1, 3), base(ones(1, 3))
    >>> vera = inject(base, VeRA(r=4, d_initial=0.5))[0].adapters["default"]
    >>> _ = nn.init.constant_(vera.vera_lambda_b, 3.0)
    >>> A, B = (6 / 3) ** 0.5 * vera.banks[0].rows(3, x).T, (6 / 4) ** 0.5 * vera.banks[1].rows(2, x)
    >>> allclose(base(x), y + 3.0 * 0.5 * x @ A.T @ B.T, atol=1e-6)
    True
    """

    paper: ClassVar[str] = "arXiv:2310.11454"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": SharedProduct, "conv": SharedProductConv}

    r: Count = 256
    d_initial: NonZero = 0.1
    seed: int = 0
    dropout: Probability = 0.0

    def num_trainable(self, target: Target) -> int:
        """r + d_out."""
        return self.r + target.d_out

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """As it comes, and with other shared matrices and a trained head."""
        return cls(), cls(r=3, d_initial=1.0, seed=1, modules_to_save="head")
