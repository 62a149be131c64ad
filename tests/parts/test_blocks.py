"""Blocks are found in models of all kinds, and asked for by path elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import AdapterError, LoRA, inject
from lightning_peft.parts.blocks import find_blocks


def timm_model(name: str) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name)


def transformers_model(cls: str, config: str, **arguments: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, cls)(getattr(transformers, config)(**arguments))

    return make


def diffusers_model(cls: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("diffusers"), cls)(**arguments)


def stack(path: str, n: int) -> list[str]:
    return [f"{path}.{i}" for i in range(n)]


def stages(path: str, inner: str, depths: list[int]) -> list[str]:
    return [f"{path}.{stage}{inner}.{i}" for stage, depth in enumerate(depths) for i in range(depth)]


KNOWN = {
    "vit": (timm_model("vit_tiny_patch16_224"), stack("blocks", 12)),
    "mixer": (timm_model("mixer_s16_224"), stack("blocks", 8)),
    "swin": (timm_model("swin_tiny_patch4_window7_224"), stages("layers", ".blocks", [2, 2, 6, 2])),
    "convnext": (timm_model("convnext_tiny"), stages("stages", ".blocks", [3, 3, 9, 3])),
    "resnet": (timm_model("resnet18"), [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]),
    "efficientnet": (timm_model("efficientnet_b0"), stages("blocks", "", [1, 2, 2, 3, 3, 4, 1])),
    "llama": (transformers_model("LlamaForCausalLM", "LlamaConfig", num_hidden_layers=3), stack("model.layers", 3)),
    "bert": (transformers_model("BertModel", "BertConfig", num_hidden_layers=3), stack("encoder.layer", 3)),
    "gpt2": (transformers_model("GPT2LMHeadModel", "GPT2Config", n_layer=3), stack("transformer.h", 3)),
    "t5": (
        transformers_model("T5ForConditionalGeneration", "T5Config", num_layers=2),
        [*stack("encoder.block", 2), *stack("decoder.block", 2)],
    ),
    "mixtral": (transformers_model("MixtralModel", "MixtralConfig", num_hidden_layers=3), stack("layers", 3)),
    "dit": (diffusers_model("DiTTransformer2DModel", num_layers=3), stack("transformer_blocks", 3)),
    "flux": (
        diffusers_model("FluxTransformer2DModel", num_layers=2, num_single_layers=3),
        [*stack("transformer_blocks", 2), *stack("single_transformer_blocks", 3)],
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 3, enable_nested_tensor=False),
        stack("layers", 3),
    ),
}


@pytest.mark.parametrize(("make", "expected"), KNOWN.values(), ids=KNOWN.keys())
def test_the_blocks_of_known_models_are_found(make: Callable[[], nn.Module], expected: list[str]) -> None:
    with torch.device("meta"):
        assert find_blocks(make()) == expected


def test_the_blocks_of_a_unet_are_its_residual_and_attention_blocks() -> None:
    with torch.device("meta"):
        model = diffusers_model("UNet2DModel", sample_size=32)()
    names = {type(model.get_submodule(name)).__name__ for name in find_blocks(model)}
    assert names == {"ResnetBlock2D", "Attention"}


class Named(nn.Module):
    """Blocks that are in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


def test_blocks_outside_of_lists_are_asked_for_by_path() -> None:
    with pytest.raises(AdapterError, match="no list of like blocks is found in Named"):
        find_blocks(Named())
    assert find_blocks(Named(), ["first", "second"]) == ["first", "second"]
    assert find_blocks(Named(), "head") == ["head.0", "head.1", "head.2"]
    with pytest.raises(AdapterError, match=r"LISA: Named has no module 'frist'. Did you mean 'first'"):
        find_blocks(Named(), "frist", who="LISA")


def test_adapters_are_no_blocks() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(3, 3)) for _ in range(2)])
    before = find_blocks(model)
    assert before == ["0", "1"]
    assert find_blocks(inject(model, LoRA(r=1))) == before
