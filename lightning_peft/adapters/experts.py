"""Experts: several low-rank products on one layer, and a router that shares them out token by token."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_peft.adapters.small_nets import Affine
from lightning_peft.engine import Adapter, AdapterError, Layer, Target, Training
from lightning_peft.engine.slots import base_class
from lightning_peft.kernels.mixture_lora import mixture_lora
from lightning_peft.parts.caches import CACHES
from lightning_peft.parts.condition import given_to


class Shares:
    """What a router hands to its experts within one forward; a copy of it is empty.

    Attributes:
        gates: (B, T, L, E), the share of each expert in each layer; of L = 1 the same in all of them.
        quiet: the experts do nothing: the router looks at the model without them.
        seen: what a `Seen` has kept meanwhile.
        again: the gates of the forward that is going back at the moment, for layers that are computed again then.
    """

    def __init__(self) -> None:
        self.gates: Tensor | None = None
        self.quiet = False
        self.seen: Any = None
        self.again: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Shares, ()

    def of_layer(self, index: int) -> Tensor | None:
        """(B, T, E); None outside of a forward."""
        gates = self.gates
        if gates is None and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            gates = self.again  # an activation checkpoint: this is a backward pass
        return None if gates is None else gates[:, :, index % gates.shape[2]]

    def kept_for(self, answer: Tensor, gates: Tensor) -> None:
        """When a gradient comes to ``answer``, go back with the ``gates`` of its forward."""

        def come_back(_: Tensor) -> None:
            self.again = gates

        answer.register_hook(come_back)


class Experts(Adapter):
    """``scaling * sum_e g_e B_e A_e dropout(x)`` more: lora_A (E, r, d_in), lora_B (d_out, E, r), gates g (B, T, E).

    Args:
        target: the layer to adapt.
        shares: where the gates come from.
        index: the place of the layer among those of the router.
        num_experts: E.
        r: rank of each; a file decides it.
        scaling: factor of all products.
        dropout: probability of dropping a feature of the input, in training only.
        trains: whether the products do.
        who: how errors name the method.
    """

    rank_axes: ClassVar[dict[str, tuple[int, ...]]] = {"lora_A": (1,), "lora_B": (2,)}

    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor

    def __init__(
        self,
        target: Target,
        shares: Shares,
        index: int,
        num_experts: int,
        r: int,
        scaling: float,
        dropout: float,
        trains: bool,
        who: str,
    ) -> None:
        super().__init__()
        factors = {
            "lora_A": target.new_parameter(num_experts, r, target.d_in),
            "lora_B": target.new_parameter(target.d_out, num_experts, r),
        }
        for name, factor in factors.items():
            if trains:
                self.register_parameter(name, factor)
            else:
                self.register_buffer(name, factor.detach())
        self.register_buffer("scaling", self.lora_A.new_tensor(scaling), persistent=False)
        self.shares, self.index, self.dropout, self.who = shares, index, dropout, who

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """``lora_A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))``, ``lora_B = 0``."""
        for A in self.lora_A:
            random = torch.empty(A.shape, dtype=A.dtype)
            A.copy_(nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator))
        self.lora_B.zero_()

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """What lies below, and the experts' products by their shares."""
        y = layer(x)
        if self.shares.quiet:
            return y
        gates = self.shares.of_layer(self.index)
        if gates is None or x.shape[:2] != gates.shape[:2]:
            now = "no call of the model" if gates is None else f"one with tokens {tuple(gates.shape[:2])} (batch, n)"
            raise AdapterError(
                f"{self.who}: a {base_class(layer.module).__name__} with experts was called with {tuple(x.shape)} "
                f"during {now}, so they cannot be shared out. Call the model as a whole, and leave out "
                "(exclude_modules) layers that see something else than its tokens."
            )
        return y + self.change(x, layer, gates).to(y.dtype)

    def change(self, x: Tensor, layer: Layer, gates: Tensor) -> Tensor:
        """(B, T, d_out) for x (B, T, d_in)."""
        return mixture_lora(
            F.dropout(x, self.dropout, self.training), self.lora_A, self.lora_B.transpose(0, 1), gates, self.scaling
        )

    def unmergeable_because(self) -> str:
        """Their shares are other ones for each token."""
        return "the shares of its experts depend on the token, so there is no one change of the weights."


