"""X-LoRA: several low-rank experts in each layer, mixed token by token by a classifier that reads the model first.

Paper:    Buehler and Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language
          Models with Applications in Protein Mechanics and Molecular Design", 2024, arXiv:2402.07148.
Formula:  h = last hidden states of the model without its experts;  g = softmax(classifier(h) / temperature);
          then, in a second pass, y = W x + b + scaling * sum_e g_e B_e (A_e dropout(x)) in each layer
Shapes:   h (B, T, D); g (B, T, E), or (B, T, L, E) with a share of its own for each of L layers (``layerwise``);
          lora_A (E, r, d_in), lora_B (d_out, E, r); the classifier is one linear layer D -> E, or ``depth`` of them
          with ReLU between, ``size`` features wide
Init:     A_e ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B_e = 0, so y starts as the base; the classifier as ``nn.Linear``, its
          biases at zero. `load_experts` starts from adapters that were trained before, as in the paper
Merge:    none: the shares depend on the token
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_peft.adapters.experts import EmbeddingExperts, Experts, Router, RouterTarget, Seen, Shares, check_filled
from lightning_peft.engine import Adapter, Kind, Target, TargetedMethod, TargetError, Training, register
from lightning_peft.engine.limits import Count, Positive, Probability, check_range
from lightning_peft.engine.targets import module_target
from lightning_peft.parts.streams import token_stream


@register("xlora")
@dataclass(frozen=True, kw_only=True)
class XLoRA(TargetedMethod):
    """Low-rank experts in each layer, mixed token by token by a classifier.

    The model runs twice for each batch. Activation checkpoints have to be those of ``use_reentrant=False``.

    Args:
        num_experts: E, low-rank products in each layer.
        r: rank of each; that of the largest, where they are read from files.
        alpha: numerator of the scaling ``alpha / r``; None makes it 1.
        dropout: probability of dropping a feature of what the products are given, in training.
        train_experts: train the products too; else the classifier alone. Fresh products need it: they start at zero.
        depth: linear layers of the classifier.
        size: features between them.
        classifier_dropout: probability of dropping one of these in training.
        layerwise: a share of its own in each layer; else the same in all.
        softmax: shares are positive and add up to one; else they are the numbers that the classifier answers.
        temperature: what these are divided by before the softmax.
        top_k: keep the largest shares of a token alone, the others are zero; None keeps all.
        softmax_top_k: a softmax over those that are kept.
        global_scaling_weight: factor of all shares.
        module: path of the part that embeds the text, where a model has several. All layers to adapt are inside.
        target_modules, exclude_modules, layers_to_transform, modules_to_save: see `TargetedMethod`.

    Raises:
        AdapterError: ``top_k`` exceeds the experts; a call brings a cache, or a layer is given something else than the
            tokens; training begins with frozen experts that nobody has filled.
        TargetError: the model neither embeds a text nor is one stack of blocks of tokens; or a layer is outside.

    >>> from torch import tensor
    >>> XLoRA(num_experts=3, temperature=0.5).gates(tensor([1.0, 2.0, 2.0]))  # 1 / (1 + 2 e^2), ...
    tensor([0.0634, 0.4683, 0.4683])
    """

    paper: ClassVar[str] = "arXiv:2402.07148"
    modalities: ClassVar = ("text",)
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Experts, "embedding": EmbeddingExperts}
    acts_on: ClassVar = "blocks"
    mergeable: ClassVar[bool] = False

    num_experts: Count = 4
    r: Count = 8
    alpha: Positive | None = 16.0
    dropout: Probability = 0.0
    train_experts: bool = True
    depth: Count = 1
    size: Count = 2048
    classifier_dropout: Probability = 0.2
    layerwise: bool = False
    softmax: bool = True
    temperature: Positive = 1.0
    top_k: Count | None = None
    softmax_top_k: bool = False
    global_scaling_weight: float = 1.0
    module: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.top_k is None or self.top_k <= self.num_experts
        check_range("XLoRA", "top_k", self.top_k, fits, f"None or at most num_experts={self.num_experts}")

    def targets(self, model: nn.Module) -> list[Target]:
        """The part that is routed, what it looks at, and the layers with experts."""
        who = type(self).__name__
        stream = token_stream(model, who, self.module)
        inside = stream.inside(super().targets(model), self.target_modules, who)
        part = module_target(model, stream.path, stream.width)
        router = RouterTarget(part.name, part.module, part.site, part.owner, len(inside))
        return [router, *([module_target(model, stream.last, stream.width)] if stream.last else []), *inside]

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """A router, and experts that look to it."""
        if not targets:
            return []
        who, shares, scaling = type(self).__name__, Shares(), 1.0 if self.alpha is None else self.alpha / self.r
        part, *layers = targets
        if not isinstance(part, RouterTarget):
            raise TargetError(f"{who}: {part.name!r} was built after its router. Inject when the model is whole.")
        seen: list[Adapter] = [Seen(shares) for target in layers if target.site.kind == "module"]
        how = self.num_experts, self.r, scaling, self.dropout, self.train_experts, who
        experts = [self.adapter_types[t.site.kind](t, shares, i, *how) for i, t in enumerate(layers[len(seen) :])]
        classifier = self.sizes(part), self.num_experts, self.classifier_dropout, self.gates, who
        return [Router(part, shares, *classifier), *seen, *experts]

    def on_train_batch_start(self, training: Training) -> None:
        """See that the experts do something."""
        check_filled(training, type(self).__name__)

    def gates(self, logits: Tensor) -> Tensor:
        """The shares of the experts, (..., E), where the classifier answers ``logits`` (..., E)."""
        gates = (logits / self.temperature).softmax(-1) if self.softmax else logits
        if self.top_k is not None:
            gates = gates * torch.zeros_like(gates).scatter(-1, gates.topk(self.top_k).indices, 1)
        if self.softmax_top_k:
            none = gates == 0
            gates = gates.masked_fill(none, -torch.inf).softmax(-1).masked_fill(none, 0)
        return gates * self.global_scaling_weight

    def sizes(self, target: RouterTarget) -> list[tuple[int, int]]:
        """Features in and out of the layers of the classifier."""
        outputs = self.num_experts * (target.n_layers if self.layerwise else 1)
        widths = [target.d_out, *[self.size] * (self.depth - 1), outputs]
        return list(zip(widths, widths[1:], strict=False))

    def num_trainable(self, target: Target) -> int:
        """num_experts * r * (d_in + d_out) per layer, and (a + 1) * b of each layer a -> b of the classifier."""
        if isinstance(target, RouterTarget):
            return sum((a + 1) * b for a, b in self.sizes(target))
        if target.site.kind == "module" or not self.train_experts:
            return 0
        return self.num_experts * self.r * (target.d_in + target.d_out)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """The same shares everywhere, and shares for each layer."""
        return cls(num_experts=2, r=2), cls(num_experts=3, r=2, depth=2, size=9, classifier_dropout=0, layerwise=True)
