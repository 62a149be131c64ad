"""Many adapters in one model, loaded and exchanged while it serves."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_peft import AdapterError, LoRA, inject, load_adapter, routed, save_adapter, set_active, unload
from lightning_peft.engine import adapters_of
from tests.methods.backbones import assert_unchanged, backbone, call, moved, snapshot


def files(folder: Path, **methods: LoRA) -> dict[str, Path]:
    """Name -> folder of an adapter of that method, each with values of its own."""
    found = {}
    for seed, (name, method) in enumerate(methods.items()):
        found[name] = save_adapter(moved(inject(backbone("llama"), method), seed), folder / name)
    return found


def alone(folder: Path) -> Any:
    """What the model answers with this adapter and no other."""
    return call("llama", load_adapter(backbone("llama"), folder))


def test_values_are_exchanged_in_place(tmp_path: Path) -> None:
    of = files(tmp_path, one=LoRA(r=2), two=LoRA(r=2), other=LoRA(r=3))
    model = load_adapter(load_adapter(backbone("llama"), of["other"], "other"), of["one"], "user")
    parameters = [p for _, _, adapter in adapters_of(model, "user") for p in adapter.parameters()]
    set_active(model, "user")
    torch.testing.assert_close(call("llama", model), alone(of["one"]))
    load_adapter(model, of["two"], "user")
    torch.testing.assert_close(call("llama", model), alone(of["two"]))
    now = [p for _, _, adapter in adapters_of(model, "user") for p in adapter.parameters()]
    assert all(one is other for one, other in zip(parameters, now, strict=True))


def test_exchanging_values_recompiles_nothing(tmp_path: Path) -> None:
    of = files(tmp_path, one=LoRA(r=2), two=LoRA(r=2))
    model = load_adapter(backbone("llama"), of["one"], "user")
    frames = []

    def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
        frames.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=counting)
    torch.testing.assert_close(call("llama", compiled), alone(of["one"]))
    seen = len(frames)
    assert seen > 0
    load_adapter(model, of["two"], "user")
    torch.testing.assert_close(call("llama", compiled), alone(of["two"]))
    assert len(frames) == seen


def test_a_bad_file_leaves_the_old_values(tmp_path: Path) -> None:
    of = files(tmp_path, one=LoRA(r=2), bad=LoRA(r=2))
    model = load_adapter(backbone("llama"), of["one"], "user")
    before = snapshot(model)
    file = of["bad"] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_B" in key)
    for wrong in (tensors[key] * torch.nan, tensors[key][:, :1]):
        with safe_open(file, "pt") as opened:
            facts = opened.metadata()
        save_file(tensors | {key: wrong.contiguous()}, file, metadata=facts)
        with pytest.raises(AdapterError):
            load_adapter(model, of["bad"], "user")
        assert_unchanged(model, before)
    file.write_bytes(b"torn")
    with pytest.raises(AdapterError):
        load_adapter(model, of["bad"], "user")
    assert_unchanged(model, before)


def test_another_rank_takes_another_name_first(tmp_path: Path) -> None:
    of = files(tmp_path, one=LoRA(r=2), two=LoRA(r=5, rank_pattern={"q_proj": 1}))
    model = load_adapter(backbone("llama"), of["one"], "user")
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"'user' is taken.*unload\(model, 'user'\) first. Or take another name"):
        load_adapter(model, of["two"], "user")
    assert_unchanged(model, before)
    load_adapter(model, of["two"], "user, second")
    unload(model, "user")
    torch.testing.assert_close(call("llama", model), alone(of["two"]))
    load_adapter(unload(model, "user, second"), of["two"], "user")
    torch.testing.assert_close(call("llama", model), alone(of["two"]))


def calls(function: Callable[[], Any]) -> int:
    """How many functions ``function`` calls: what depends neither on the machine nor on its load."""
    count = 0

    def counting(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counting)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_the_fortieth_adapter_costs_what_the_fourth_did(tmp_path: Path) -> None:
    """Else a server of hundreds would wait longer for each; before this was held, it was ten times as much."""
    of = files(tmp_path, **{f"rank {r}": LoRA(r=r) for r in (1, 2, 4)})
    model, folders = backbone("llama"), list(of.values())

    def entered() -> None:
        with routed(model, ["user 0", "none", "user 1"]):
            pass

    counts = []
    for i in range(40):
        load = calls(partial(load_adapter, model, folders[i % 3], f"user {i}"))
        if i in (3, 39):
            exchange = calls(partial(load_adapter, model, folders[0], "user 0"))
            counts.append([load, exchange, calls(partial(set_active, model, "user 1")), calls(entered)])
    assert all(last < 1.5 * first for first, last in zip(*counts, strict=True)), counts


@torch.no_grad()
def test_a_hundred_adapters_of_many_ranks_answer_each_for_itself(tmp_path: Path) -> None:
    of = files(tmp_path, **{f"rank {r}": LoRA(r=r, alpha=2 * r) for r in range(1, 5)})
    model, folders = backbone("llama").double(), list(of.values())
    for i in range(100):
        load_adapter(model, folders[i * 7 % 4], f"user {i}")
        set_active(model, ())
    tokens = torch.randint(0, 31, (6, 5))
    names = ["user 99", "user 3", "none", "user 50", "user 4", "user 3"]

    def answer(x: Tensor) -> Tensor:
        return model(input_ids=x).logits

    expected = []
    for name, row in zip(names, tokens, strict=True):
        set_active(model, () if name == "none" else name)
        expected.append(answer(row[None]))
    for i in range(10, 90):
        if f"user {i}" not in names:
            unload(model, f"user {i}")
    with routed(model, names):
        # double precision leaves the order of sums
        torch.testing.assert_close(answer(tokens), torch.cat(expected), rtol=1e-10, atol=1e-10)
