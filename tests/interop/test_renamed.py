"""Files of HF PEFT that were written before transformers renamed modules, or fused them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from lightning_peft import load_adapter, save_adapter
from lightning_peft.engine import AdapterFileError, adapters_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of HF PEFT, about bases and hubs

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    text = LlamaConfig(**SIZES, vocab_size=40, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    return LlavaForConditionalGeneration(config).eval()


def qwen() -> Any:
    torch.manual_seed(0)
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    text = {**SIZES, **ends, "vocab_size": 40, "num_key_value_heads": 1, "rope_scaling": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **sizes)).eval()


# what the names of today were in version 4
OF_LLAVA = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "lm_head.": "language_model.lm_head.",
}
OF_QWEN = {"model.language_model.": "model.", "model.visual.": "visual."}

IDS = torch.arange(14).view(2, 7) * 5 % 38
IMAGE = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)


def answers(model: Any) -> list[Tensor]:
    """Of the whole model to a text, and of its eyes to an image if they are those of Llava."""
    while isinstance(model, peft.PeftModel):
        model = model.get_base_model()
    with torch.no_grad():
        found = [model(input_ids=IDS).logits]
        if isinstance(model, LlavaForConditionalGeneration):
            found.append(model.model.vision_tower(IMAGE).last_hidden_state)
    return found


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(answers(one), answers(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def made(folder: Path, base: Callable[[], Any], config: peft.PeftConfig, old: Mapping[str, str]) -> Any:
    """An adapter of HF PEFT with numbers of its own, and its file, in ``folder``, as it was under the ``old`` names."""
    model = peft.get_peft_model(base(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 4)
    model.save_pretrained(folder)
    tensors = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        begin = next((begin for begin in old if name.startswith(begin)), "")
        tensors[f"base_model.model.{old.get(begin, '')}{name.removeprefix(begin)}"] = value
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return model


QV = ["q_proj", "v_proj"]
LAYER = r"model.language_model.layers.0.self_attn.q_proj"
CONFIGS = {
    "lora": peft.LoraConfig(r=2, lora_alpha=6, target_modules=QV),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=QV),
    "head": peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["lm_head"]),
    "ia3": peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=QV),
    "loha": peft.LoHaConfig(r=2, alpha=6, target_modules=QV),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("base", "old"), [(llava, OF_LLAVA), (qwen, OF_QWEN)], ids=["llava", "qwen"])
def test_a_file_of_version_4_is_read(base: Any, old: dict[str, str], kind: str, tmp_path: Path) -> None:
    theirs = made(tmp_path, base, CONFIGS[kind], old)
    assert (answers(theirs)[0] - answers(base())[0]).abs().max() > 1e-3
    ours = load_adapter(base(), tmp_path)
    assert_same(ours, theirs)
    again = load_adapter(base(), save_adapter(ours, tmp_path / "again"))
    assert_same(again, theirs)
    if base is llava and kind in ("lora", "dora"):  # what HF PEFT maps by itself
        assert_same(peft.PeftModel.from_pretrained(base(), tmp_path).eval(), theirs)


@pytest.mark.parametrize("exact", [True, False], ids=["a name", "a pattern"])
def test_patterns_for_the_old_names_mean_the_same_layers(exact: bool, tmp_path: Path) -> None:
    settings: Any = {"rank_pattern": {LAYER: 3}, "alpha_pattern": {LAYER: 20}}
    theirs = made(tmp_path, llava, peft.LoraConfig(r=2, lora_alpha=6, target_modules=QV, **settings), OF_LLAVA)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    old = "language_model.model.layers.0.self_attn.q_proj" if exact else r"^language_model\.model.*\.0\..*q_proj"
    config |= {"rank_pattern": {old: 3}, "alpha_pattern": {old: 20}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_same(load_adapter(llava(), tmp_path), theirs)


def test_triplets_that_were_dropped_under_the_old_names_stay_so(tmp_path: Path) -> None:
    theirs = made(tmp_path, llava, CONFIGS["adalora"], OF_LLAVA)
    layer = theirs.get_base_model().model.language_model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_E["default"][1] = 0
    name = "language_model.model.layers.0.self_attn.q_proj"
    file, key = tmp_path / "adapter_model.safetensors", f"base_model.model.{name}.lora_"
    tensors = load_file(file)
    left = {"A": tensors[key + "A"][[0, 2]], "B": tensors[key + "B"][:, [0, 2]], "E": tensors[key + "E"][[0, 2]]}
    save_file(tensors | {key + end: value.contiguous() for end, value in left.items()}, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["rank_pattern"] = {f"{name}.lora_E": [True, False, True]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_same(load_adapter(llava(), tmp_path), theirs)


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = llava()

    def training_step(self, batch: Any) -> Any:
        raise NotImplementedError


def test_the_model_may_be_inside_of_a_module_of_lightning(tmp_path: Path) -> None:
    theirs = made(tmp_path, llava, CONFIGS["head"], OF_LLAVA)
    assert_same(load_adapter(Lit(), tmp_path).net, theirs)


def test_a_module_under_both_names_is_refused(tmp_path: Path) -> None:
    made(tmp_path, llava, CONFIGS["lora"], OF_LLAVA)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    new = {key.replace("language_model.model.", "model.language_model."): value for key, value in tensors.items()}
    save_file(tensors | {key: value + 1 for key, value in new.items()}, file)
    model = llava()
    with pytest.raises(AdapterFileError, match=r"'model\.language_model\.layers.*' under an old name, too"):
        load_adapter(model, tmp_path)
    assert_same(model, llava())


# mixtures of experts

R, ALPHA = 2, 6.0


def of_experts(folder: Path, parts: tuple[str, ...], gate: bool = False, kind: str = "LORA") -> dict[str, Tensor]:
    """Name of a layer of Mixtral in version 4 -> its change; the file is in ``folder``."""
    torch.manual_seed(1)
    shapes = {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16), "gate": (3, 16)}
    blocks = [f"model.layers.{i}.block_sparse_moe." for i in range(2)]
    names = [f"{block}experts.{e}.{part}" for block in blocks for e in range(3) for part in parts]
    names += [f"{block}gate" for block in blocks] if gate else []
    tensors, deltas = {}, {}
    for name in names:
        d_out, d_in = shapes[name.rpartition(".")[2]]
        A, B = torch.randn(R, d_in) / 4, torch.randn(d_out, R) / 4
        leaf = {"LORA": "lora", "LOHA": "hada"}[kind]
        tensors |= {f"base_model.model.{name}.{leaf}_A.weight": A, f"base_model.model.{name}.{leaf}_B.weight": B}
        deltas[name] = ALPHA / R * B @ A
    if kind == "LOHA":
        tensors = {
            f"base_model.model.{name}.hada_{w}_{end}": torch.randn(d if end == "a" else R, R if end == "a" else d_in)
            for name, delta in deltas.items()
            for d, d_in in [delta.shape]
            for w in ("w1", "w2")
            for end in ("a", "b")
        }
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in names})
    config = {"peft_type": kind, "r": R, "lora_alpha": ALPHA, "alpha": ALPHA, "target_modules": targets}
    config = {key: value for key, value in config.items() if key != ("alpha" if kind == "LORA" else "lora_alpha")}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize(
    ("parts", "gate"), [(("w1", "w2", "w3"), False), (("w2",), False), ((), True)], ids=["all", "down", "gate"]
)
def test_lora_on_experts_that_are_one_parameter_today(parts: tuple[str, ...], gate: bool, tmp_path: Path) -> None:
    deltas = of_experts(tmp_path, parts, gate)
    dense = mixtral()
    with torch.no_grad():
        for name, delta in deltas.items():
            mlp = dense.model.layers[int(name.split(".")[2])].mlp
            if gate:
                mlp.gate.weight += delta
                continue
            expert, part = int(name.split(".")[5]), name.rpartition(".")[2]
            if part == "w2":
                mlp.experts.down_proj[expert] += delta
            else:  # w1 above w3
                mlp.experts.gate_up_proj[expert, slice(24) if part == "w1" else slice(24, 48)] += delta
    assert (answers(dense)[0] - answers(mixtral())[0]).abs().max() > 1e-3
    ours = load_adapter(mixtral(), tmp_path)
    assert_same(ours, dense)
    assert_same(peft.PeftModel.from_pretrained(mixtral(), tmp_path).eval(), dense)
    assert_same(load_adapter(mixtral(), save_adapter(ours, tmp_path / "again")), dense)
    ours.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for _, _, a in adapters_of(ours) for p in a.parameters() if p.requires_grad)


def test_what_cannot_be_fused_says_why(tmp_path: Path) -> None:
    model = mixtral()
    of_experts(tmp_path, ("w1",))
    with pytest.raises(AdapterFileError, match=r"experts\.0\.w1', which is no layer .* without also targeting w3"):
        load_adapter(model, tmp_path)
    of_experts(tmp_path, ("w1", "w3"), kind="LOHA")
    with pytest.raises(AdapterFileError, match=r"in 'model\.layers\.0\.mlp\.experts\.gate_up_proj'\. Merge it with"):
        load_adapter(model, tmp_path)
    assert_same(model, mixtral())
