"""Bytes saved for the backward pass and time of a step, norms and gates by our operations, beside HF PEFT.

Shapes: a Llama of 8,192 tokens, width 256 and 4 layers, LoRA r=8 on all its linear layers, with the loss of
transformers and with ours; and six blocks of ``vit_base_patch16_224``, LoRA r=8 on qkv, proj, fc1 and fc2.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.row import Row, alternate
from lightning_peft import LoRA, inject
from lightning_peft.callbacks.fused import fused
from lightning_peft.kernels import linear_cross_entropy

VOCABULARY = 8192


def saved_bytes(compute: Callable[[], Tensor], model: nn.Module) -> int:
    """What ``compute`` saves for its backward pass, each storage once, less the parameters of ``model``."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = compute()
    loss.backward()
    return sum(n for storage, n in found.items() if storage not in own)


def llama_loss(model: Any, ids: Tensor) -> Tensor:
    """As transformers computes it."""
    return model(input_ids=ids, labels=ids).loss


def headless_loss(model: Any, ids: Tensor) -> Tensor:
    """The same without logits."""
    hidden = model.model(input_ids=ids).last_hidden_state
    return linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, ids[:, 1:])


def compared(what: str, ours: nn.Module, mine: partial[Tensor], theirs: nn.Module, his: partial[Tensor]) -> list[Row]:
    """Bytes and time of one step of each."""

    def step(compute: partial[Tensor]) -> None:
        compute().backward()

    with fused(ours):
        sizes = saved_bytes(mine, ours), saved_bytes(his, theirs)
        losses = mine().item(), his().item()
        if abs(losses[0] - losses[1]) > 1e-5 * abs(losses[1]):
            raise RuntimeError(f"{what}: the losses differ, {losses[0]} and {losses[1]}.")
        times = alternate(partial(step, mine), partial(step, his), rounds=5, repeats=1)
    return [
        Row(f"{what}: saved for backward", *map(float, sizes), "bytes", ""),
        Row(f"{what}: step", *times, "s", ""),
    ]


def run() -> list[Row]:
    """Both models."""
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **size))
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ours = inject(copy.deepcopy(base), LoRA(r=8, target_modules=tuple(linear))).train()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=linear)).train()
    ids = torch.randint(VOCABULARY, (4, 256))
    rows = []
    for loss, which in ((llama_loss, "its own loss"), (headless_loss, "our loss")):
        what = f"Llama 4 x 256, {which}"
        rows += compared(what, ours, partial(loss, ours, ids), theirs, partial(llama_loss, theirs, ids))
    vit = timm.create_model("vit_base_patch16_224", depth=6)
    layers = ["qkv", "proj", "fc1", "fc2"]
    ours = inject(copy.deepcopy(vit), LoRA(r=8, target_modules=r"blocks\.\d+\.(attn|mlp)\.(qkv|proj|fc1|fc2)")).train()
    theirs = peft.get_peft_model(
        vit, peft.LoraConfig(r=8, target_modules=r"blocks\.\d+\.(attn|mlp)\.(" + "|".join(layers) + ")")
    ).train()
    x, y = torch.randn(4, 3, 224, 224), torch.randint(1000, (4,))

    def loss_of(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x), y)

    return rows + compared("ViT-B, 6 blocks", ours, partial(loss_of, ours), theirs, partial(loss_of, theirs))
