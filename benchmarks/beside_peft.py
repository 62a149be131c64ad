"""Time of a training step of a Llama with methods that HF PEFT has too, and with its LoRA beside it.

Width 256, 4 layers, 4 x 256 tokens, float32, one thread; forward and backward. The two sides have the same number of
trainable parameters, or no figure is given; they take turns.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.row import Row, alternate
from lightning_peft import IA3, LinearProbe, LoRA, PrefixTuning, PromptTuning, PTuning, inject
from lightning_peft.callbacks.fused import fused
from lightning_peft.engine import Method

_TASK = {"task_type": "CAUSAL_LM"}
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
PAIRS: list[tuple[Method, Any]] = [
    (LoRA(r=8), peft.LoraConfig(r=8, target_modules=_LINEAR, **_TASK)),
    (IA3(), peft.IA3Config(**_TASK)),
    (LinearProbe(modules_to_save="LlamaRMSNorm"), peft.LNTuningConfig(target_modules=_NORMS, **_TASK)),
    (PromptTuning(num_virtual_tokens=20), peft.PromptTuningConfig(num_virtual_tokens=20, **_TASK)),
    (PrefixTuning(num_virtual_tokens=20), peft.PrefixTuningConfig(num_virtual_tokens=20, **_TASK)),
    (
        PTuning(num_virtual_tokens=20, encoder_hidden_size=256),
        peft.PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=256, **_TASK),
    ),
]


def _step(
    model: nn.Module, ids: Tensor, within: Callable[[nn.Module], AbstractContextManager[Any]]
) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        with within(model):
            torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)

    return step


def run() -> list[Row]:
    """All pairs; each of our methods beside HF PEFT's same, and beside its LoRA."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    base, ids = LlamaForCausalLM(LlamaConfig(vocab_size=8192, **size)), torch.randint(8192, (4, 256))
    steps: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    for method, config in PAIRS:
        ours = inject(copy.deepcopy(base), method).train()
        theirs = peft.get_peft_model(copy.deepcopy(base), config).train()
        counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
        name = "norms alone (LN tuning)" if isinstance(method, LinearProbe) else type(method).__name__
        if counts[0] != counts[1]:
            raise RuntimeError(f"{name}: {counts[0]:,} parameters train here and {counts[1]:,} in HF PEFT.")
        steps[name] = _step(ours, ids, fused), _step(theirs, ids, nullcontext)
    sides = [step for pair in steps.values() for step in pair]
    times = alternate(*sides, rounds=7, repeats=1)
    torch.set_num_threads(threads)
    lora = times[1]
    rows = []
    for i, name in enumerate(steps):
        mine, his = times[2 * i], times[2 * i + 1]
        rows.append(Row(f"a step of a Llama with {name}; beside it HF PEFT's", mine, his, "s", ""))
        if i:
            rows.append(Row("the same; beside it HF PEFT's LoRA r=8", mine, lora, "s", ""))
    return rows