class EmbeddingExperts(Experts):
    """The same for embeddings: lora_A (E, r, vocabulary) is the factor that starts at zero, lora_B ~ N(0, 1)."""

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """``lora_A = 0``, ``lora_B ~ N(0, 1)``."""
        self.lora_A.zero_()
        self.lora_B.copy_(torch.randn(self.lora_B.shape, dtype=self.lora_B.dtype, generator=generator))

    def change(self, x: Tensor, layer: Layer, gates: Tensor) -> Tensor:
        """(B, T, d) for indices x (B, T)."""
        A = self.lora_A.flatten(0, 1)
        h = F.embedding(x, A.T, padding_idx=layer.module.padding_idx).unflatten(-1, self.lora_A.shape[:2])
        h = F.dropout(h, self.dropout, self.training) * gates[..., None].to(h.dtype)
        return torch.einsum("bter, der -> btd", h, self.scaling * self.lora_B)


def check_filled(training: Training, who: str) -> None:
    """Raise an `AdapterError` when training begins with experts that are frozen and answer with zeros.

    Then no gradient reaches the router, and nothing is learnt.
    """
    experts = [adapter for _, _, adapter in training.adapters() if isinstance(adapter, Experts)]
    filled = (next(e.parameters(), None) is not None or (e.lora_A.any() and e.lora_B.any()) for e in experts)
    if training.is_new("begun") and not any(filled):
        raise AdapterError(
            f"{who}: its experts are frozen, and nobody has filled them. Take trained ones with load_experts(model, "
            "folders), or train them (train_experts=True)."
        )


class Seen(Adapter):
    """Keeps what its module answers while the router looks at the model."""

    def __init__(self, shares: Shares) -> None:
        super().__init__()
        self.shares = shares

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the module answers."""
        y = layer(x)
        if self.shares.quiet:
            self.shares.seen = y
        return y

    def unmergeable_because(self) -> str:
        """It changes nothing."""
        return "it belongs to a router, whose answer is no change of weights."


@dataclass(frozen=True)
class RouterTarget(Target):
    """The part of a model whose calls are routed; ``n_layers`` have experts."""

    n_layers: int


class Router(Adapter):
    """Calls its module twice: without the experts, to share them out, and with them.

    Args:
        target: the part of the model.
        shares: where the experts look for what is theirs.
        sizes: features in and out of the layers of the classifier.
        num_experts: E, the last axis of what it answers.
        dropout: probability of dropping a feature between these layers, in training only.
        gates: makes the shares (..., E) of the classifier's answers (..., E).
        who: how errors name the method.
    """

    def __init__(
        self,
        target: RouterTarget,
        shares: Shares,
        sizes: Sequence[tuple[int, int]],
        num_experts: int,
        dropout: float,
        gates: Callable[[Tensor], Tensor],
        who: str,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Affine(target, a, b) for a, b in sizes)
        self.shares, self.num_experts, self.dropout, self.gates, self.who = shares, num_experts, dropout, gates, who

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """As ``nn.Linear``, biases at zero."""
        for part in self.layers:
            part.fill(generator)  # type: ignore[operator]

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the module answers with its experts."""
        cached = [name for name, value in given_to(x, layer).items() if name in CACHES and value is not None]
        if cached:
            raise AdapterError(
                f"{self.who}: a cache holds the tokens as the experts answered them, and the classifier has to see "
                f"them without. Call the model without {cached[0]}; generate(..., use_cache=False)."
            )
        shares = self.shares
        shares.seen, shares.quiet = None, True
        try:
            with torch.no_grad():
                answer = layer(x)
        finally:
            shares.quiet = False
        hidden = _hidden(answer if shares.seen is None else shares.seen)
        shares.gates = gates = self.gates(self.classify(hidden))
        shares.seen = None
        try:
            answer = layer(x)
        finally:
            shares.gates = None
        if not torch.compiler.is_compiling():
            for part in tree_leaves(answer):
                if isinstance(part, Tensor) and part.requires_grad:
                    shares.kept_for(part, gates)
        return answer

    def classify(self, hidden: Tensor) -> Tensor:
        """(B, T, L or 1, E) for hidden states (B, T, D)."""
        for i, part in enumerate(self.layers):
            hidden = part(F.dropout(F.relu(hidden), self.dropout, self.training) if i else hidden)
        return hidden.unflatten(-1, (-1, self.num_experts))

    def unmergeable_because(self) -> str:
        """It calls the model twice."""
        return "a classifier shares its experts out token by token, which is no change of weights."


def _hidden(answer: Any) -> Tensor:
    """(B, T, D) of what a part answered that embeds a text, or a block."""
    if isinstance(answer, Tensor):
        return answer
    return answer["last_hidden_state"] if hasattr(answer, "keys") else answer[0]
