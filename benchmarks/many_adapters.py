"""Many adapters in one Llama, as a server holds them: loading, switching, and a batch in which each sample has its own.

Beside HF PEFT, which reads the same files. 64 adapters of rank 16 on the attentions of a model with the shape of Llama
3.2 1B (16 layers of width 2048, grouped keys, bfloat16) are loaded and switched. The batch is of a smaller model (4
layers of width 512, float32) with 8 adapters on every linear layer: 16 prompts of 32 tokens, and 8 new tokens of each.
Then X-LoRA mixes these 8, and a step trains its classifier on the prompts. One thread; the sides take turns.
"""

import copy
import statistics
import tempfile
import time
import warnings
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.row import Row, alternate, saved_bytes
from lightning_peft import LoRA, inject, load_adapter, load_experts, routed, save_adapter, set_active
from lightning_peft.engine import adapters_of

_LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
_SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}


def _config(size: dict[str, int]) -> LlamaConfig:
    heads = size["num_attention_heads"] // 4
    return LlamaConfig(vocab_size=1024, num_key_value_heads=heads, pad_token_id=0, eos_token_id=None, **size)


def _twin(model: nn.Module) -> Any:
    """Another model with the very same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _written(base: nn.Module, method: LoRA, folder: Path, seed: int = 0) -> Path:
    """The folder of an adapter that does something."""
    model, generator = inject(_twin(base), method), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, _, adapter in adapters_of(model):
            for parameter in adapter.parameters():
                parameter.normal_(std=0.02, generator=generator)
    return save_adapter(model, folder)


def _both(base: Any, folders: dict[str, Path]) -> tuple[Any, Any, list[list[float]]]:
    """Our model and HF PEFT's with the adapters of these names, and the seconds that all but the first took to load."""
    (first, folder), *others = folders.items()
    theirs = PeftModel.from_pretrained(_twin(base), folder, first, low_cpu_mem_usage=True)
    ours, theirs_load = load_adapter(base, folder, first), partial(theirs.load_adapter, low_cpu_mem_usage=True)
    times: list[list[float]] = [[], []]
    for name, folder in others:
        for taken, load in zip(times, (partial(load_adapter, ours), theirs_load), strict=True):
            start = time.perf_counter()
            load(folder, name)
            taken.append(time.perf_counter() - start)
    return ours, theirs.eval(), times


def _load_and_switch(folder: Path) -> list[Row]:
    with torch.device("meta"):
        base = LlamaForCausalLM(_config(_LARGE)).bfloat16()
    base.to_empty(device="cpu")  # nothing is computed
    _written(base, LoRA(r=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")), folder)
    names = [f"user{i}" for i in range(64)]
    ours, theirs, loads = _both(base, dict.fromkeys(names, folder))
    one, other = cycle(names), cycle(names)
    switches = alternate(
        lambda: set_active(ours, next(one)), lambda: theirs.set_adapter(next(other)), rounds=9, repeats=4
    )
    return [
        Row("load 63 more adapters r=16 into a 1B Llama", sum(loads[0]), sum(loads[1]), "s", "below 1"),
        Row("the last 8 of them, each", *(statistics.median(taken[-8:]) for taken in loads), "s", "below 1"),
        Row("let another of the 64 act", *(seconds * 1e6 for seconds in switches), "us", "below 1"),
    ]


@torch.no_grad()
def _batch(folder: Path) -> list[Row]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(_config(_SMALL)).eval()
    folders = {f"user{i}": _written(base, LoRA(r=16), folder / f"user{i}", i) for i in range(8)}
    ours, theirs, _ = _both(base, folders)
    names = [*folders] * 2
    prompts = torch.randint(1, 1024, (16, 32))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompts)}

    def together() -> Tensor:
        with routed(ours, names):
            return ours.generate(prompts, **options)

    def in_turn() -> Tensor:
        answers = {}
        for name in folders:
            set_active(ours, name)
            own = [i for i, of in enumerate(names) if of == name]
            part = options | {"attention_mask": options["attention_mask"][own]}
            answers |= zip(own, ours.generate(prompts[own], **part), strict=True)
        return torch.stack([answers[i] for i in range(len(names))])

    def mixed() -> Tensor:
        return theirs.generate(input_ids=prompts, adapter_names=names, **options)

    if not torch.equal(together(), mixed()) or not torch.equal(together(), in_turn()):
        raise RuntimeError("the three ways generate different tokens.")
    mine, one_by_one, his = alternate(together, in_turn, mixed, rounds=7, repeats=1)
    return [
        Row("generate, 16 prompts with 8 adapters; beside it HF PEFT's mixed batch", mine, his, "s", "below 1"),
        Row("the same; beside it ours, one adapter at a time", mine, one_by_one, "s", "below 1"),
    ]


def _mixture(folder: Path) -> list[Row]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(_config(_SMALL)).eval()
    base.config.use_cache = False  # which HF PEFT asks for
    folders = {str(i): str(_written(base, LoRA(r=16), folder / f"expert{i}", i)) for i in range(8)}
    theirs: Any = get_peft_model(_twin(base), XLoraConfig(hidden_size=_SMALL["hidden_size"], adapters=folders)).eval()
    ours = load_experts(base, [*folders.values()])
    classifiers = [[p for p in model.parameters() if p.requires_grad] for model in (ours, theirs)]
    for mine, his in zip(*classifiers, strict=True):
        mine.data.copy_(nn.init.normal_(his, std=0.02))
    prompts = torch.randint(1, 1024, (16, 32))

    def loss(model: Any) -> Tensor:
        return model(input_ids=prompts, labels=prompts).loss

    def gradients(model: Any, trained: list[nn.Parameter]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(model), trained)

    steps = [partial(gradients, *side) for side in zip((ours, theirs), classifiers, strict=True)]
    for mine, his in zip(*(step() for step in steps), strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-3, atol=1e-6)
    own = [[*model.parameters(), *model.buffers()] for model in (ours, theirs)]
    kept = [saved_bytes(partial(loss, model), held) for model, held in zip((ours, theirs), own, strict=True)]
    return [
        Row(
            "step of the classifier of X-LoRA, 8 experts r=16", *alternate(*steps, rounds=7, repeats=1), "s", "below 1"
        ),
        Row("what it keeps for the backward pass", *kept, "bytes", "below 1"),
    ]


def run() -> list[Row]:
    """Loading, switching, the batch, and the mixture."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = _load_and_switch(Path(folder) / "large") + _batch(Path(folder)) + _mixture(Path(folder))
    torch.set_num_threads(threads)
    return rows
