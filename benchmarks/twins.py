"""A training step on a CPU by ``PEFT(kernels="auto")``, beside ``kernels="off"``: its memory, and its time.

No kernel runs there, but the twins in plain PyTorch. LoRA r=8 on all linear layers, float32, one thread. Both sides are
the same model, and no figure is given unless losses agree, and the gradients of all adapters.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from benchmarks.counted import PeakInside
from benchmarks.fused_step import Side, agree
from benchmarks.row import Row, alternate
from lightning_peft import LoRA, inject
from lightning_peft.callbacks.fused import fused

ROUNDS = 5


def _llama(vocabulary: int, width: int, depth: int, batch: int, tokens: int) -> tuple[nn.Module, Any]:
    size = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": depth}
    ids = torch.randint(vocabulary, (batch, tokens))
    heads = width // 32
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_attention_heads=heads, **size)), partial(
        _labelled, input_ids=ids, labels=ids
    )


def _bert(batch: int, tokens: int) -> tuple[nn.Module, Any]:
    size = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # both sides compute the same
    ids, labels = torch.randint(30522, (batch, tokens)), torch.randint(2, (batch,))
    return BertForSequenceClassification(BertConfig(**size, **still)), partial(_labelled, input_ids=ids, labels=labels)


def _vit(batch: int) -> tuple[nn.Module, Any]:
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    return timm.create_model("vit_tiny_patch16_224"), lambda model: F.cross_entropy(model(x), y)


def _labelled(model: Any, **batch: Tensor) -> Tensor:
    return model(**batch).loss


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "Llama of width 128, 4 layers, over bytes, 8 x 128 tokens": partial(_llama, 256, 128, 4, 8, 128),
    "Llama of width 512, 8 layers, vocabulary 8192, 2 x 256 tokens": partial(_llama, 8192, 512, 8, 2, 256),
    "Llama of width 256, 4 layers, vocabulary 32000, 2 x 256 tokens": partial(_llama, 32000, 256, 4, 2, 256),
    "BERT of the size of MiniLM, 8 x 64 tokens": partial(_bert, 8, 64),
    "ViT-Ti, batch 4": partial(_vit, 4),
}


def run() -> list[Row]:
    """All models."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for what, build in MODELS.items():
        model, loss = build()
        adapted = inject(model, LoRA(r=8)).train()
        for name, p in adapted.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(p, std=0.02)  # from zero, lora_A has no gradient
        trained = [p for p in adapted.parameters() if p.requires_grad]
        auto, off = (Side(adapted, loss, trained, within) for within in (fused, nullcontext))
        agree(what, auto.step(), off.step())
        rows += [
            Row(f"{what}: kept for backward", auto.saved_bytes(), off.saved_bytes(), "bytes", "below 1"),
            Row(f"{what}: peak of a step", _peak(auto), _peak(off), "bytes", "below 1"),
            Row(f"{what}: step", *alternate(auto.step, off.step, rounds=ROUNDS, repeats=1), "s", "at most 1"),
        ]
    torch.set_num_threads(threads)
    return rows


def _peak(side: Side) -> int:
    with PeakInside() as counted:
        side.step()
    return counted.peak
