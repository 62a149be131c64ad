"""Pfeiffer adapters: one bottleneck in each block, behind its feed-forward network.

Paper:    Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", 2021,
          arXiv:2005.00247.
Formula:  h <- h + s (U f(D h + c) + e), h the output of the feed-forward network before the residual add
Shapes:   h (..., d), D (r, d), c (r,), U (d, r), e (d,)
Init:     as HoulsbyAdapter
Merge:    not possible: f is not linear
Deviates from the library of AdapterHub: in models that normalise behind the residual add, h is what the feed-forward
          network answers, where that library first adds the residual and normalises.
"""

from dataclasses import dataclass
from typing import ClassVar

from lightning_peft.adapters.bottleneck import Activation
from lightning_peft.engine import register
from lightning_peft.engine.limits import Count
from lightning_peft.methods.features.houlsbyadapter import HoulsbyAdapter
from lightning_peft.parts.sublayers import SublayerKind


@register("pfeifferadapter")
@dataclass(frozen=True, kw_only=True)
class PfeifferAdapter(HoulsbyAdapter):
    """Half of the adapters of `HoulsbyAdapter`, with little loss; norm layers stay frozen.

    Args:
        r: width of the bottlenecks; 48 is a sixteenth of 768, the customary share.
        activation: f.
        train_norms: train every norm layer beside the adapters.
        scaling: see `HoulsbyAdapter`; so for the arguments that follow it, and for errors.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_peft import inject
    >>> block = lambda: nn.ModuleDict({"attn": nn.Linear(2, 2), "up": nn.Linear(2, 3), "down": nn.Linear(3, 2)})
    >>> model = inject(nn.ModuleList([block(), block()]), PfeifferAdapter(r=1, activation="tanh", scaling=2.0))
    >>> layer, x = model[1]["down"], torch.ones(1, 3)
    >>> layer.weight.data.fill_(0.0), layer.bias.data.fill_(0.5)  # h = (0.5, 0.5)
    (tensor(...), tensor(...))
    >>> a = layer.adapters["default"]
    >>> a.down.data, a.up.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]])
    >>> [round(y, 4) for y in layer(x)[0].tolist()]  # 0.5 + 2 tanh(1), 0.5
    [2.0232, 0.5]
    """

    paper: ClassVar[str] = "arXiv:2005.00247"
    sublayers: ClassVar[tuple[SublayerKind, ...]] = ("feedforward",)

    r: Count = 48
    activation: Activation = "relu"
    train_norms: bool = False
