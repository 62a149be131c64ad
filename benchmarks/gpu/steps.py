"""Point 9: whole training steps of a Llama with random weights, LoRA on all linear layers of its blocks, fused AdamW.

One loop for all: the model called with labels, ``backward``, a step of the optimizer. There is no padding: every token
counts. Results are compared with HF PEFT in float32, checkpointed, on the same weights.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from benchmarks.gpu.adapted import Adapt, by_paca, by_peft, by_us, factors, filled
from benchmarks.gpu.case import Build, Built, Case, Inputs, Machine, Peer, Work, by_compiler, missing
from lightning_peft.callbacks.fused import fused

Within = Callable[[nn.Module], AbstractContextManager[Any]]


def points(machine: Machine) -> dict[int, list[Callable[[], Case]]]:
    """The shape of Llama-3.2 1B, without checkpoints and with; that of Qwen2.5 0.5B with few tokens in a step."""
    one_b = partial(
        case, machine, "Llama 1.2B", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    half_b = partial(
        case, machine, "Llama 0.5B", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2,
    )  # fmt: skip
    small = [] if machine.tiny else [partial(half_b, T=512)]
    return {9: [one_b, partial(one_b, checkpoints=True), *small]}


def case(machine: Machine, name: str, T: int = 4096, checkpoints: bool = False, **sizes: int) -> Case:
    """A batch of two sequences of T tokens."""
    if machine.tiny:
        sizes = {"vocab_size": 101, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    T, r = machine.size(T, 11), machine.size(16, 4)
    config = LlamaConfig(**sizes, max_position_embeddings=T, tie_word_embeddings=True, use_cache=False)
    inputs = _weights(machine, config, r)
    n_weights = sum(t.numel() for key, t in inputs.items() if "proj.weight" in key)
    n_thin = sum(t.numel() for key, t in inputs.items() if ".lora_" in key)
    inputs["input_ids"] = machine.randint(config.vocab_size, 2, T)
    tokens, D = inputs["input_ids"].numel(), config.hidden_size
    head, attention = tokens * D * config.vocab_size, tokens * T * D * config.num_hidden_layers
    # of the backward pass no product for a frozen weight; of attention, which is causal, half
    flops = 4 * tokens * n_weights + 6 * tokens * n_thin + 4 * head + 7 * attention
    peers = _peers(config, checkpoints)
    return Case(
        name=f"step of {name}, 2 x {T}, LoRA r={r}{', checkpoints' if checkpoints else ''}",
        inputs=inputs,
        truth=_step(config, by_peft(), checkpoints=True),
        peers=peers,
        forward=None,
        both=Work(2 * n_weights * machine.dtype.itemsize, flops),
        tokens=tokens,
    )


def _peers(config: LlamaConfig, checkpoints: bool) -> list[Peer]:
    no_liger = missing("liger_kernel")
    made = partial(_step, config, checkpoints=checkpoints)
    peers = [
        Peer("PEFT", made(by_peft())),
        Peer("PEFT, Liger", made(by_peft(), liger=True), skipped=no_liger),
        Peer("ours", made(by_us(), within=fused)),
        Peer("our PaCA", made(by_paca, within=fused), checked=False),
    ]
    if not checkpoints:
        peers += [
            Peer("PEFT, float32 factors", made(by_peft(torch.float32))),
            Peer("ours, float32 factors", made(by_us(torch.float32), within=fused)),
            Peer("PEFT, torch.compile", made(by_peft(), compile=True)),
            Peer("PEFT, Liger, torch.compile", made(by_peft(), liger=True, compile=True), skipped=no_liger),
            Peer("ours, torch.compile", made(by_us(), within=fused, compile=True)),
        ]
    return peers


def _step(
    config: LlamaConfig, adapt: Adapt, *, checkpoints: bool = False, liger: bool = False, compile: bool = False,
    within: Within = nullcontext,
) -> Build:  # fmt: skip
    def build(inputs: Inputs) -> Built:
        model = filled(partial(LlamaForCausalLM, config), inputs)
        model.tie_weights()
        ids = inputs["input_ids"]
        # its table is no weight, and was made without memory too
        model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config).to(ids.device)
        if liger:
            _use_liger(model)
        leaves = adapt(model, inputs)
        if checkpoints:
            # the new name and the old one of the same
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        run = by_compiler(model, ids.device) if compile else model
        optimizer = torch.optim.AdamW(leaves, lr=1e-5, fused=True)

        def compute() -> torch.Tensor:
            return run(input_ids=ids, labels=ids).loss

        def step() -> None:
            optimizer.zero_grad()
            compute().backward()
            optimizer.step()

        return Built(compute, leaves, _liger_rope if liger else partial(within, model), step)

    return build


def _weights(machine: Machine, config: LlamaConfig, r: int) -> Inputs:
    """Of the base, and factors of all linear layers in the blocks."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    inputs: Inputs = {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        inputs[name] = 1 + machine.randn(*shape, scale=0.1) if len(shape) == 1 else machine.randn(*shape, scale=0.02)
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            inputs |= factors(machine, f"model.layers.{name}", module.in_features, module.out_features, r)
    return inputs


def _use_liger(model: nn.Module) -> None:
    """On this model alone: what Liger replaces in the module of transformers is put back, see also `_liger_rope`."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    kept = {name: getattr(modeling_llama, name) for name in ("LlamaRMSNorm", "LlamaMLP")}
    with mock.patch.multiple(modeling_llama, **kept):
        apply_liger_kernel_to_llama(rope=False, model=model)


@contextmanager
def _liger_rope() -> Iterator[None]:
    """The one function that a model cannot have for itself."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", liger_rotary_pos_emb):
        yield
