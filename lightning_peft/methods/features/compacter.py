"""Compacter: Houlsby adapters whose matrices are sums of Kronecker products, with one factor common to all adapters.

Paper:    Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", 2021, arXiv:2106.04647.
Formula:  h <- h + U f(D h + c) + e, h the output of an attention or a feed-forward network before the residual add;
          D^T = sum_k C_k kron (A_k B_k), kron the Kronecker product; U^T likewise, with the same C and other A, B
Shapes:   C (n, n, n), one for all adapters of the model; for D: A (n, d/n, phm_rank), B (n, phm_rank, r/n), c (r,); for
          U: A (n, r/n, phm_rank), B (n, phm_rank, d/n), e (d,)
Init:     A, B ~ Glorot's uniform rule with gain sqrt 2, C ~ N(0, init_std^2), c = e = 0: y starts as the base but for
          about init_std^2
Merge:    not possible: f is not linear
Deviates: r is d / reduction_factor rounded to a multiple of n. C lies in the first adapter; layers that are adapted
          later, by another call of ``inject``, share one of their own.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from lightning_peft.adapters.bottleneck import Activation
from lightning_peft.adapters.hypercomplex import HypercomplexBottleneck
from lightning_peft.engine import Adapter, Kind, Target, TargetError, register
from lightning_peft.engine.limits import Count, Positive, Probability
from lightning_peft.parts.sublayers import SublayerKind, SublayerMethod


@register("compacter")
@dataclass(frozen=True, kw_only=True)
class Compacter(SublayerMethod):
    """Bottlenecks of a few hundred numbers each; norm layers train beside them.

    Args:
        n: number of Kronecker products, and size of their common factors; it has to divide the width of the model.
        reduction_factor: width of the model over that of the bottlenecks.
        phm_rank: rank of the second factors.
        after_attention: put adapters behind attentions too, but for those that look at another sequence, as in the
            paper; without it, this is the paper's Compacter++.
        activation: f.
        dropout: probability of dropping a feature of the bottleneck, in training only.
        init_std: standard deviation of C at the start.
        target_modules: patterns of linear layers and convolutions behind which to put adapters, in any model; by
            default the sub-layers of all blocks are found.
        train_norms: train every norm layer, as in the paper; a second set of adapters beside this one cannot.
        blocks: see `ParallelAdapter`; so for the arguments that follow it.

    Raises:
        AdapterError: an argument is out of range.
        TargetError: ``n`` does not divide a width; there are no blocks, or none with such sub-layers; or a pattern
            matches nothing.

    >>> import torch
    >>> from lightning_peft import inject
    >>> base = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> a = inject(base, Compacter(n=2, reduction_factor=1, target_modules="0"))[0].adapters["default"]
    >>> a.phm_C.data = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]])
    >>> a.down_A.data, a.down_B.data = torch.tensor([[[2.0]], [[3.0]]]), torch.ones(2, 1, 1)
    >>> a.matrices()[0].T.tolist()  # C_1 * 2 + C_2 * 3
    [[2.0, 3.0], [0.0, 2.0]]
    """

    paper: ClassVar[str] = "arXiv:2106.04647"
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {
        k: HypercomplexBottleneck for k in ("linear", "conv", "module")
    }
    mergeable: ClassVar[bool] = False

    n: Count = 4
    reduction_factor: Count = 32
    phm_rank: Count = 1
    after_attention: bool = True
    activation: Activation = "gelu_new"
    dropout: Probability = 0.0
    init_std: Positive = 1e-4
    train_norms: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds: tuple[SublayerKind, ...] = ("attention", "feedforward") if self.after_attention else ("feedforward",)
        object.__setattr__(self, "sublayers", kinds)

    def width(self, target: Target) -> int:
        """r: width of the bottleneck behind ``target``."""
        return self.n * max(1, round(target.d_out / (self.reduction_factor * self.n)))

    def targets(self, model: nn.Module) -> list[Target]:
        """The layers that are named, or where the output of each sub-layer leaves."""
        found = self.named(model) if self.target_modules else [s.exit for s in self.found(model) if not s.crosses]
        for target in found:
            if target.d_out % self.n:
                fitting = [n for n in range(1, target.d_out + 1) if all(t.d_out % n == 0 for t in found)]
                raise TargetError(
                    f"Compacter: n={self.n} does not divide the {target.d_out} features of {target.name!r}. Those that "
                    f"divide all widths here are {', '.join(map(str, fitting[:8]))}; or leave the layer out with "
                    "exclude_modules."
                )
        return found

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """Bottlenecks, the first of which holds what is common to all."""
        made: list[HypercomplexBottleneck] = []
        for target in targets:
            made.append(
                HypercomplexBottleneck(
                    target,
                    self.width(target),
                    self.n,
                    self.phm_rank,
                    made[0] if made else None,
                    init_std=self.init_std,
                    activation=self.activation,
                    dropout=self.dropout,
                )
            )
        return list(made)

    def num_trainable(self, target: Target) -> int:
        """2 phm_rank (d + r) + d + r, without C."""
        return (2 * self.phm_rank + 1) * (target.d_out + self.width(target))

    def total_trainable(self, targets: list[Target]) -> int:
        """The sum of it, and n^3 for C."""
        return super().total_trainable(targets) + (self.n**3 if targets else 0)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """As in the paper; and behind named layers, of higher rank."""
        named = cls(n=3, phm_rank=2, reduction_factor=2, target_modules=("proj", "head"), train_norms=False)
        return cls(n=2, reduction_factor=3, after_attention=False), named
