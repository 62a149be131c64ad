"""X-LoRA of HF PEFT is the reference, in float64; and experts that were trained one by one come together."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning import LightningModule
from peft import LoraConfig, XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import (
    AdapterError,
    DoRA,
    LoRA,
    XLoRA,
    inject,
    load_adapter,
    load_experts,
    save_adapter,
    unload,
)
from lightning_peft.engine import AdapterFileError
from tests.methods.backbones import assert_unchanged, moved, snapshot
from tests.papers.test_xlora import llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    pytest.mark.filterwarnings("ignore:`enable_softmax_topk` and `enable_softmax` are both enabled"),
]
IDS = torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(0))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=31, **sizes)).double().eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_layer=2, n_head=2, n_embd=16, bos_token_id=0, eos_token_id=0, use_cache=False)
    return GPT2LMHeadModel(config).double().eval()


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=31, num_key_value_heads=1, use_cache=False, tie_word_embeddings=True, **sizes)
    return Qwen2ForCausalLM(config).double().eval()


class Module(LightningModule):
    """A model inside of another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = llama()

    def training_step(self, batch: Any) -> None:
        pass


BASES: dict[str, tuple[Any, tuple[list[str], list[str]]]] = {
    "llama": (llama, (["q_proj", "down_proj"], ["q_proj", "v_proj", "embed_tokens"])),
    "qwen2": (qwen2, (["q_proj", "up_proj"], ["o_proj"])),
    "bert": (bert, (["query"], ["value", "attention.output.dense"])),
    "gpt2": (gpt2, (["c_attn"], ["c_attn", "c_fc"])),
}


def experts(name: str, folder: Path) -> list[Path]:
    """Two folders of HF PEFT, of other ranks, scalings and layers."""
    build, layers = BASES[name]
    made = []
    for i, targets in enumerate(layers):
        config = LoraConfig(r=2 + i, lora_alpha=5, use_rslora=bool(i), target_modules=targets)
        model = get_peft_model(build(), config)
        generator = torch.Generator().manual_seed(i)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data = 0.3 * noise
        model.save_pretrained(folder / f"expert{i}")
        made.append(folder / f"expert{i}")
    return made


def mixed(name: str, folder: Path, **settings: Any) -> tuple[nn.Module, Path]:
    """A model of HF PEFT, and its folder as versions before 0.21 write it."""
    paths = {str(i): str(path) for i, path in enumerate(experts(name, folder))}
    config = XLoraConfig(hidden_size=16, adapters=paths, **settings)
    model = get_peft_model(BASES[name][0](), config).double().eval()
    classifier = model.base_model.internal_xlora_classifier
    classifier.dtype = torch.float64
    with torch.no_grad():
        for i, parameter in enumerate(classifier.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    config.save_pretrained(folder / "mixed")
    state = {key: value for key, value in model.state_dict().items() if "internal_xlora_classifier" in key}
    save_file(state, folder / "mixed" / "adapter_model.safetensors", metadata={"format": "pt"})
    return model, folder / "mixed"


def answer(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "deep, for each layer": {"xlora_depth": 3, "xlora_size": 7, "layerwise_scalings": True, "softmax_temperature": 0.6},
    "the best alone": {"top_k_lora": 1, "global_scaling_weight": 0.8},
    "softmax over the best": {"top_k_lora": 1, "enable_softmax": False, "enable_softmax_topk": True},
    "neither": {"enable_softmax": False, "xlora_dropout_p": 0.0, "xlora_depth": 2, "xlora_size": 5},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # HF PEFT reads experts where the body is called ``model`` alone
def test_a_file_answers_as_in_hf_peft(name: str, settings: str, tmp_path: Path) -> None:
    theirs, folder = mixed(name, tmp_path, **SETTINGS[settings])
    base = BASES[name][0]()
    ours = load_adapter(copy.deepcopy(base), folder)
    expected = answer(theirs)
    assert not torch.allclose(expected, answer(base), atol=1e-3)
    torch.testing.assert_close(answer(ours), expected, rtol=1e-9, atol=1e-9)
    again = load_adapter(copy.deepcopy(base), save_adapter(ours, tmp_path / "own"))
    assert torch.equal(answer(again), answer(ours))
    trained = {key.rpartition("adapters.default.")[2] for key, p in ours.named_parameters() if p.requires_grad}
    assert all(key.startswith("layers.") for key in trained)


def test_a_file_fits_a_model_inside_of_another(tmp_path: Path) -> None:
    theirs, folder = mixed("llama", tmp_path, layerwise_scalings=True)

    module = load_adapter(Module(), folder)
    torch.testing.assert_close(answer(module.net), answer(theirs), rtol=1e-9, atol=1e-9)


def test_experts_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, folder = mixed("llama", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    for place in ({"0": "../expert0", "1": "../expert1"}, {"expert0": "user/repo", "expert1": "user/repo"}):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"adapters": place}))
        if "expert0" in place:  # as on the hub
            for i in range(2):
                (tmp_path / f"expert{i}").rename(folder / f"expert{i}")
        torch.testing.assert_close(answer(load_adapter(llama(), folder)), answer(theirs), rtol=1e-9, atol=1e-9)


