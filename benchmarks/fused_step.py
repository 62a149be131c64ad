"""Bytes saved for the backward pass and time of a step, a model computed by our operations, beside HF PEFT.

Two Llamas with LoRA r=8 on all linear layers of their blocks, and ``vit_base_patch16_224``, half of it and the whole.
Both sides have the same weights, and the same adapters, moved from where these start. No figure is given unless the
losses agree, and the gradients of all adapters. One thread: several wait for each other on a machine that is busy.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.adapted import by_peft, by_us, factors
from benchmarks.gpu.case import Machine
from benchmarks.row import Row, alternate, saved_bytes
from lightning_peft.callbacks.fused import fused

# relative, of sums in float32 that are made in another order: gradients of either side are up to 1.1e-5 off float64
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 2e-5

Loss = Callable[[nn.Module], Tensor]


class Side(NamedTuple):
    """A model with adapters, and what has to hold while it computes."""

    model: nn.Module
    loss: Loss
    adapters: list[Tensor]
    within: Callable[[nn.Module], AbstractContextManager[Any]]

    def step(self) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss, and its gradients."""
        with self.within(self.model):
            loss = self.loss(self.model)
            return loss.detach(), torch.autograd.grad(loss, self.adapters)

    def saved_bytes(self) -> int:
        """Beyond what the model has anyway."""
        with self.within(self.model):
            return saved_bytes(partial(self.loss, self.model), self.model.parameters())


def compared(what: str, base: nn.Module, blocks: str, loss: Loss, goals: tuple[str, str]) -> list[Row]:
    """Bytes and time of a step of ``base`` with adapters on the linear layers below ``blocks``."""
    adapters: dict[str, Tensor] = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(blocks):
            shape = module.in_features, module.out_features
            adapters |= factors(Machine(torch.device("cpu"), tiny=True), name, *shape, r=8)
    mine, his = copy.deepcopy(base).requires_grad_(False).train(), base.requires_grad_(False).train()
    ours = Side(mine, loss, by_us()(mine, adapters), fused)
    theirs = Side(his, loss, by_peft()(his, adapters), nullcontext)
    agree(what, ours.step(), theirs.step())
    sizes = ours.saved_bytes(), theirs.saved_bytes()
    times = alternate(ours.step, theirs.step, rounds=5, repeats=1)
    return [
        Row(f"{what}: saved for backward", *map(float, sizes), "bytes", goals[0]),
        Row(f"{what}: step", *times, "s", goals[1]),
    ]


def agree(what: str, mine: tuple[Tensor, Sequence[Tensor]], his: tuple[Tensor, Sequence[Tensor]]) -> None:
    """Raise unless losses agree, and gradients of all adapters."""

    def difference(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    loss = difference(mine[0], his[0])
    gradient = max(difference(a, b) for a, b in zip(mine[1], his[1], strict=True))
    if not (loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE):
        raise RuntimeError(f"{what}: results differ, the loss by {loss:.1e}, a gradient by {gradient:.1e}.")


def run() -> list[Row]:
    """All models."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for vocabulary, width, depth, batch, tokens in ((8192, 256, 4, 4, 256), (32000, 512, 6, 2, 512)):
        size = {"hidden_size": width, "intermediate_size": 43 * width // 16, "num_hidden_layers": depth}
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_attention_heads=8, **size))
        ids = torch.randint(vocabulary, (batch, tokens))
        what = f"Llama ({vocabulary}, {width}, {depth} layers), {batch} x {tokens} tokens"
        loss = partial(_llama_loss, ids=ids)
        rows += compared(what, llama, "model.layers.", loss, ("at most 0.45", "at most 0.65"))
    x, y = torch.randn(4, 3, 224, 224), torch.randint(1000, (4,))
    for depth in (6, 12):
        vit = timm.create_model("vit_base_patch16_224", depth=depth)
        loss = partial(_vit_loss, x=x, y=y)
        rows += compared(f"ViT-B, {depth} blocks, batch 4", vit, "blocks.", loss, ("at most 0.62", "at most 0.88"))
    torch.set_num_threads(threads)
    return rows


def _llama_loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def _vit_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)
