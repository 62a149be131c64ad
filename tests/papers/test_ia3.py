"""(IA)^3 against its formula, computed by hooks on the layers; and which layers it takes."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import IA3, inject
from lightning_peft.engine import TargetError, adapters_of
from tests.methods.backbones import assert_unchanged, backbone, call, moved, snapshot

# name -> (last parts of the layers whose output is rescaled, and of those whose input is), in each of two blocks
PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vit": (("attn.qkv",), ("mlp.fc2",)),
    "swin": (("attn.qkv",), ("mlp.fc2",)),
    "encoder": (("self_attn",), ("linear2",)),
    "llama": (("self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)),
    "bert": (("attention.self.key", "attention.self.value"), ("output.dense",)),
    "gpt2": (("attn.c_attn",), ("mlp.c_proj",)),
    "dit": (("attn1.to_k", "attn1.to_v"), ("ff.net.2",)),
}


@pytest.mark.parametrize("name", PLACES)
def test_keys_values_and_inner_features_are_rescaled(name: str) -> None:
    outputs, inputs = PLACES[name]
    model, reference = moved(inject(backbone(name), IA3())), backbone(name).train()
    found = {path: adapter for path, _, adapter in adapters_of(model)}
    assert len(found) == 2 * len(outputs + inputs)
    for path, adapter in found.items():
        layer: Any = reference.get_submodule(path)
        if isinstance(layer, nn.MultiheadAttention):  # uses its weights itself
            with torch.no_grad():
                layer.in_proj_weight *= adapter.scale[:, None]
                layer.in_proj_bias *= adapter.scale
        elif path.endswith(inputs):
            layer.register_forward_pre_hook(lambda module, args, scale=adapter.scale: (args[0] * scale,))
        else:
            assert path.endswith(outputs)
            layer.register_forward_hook(lambda module, args, y, scale=adapter.scale: y * scale)
    for module in reference.modules():  # hooks: not the fused one
        module.training = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)
    torch.testing.assert_close(call(name, model), call(name, reference), rtol=1e-5, atol=1e-6)


def test_the_count_is_that_of_the_paper() -> None:
    """T5 with 3 billion numbers: 540 thousand, in all attentions and feed-forward networks."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120, "num_layers": 24}
    with torch.device("meta"):
        t5 = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        )
    method = IA3()
    total = method.total_trainable(method.targets(t5))
    assert total == 24 * (2 * 2048 + 5120) + 24 * (4 * 2048 + 5120) == 540_672


def test_the_start_is_the_base_bit_for_bit() -> None:
    model = inject(backbone("llama"), IA3())
    assert torch.equal(call("llama", model), call("llama", backbone("llama")))


def test_a_feedforward_layer_that_does_not_exist_is_refused() -> None:
    """Or the layers that were meant would be rescaled at their outputs."""
    model = backbone("llama")
    before = snapshot(model)
    message = r"feedforward_modules 'donw_proj' matched none of 6 layers to rescale\. Did you mean .*down_proj"
    with pytest.raises(TargetError, match=message):
        inject(model, IA3(target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules="donw_proj"))
    assert_unchanged(model, before)
    inject(model, IA3(target_modules=("k_proj", "down_proj"), feedforward_modules=()))
    assert not any(adapter.on_input for _, _, adapter in adapters_of(model))