def test_a_file_that_lacks_something_changes_nothing(tmp_path: Path) -> None:
    _, folder = mixed("llama", tmp_path, xlora_depth=2, xlora_size=7)
    base = llama()
    before = snapshot(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    partly = {key: value for key, value in tensors.items() if ".layers.0." not in key}  # as HF PEFT 0.21 writes it
    save_file(partly, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match="the file has 1 of the 2 layers of the classifier. HF PEFT 0.21"):
        load_adapter(base, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"adapters": {"a": "user/repo"}}))
    with pytest.raises(AdapterFileError, match="'a' of them is not at 'user/repo'. Put its folder there"):
        load_adapter(base, folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"adapters": {"a": str(folder)}}))
    with pytest.raises(AdapterFileError, match="one of these is 'XLORA'"):  # itself
        load_adapter(base, folder)
    assert_unchanged(base, before)


def test_what_the_config_of_an_expert_says_is_checked(tmp_path: Path) -> None:
    _, folder = mixed("llama", tmp_path)
    base, own = llama(), tmp_path / "expert1" / "adapter_config.json"
    before, config = snapshot(base), json.loads(own.read_text())
    slow = {"alpha_pattern": {"(a+)+": 4}}
    for change, because in (({"use_dora": True}, "cannot be mixed: .*use_dora=True"), (slow, r"\(a\+\)\+")):
        own.write_text(json.dumps(config | change))
        with pytest.raises(AdapterFileError, match=because):
            load_adapter(base, folder)
        with pytest.raises(AdapterFileError, match=because):
            load_experts(base, [tmp_path / "expert0", tmp_path / "expert1"])
    assert_unchanged(base, before)


def test_a_module_of_lightning_gets_experts(tmp_path: Path) -> None:
    folders = experts("llama", tmp_path)
    module, plain = load_experts(Module(), folders), load_experts(llama(), folders)
    for own, other in zip(module.parameters(), plain.parameters(), strict=True):
        own.data.copy_(other.data)
    torch.testing.assert_close(answer(module.net), answer(plain))
    assert not torch.allclose(answer(plain), answer(llama()), atol=1e-3)


@pytest.mark.parametrize("name", BASES)
def test_experts_of_both_libraries_come_together(name: str, tmp_path: Path) -> None:
    build, (layers, _) = BASES[name]
    theirs = experts(name, tmp_path)
    own = moved(inject(build(), LoRA(r=1, target_modules=layers[0])))
    folders = [*theirs, save_adapter(own, tmp_path / "own")]
    model = load_experts(build(), folders, XLoRA(softmax=False, train_experts=False))
    (bias,) = [p for key, p in model.named_parameters() if p.requires_grad and key.endswith("bias")]
    (weight,) = [p for key, p in model.named_parameters() if p.requires_grad and key.endswith("weight")]
    nn.init.zeros_(weight)
    alone = [*(peft.PeftModel.from_pretrained(build(), folder) for folder in theirs), own]
    for i, one in enumerate(alone):
        bias.data.copy_(torch.eye(3)[i])
        torch.testing.assert_close(answer(model), answer(one), rtol=1e-9, atol=1e-9)


def test_a_classifier_learns_which_expert_suits(tmp_path: Path) -> None:
    model = load_experts(llama(), experts("llama", tmp_path))
    goal = answer(peft.PeftModel.from_pretrained(llama(), tmp_path / "expert1")).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.3)
    before = {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key}
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (answer(model) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_experts_that_cannot_be_mixed_change_nothing(tmp_path: Path) -> None:
    base, good = llama(), experts("llama", tmp_path)
    before = snapshot(base)
    dora = save_adapter(inject(llama(), DoRA(r=2, target_modules="q_proj")), tmp_path / "dora")
    with pytest.raises(AdapterFileError, match="use_dora=True, which is not read here"):
        load_experts(base, [good[0], dora])
    head = save_adapter(inject(llama(), LoRA(r=2, target_modules="q_proj", modules_to_save="lm_head")), tmp_path / "h")
    with pytest.raises(AdapterFileError, match="'base_model.model.lm_head.weight' .* which is no factor"):
        load_experts(base, [good[0], head])
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=8, num_hidden_layers=2, num_attention_heads=2))
    other = save_adapter(inject(small, LoRA(r=2, target_modules="q_proj")), tmp_path / "other")
    with pytest.raises(AdapterFileError, match="'model.layers.0.self_attn.q_proj' .* other sizes"):
        load_experts(base, [good[0], other])
    with pytest.raises(AdapterFileError, match="does not fit"):
        load_experts(base, [other, other])
    with pytest.raises(AdapterError, match="expected the folders of several adapters"):
        load_experts(base, str(good[0]))
    assert_unchanged(base, before)
    load_experts(base, good)
    with pytest.raises(AdapterError, match="there is an adapter 'default' already"):
        load_experts(base, good)
    assert_unchanged(unload(base), before)
