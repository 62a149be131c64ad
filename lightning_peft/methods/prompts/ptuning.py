"""P-tuning: a prompt that a small network makes of a table.

Paper:    Liu et al., "GPT Understands, Too", 2021, arXiv:2103.10385.
Formula:  prompt = W_3 relu(W_2 relu(W_1 T^T + b_1) + b_2) + b_3, or, with ``encoder="lstm"``,
          prompt = W_2 relu(W_1 LSTM(T)^T + b_1) + b_2; then y = model([prompt; E(ids)]) as in prompt tuning
Shapes:   T (p, D); of the MLP W_1 (h, D), W_2 (h, h), W_3 (D, h); the LSTM reads T both ways, with h features each way
          in ``num_layers`` layers, and W_1 is (2h, 2h), W_2 (D, 2h)
Init:     T ~ N(0, 1); layers as ``nn.Linear`` and ``nn.LSTM``
Merge:    none: tokens are no weights
Deviates from HF PEFT: the network runs in evaluation too, so that what it makes is never stale. ``adapter.prompt()`` is
          the prompt itself, if you want to keep it alone.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.prefix import normal, uniform
from lightning_peft.adapters.prompts import Prompt, PromptMethod
from lightning_peft.engine import Target, register
from lightning_peft.engine.limits import Count


class Encoded(Prompt):
    """What a small network makes of the table."""

    def __init__(self, target: Target, method: "PTuning") -> None:
        super().__init__(target, method.num_virtual_tokens)
        D, h, lstm = target.d_out, method.encoder_hidden_size, method.encoder == "lstm"
        with torch.device("meta"):  # so that no random number is drawn; `reset` fills them
            self.lstm = nn.LSTM(D, h, method.num_layers, bidirectional=True) if lstm else None
            sizes = (2 * h, 2 * h, D) if lstm else (D, h, h, D)
            self.mlp = nn.ModuleList([nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False)])
        self.to_empty(device=self.table.device).to(self.table.dtype)

    def reset(self, generator: torch.Generator, embedding: nn.Embedding | None) -> None:
        """T ~ N(0, 1); all others uniform within 1 / sqrt(features that the layer reads)."""
        normal(self.table, 1.0, generator)
        for layer in self.mlp:
            for parameter in layer.parameters():
                uniform(parameter, layer.in_features**-0.5, generator)  # type: ignore[operator, arg-type]
        for parameter in () if self.lstm is None else self.lstm.parameters():
            uniform(parameter, self.lstm.hidden_size**-0.5, generator)  # type: ignore[union-attr]

    def forward(self) -> Tensor:
        """(p, D), in the precision of the table: not every device has an LSTM in a lower one."""
        with torch.autocast(self.table.device.type, enabled=False):
            x = self.table if self.lstm is None else self.lstm(self.table)[0]
            for i, layer in enumerate(self.mlp):
                x = layer(F.relu(x) if i else x)
            return x


@register("ptuning")
@dataclass(frozen=True, kw_only=True)
class PTuning(PromptMethod):
    """A prompt that a small network makes of a table.

    Args:
        num_virtual_tokens: p, tokens of the prompt.
        encoder: ``"mlp"`` of three layers, or ``"lstm"`` and two layers.
        encoder_hidden_size: h, features inside it.
        num_layers: of the LSTM.
        module: path of the part that embeds the text, where a model has several.
        blocks: path of the list of blocks, in a model that embeds no text.
        class_tokens: tokens that stay before the prompt. By default the first one, where a text is looked at both ways
            and heads read their answer there; none elsewhere.

    Raises:
        AdapterError: a call brings more tokens than the model has positions for, less p.
        TargetError: p is not below the positions of the model, or its blocks take no further tokens.

    >>> import torch
    >>> from torch import nn, tensor
    >>> from lightning_peft import inject
    >>> layer = nn.TransformerEncoderLayer(2, 1, 2, batch_first=True)
    >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> model = inject(model, PTuning(num_virtual_tokens=1, encoder_hidden_size=1))
    >>> prompt = model.layers[0].adapters["default"].prompt
    >>> prompt.table.data = tensor([[1.0, 2.0]])
    >>> for layer, weight in zip(prompt.mlp, ([[3.0, 1.0]], [[2.0]], [[1.0], [-1.0]])):
    ...     layer.weight.data, layer.bias.data = tensor(weight), torch.ones(len(weight))
    >>> prompt()  # relu(3 + 2 + 1) = 6; relu(2 * 6 + 1) = 13
    tensor([[ 14., -12.]], grad_fn=<AddmmBackward0>)
    """

    paper: ClassVar[str] = "arXiv:2103.10385"

    encoder: Literal["mlp", "lstm"] = "mlp"
    encoder_hidden_size: Count = 128
    num_layers: Count = 2

    def prompt(self, target: Target) -> Prompt:
        """What the network makes."""
        return Encoded(target, self)

    def num_prompt(self, width: int) -> int:
        """p D of the table, and of the layers as in Shapes, with their biases."""
        D, h = width, self.encoder_hidden_size
        if self.encoder == "mlp":
            return self.num_virtual_tokens * D + h * (D + 1) + h * (h + 1) + D * (h + 1)
        gates = [2 * 4 * h * (d_in + h + 2) for d_in in (D, *[2 * h] * (self.num_layers - 1))]
        return self.num_virtual_tokens * D + sum(gates) + 2 * h * (2 * h + 1) + D * (2 * h + 1)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Both networks."""
        mlp = cls(num_virtual_tokens=3, encoder_hidden_size=5)
        return mlp, replace(mlp, encoder="lstm", num_layers=1)
