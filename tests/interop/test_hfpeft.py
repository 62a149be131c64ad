"""Every tuner of HF PEFT runs in our slots and computes what HF PEFT's own model does, or says why not."""

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from torch import Tensor, nn

from lightning_peft import HFPEFT, inject, load_adapter, merge, save_adapter, unload, unmerge
from lightning_peft.engine import AdapterError, MergeError, adapters_of
from tests.methods.backbones import assert_unchanged, moved, snapshot, trainable

# HF PEFT tells of its own plans, and of a CUDA that is not here
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
# what a model this small needs beside target_modules
SETTINGS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_layers": 1, "adapter_len": 3, "target_modules": None},
    "ADAMSS": {"r": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 5},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LORA": {"r": 2, "modules_to_save": ["lm_head"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 2},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "UNILORA": {"r": 2, "theta_d_length": 16},
    "VBLORA": {"r": 2, "num_vectors": 4, "vector_length": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 5},
}
REFUSED = {
    "ADALORA": "AdaLoRA of lightning_peft",
    "CARTRIDGE": "PrefixTuning",
    "CPT": "PromptTuning",
    "MULTITASK_PROMPT_TUNING": "PromptTuning",
    "PREFIX_TUNING": "PrefixTuning",
    "POLY": "task_ids",
    "PROMPT_TUNING": "PromptTuning",
    "P_TUNING": "PTuning",
    "SHADOW": "LadderSideTuning",
    "XLORA": "calls the model twice",
}
# BEFT merges into biases, of which there are none here; that norm is none of torch
NO_MERGE = {"ADAPTION_PROMPT", "BEFT", "LILY", "LN_TUNING"}
TYPES = sorted(kind.value for kind in CONFIGS)
every_type = pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in REFUSED])


@functools.cache
def original() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, **SMALL)).eval()


def llama() -> Any:
    return copy.deepcopy(original())


def config(kind: str) -> Any:
    settings = {"target_modules": ["q_proj", "v_proj"]} | SETTINGS.get(kind, {})
    return CONFIGS[kind](**{name: value for name, value in settings.items() if value is not None})


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[1, 2, 5, 8, 30, 0], [4, 2, 1, 1, 9, 17]])


def bridged(kind: str) -> Any:
    return inject(llama(), HFPEFT(config=config(kind)))


@every_type
def test_hf_peft_reads_the_file_and_computes_the_same(kind: str, ids: Tensor, tmp_path: Path) -> None:
    model = moved(bridged(kind))
    save_adapter(model, tmp_path)
    expected = model(input_ids=ids).logits
    theirs = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(original()(input_ids=ids).logits, expected, atol=1e-4)
    again = load_adapter(llama(), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, expected)


@every_type
def test_a_file_of_hf_peft_is_read(kind: str, ids: Tensor, tmp_path: Path) -> None:
    theirs = get_peft_model(llama(), config(kind))
    moved(theirs).eval().save_pretrained(str(tmp_path))
    expected = theirs(input_ids=ids).logits
    loaded = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=2e-5, atol=2e-5)


@every_type
def test_what_trains_is_what_trains_there_and_gets_the_same_gradients(kind: str, ids: Tensor) -> None:
    theirs = moved(get_peft_model(llama(), config(kind)))
    model = bridged(kind)
    ours = next(adapter for _, _, adapter in adapters_of(model)).__dict__["tuned"]
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    assert ours is not theirs
    for one in (model, theirs):
        one.eval()
        one(input_ids=ids).logits.square().mean().backward()
    mine = sorted(p.grad.norm().item() for p in trainable(model).values() if p.grad is not None)
    other = sorted(p.grad.norm().item() for p in trainable(theirs).values() if p.grad is not None)
    assert sum(p.numel() for p in trainable(model).values()) == sum(p.numel() for p in trainable(theirs).values())
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)  # another order of sums, in float32
    assert any(mine)


@every_type
def test_the_base_comes_back(kind: str, ids: Tensor) -> None:
    before = snapshot(llama())
    model = moved(bridged(kind))
    assert not torch.allclose(model(input_ids=ids).logits, original()(input_ids=ids).logits, atol=1e-4)
    assert_unchanged(unload(model), before)
    assert torch.equal(model(input_ids=ids).logits, original()(input_ids=ids).logits)


@every_type
def test_merged_equals_unmerged(kind: str, ids: Tensor) -> None:
    model = moved(bridged(kind))
    expected, before = model(input_ids=ids).logits, snapshot(model)
    if kind in NO_MERGE:
        with pytest.raises(MergeError):
            merge(model)
    else:
        torch.testing.assert_close(merge(model)(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert [type(m) for m in model.modules()] == [type(m) for m in llama().modules()]
        unmerge(model)
    assert_unchanged(model, before)
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_run_here_says_why(kind: str) -> None:
    with pytest.raises(AdapterError, match=REFUSED[kind]):
        HFPEFT(config={"peft_type": kind})


def test_every_type_of_the_installed_version_is_here() -> None:
    assert len(TYPES) >= 44
