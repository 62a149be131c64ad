"""Trained products that start at a part of the weight, as plain LoRA: here, and in HF PEFT."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import DoRA, LoRA, PiSSA, inject, load_adapter, save_adapter
from lightning_peft.engine import AdapterFileError, adapters_of
from tests.methods.backbones import backbone, call, moved


def trained(method: Any, name: str = "llama") -> nn.Module:
    return moved(inject(backbone(name), method))


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_pissa_as_lora_of_twice_the_rank_answers_the_same(name: str, tmp_path: Path) -> None:
    model = trained(PiSSA(r=2, alpha=4.0), name)
    folder = save_adapter(model, tmp_path, as_lora=True)
    loaded = load_adapter(backbone(name), folder)
    assert {len(adapter.lora_A) for _, _, adapter in adapters_of(loaded)} == {4}
    torch.testing.assert_close(call(name, loaded), call(name, model), rtol=1e-5, atol=1e-6)


def test_hf_peft_reads_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(PiSSA(r=2, rank_pattern={"q_proj": 1}))
    save_adapter(model, tmp_path, as_lora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(backbone("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(call("llama", theirs), call("llama", model), rtol=1e-5, atol=1e-5)


def test_more_factors_than_directions_are_made_fewer(tmp_path: Path) -> None:
    model = moved(inject(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), PiSSA(r=2, target_modules="all-layers")))
    folder = save_adapter(model, tmp_path, as_lora=True)
    loaded = load_adapter(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), folder, allow_other_base=True)
    assert [len(adapter.lora_A) for _, _, adapter in adapters_of(loaded)] == [3, 2]
    for (_, _, ours), (_, _, plain) in zip(adapters_of(model), adapters_of(loaded), strict=True):
        torch.testing.assert_close(plain.delta(), ours.delta(), rtol=1e-5, atol=1e-6)


def test_what_is_no_low_rank_product_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="no low-rank product"):
        save_adapter(trained(DoRA(r=2)), tmp_path / "dora", as_lora=True)
    assert not (tmp_path / "dora").exists()
    plain = trained(LoRA(r=2))
    again = load_adapter(backbone("llama"), save_adapter(plain, tmp_path / "lora", as_lora=True))
    torch.testing.assert_close(call("llama", again), call("llama", plain), rtol=1e-5, atol=1e-6)
