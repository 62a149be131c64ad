"""Injecting LoRA r=16 into every linear layer of a 7B-shaped Llama on the meta device."""

import copy
import time

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.row import Row
from lightning_peft import LoRA, inject


def run() -> list[Row]:
    """Medians of five injections each, into fresh models, taking turns."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008))
    ours, theirs = [], []
    for _ in range(5):
        mine, his = copy.deepcopy(model), copy.deepcopy(model)
        start = time.perf_counter()
        inject(mine, LoRA(r=16))
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.device("meta"):
            peft.get_peft_model(his, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        theirs.append(time.perf_counter() - start)
    return [Row("inject LoRA r=16 into a 7B Llama (meta)", sorted(ours)[2], sorted(theirs)[2], "s", "at most 1")]
