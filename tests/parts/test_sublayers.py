"""Attentions and feed-forward networks of many kinds of blocks, found by structure."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import AdaptFormer, HoulsbyAdapter, LoRA, ParallelAdapter, PfeifferAdapter, inject
from lightning_peft.engine import TargetError
from lightning_peft.parts.sublayers import find_sublayers, keys_and_values, n_heads
from tests.methods.backbones import TinyBlocks, backbone
from tests.papers.stack import Stack

_SIZES: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
_DECODER: dict[str, Any] = {"vocab_size": 31, "head_dim": 4, "num_key_value_heads": 1}
_BART: dict[str, Any] = {
    f"{part}_{what}": size
    for part in ("encoder", "decoder")
    for what, size in (("layers", 2), ("attention_heads", 3), ("ffn_dim", 20))
}


def of_timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=5, **options)


def of_transformers(kind: str, **options: Any) -> nn.Module:
    import transformers

    config = kind.replace("ForCausalLM", "").replace("Model", "").replace("Vision", "Vision") + "Config"
    return getattr(transformers, kind)(getattr(transformers, config)(**options))


def of_diffusers(kind: str, **options: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, kind)(**options)


def prenorm_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


ViT = functools.partial(of_timm, img_size=28, embed_dim=12, num_heads=3, depth=2)
SD3: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 4,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "caption_projection_dim": 12,
    "pooled_projection_dim": 8,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 12),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 10,
}

# model, its first block, (attention: first reader, exit), (feed-forward network: first reader, exit), norms, heads
FOUND: dict[str, tuple[Callable[[], nn.Module], str, Any, Any, tuple[str, ...], int | None]] = {
    "tiny": (TinyBlocks, "blocks.0", ("attn.qkv", "attn.proj"), ("mlp.0", "mlp.2"), ("norm1", "norm2"), None),
    "stack": (Stack, "layers.0", ("attn", "attn"), ("up", "down"), ("norm",), None),
    "vit": (
        functools.partial(backbone, "vit"),
        "blocks.0",
        ("attn.qkv", "attn.proj"),
        ("mlp.fc1", "mlp.fc2"),
        ("norm1", "norm2"),
        3,
    ),
    "dinov2": (
        lambda: ViT("vit_small_patch14_dinov2"),
        "blocks.0",
        ("attn.qkv", "ls1"),
        ("mlp.fc1", "ls2"),
        ("norm1", "norm2"),
        3,
    ),
    "eva": (
        lambda: ViT("eva02_base_patch14_224", mlp_ratio=2.0),
        "blocks.0",
        ("attn.q_proj", "attn.proj"),
        ("mlp.fc1_g", "mlp.fc2"),
        ("norm1", "norm2"),
        3,
    ),
    "swin": (
        functools.partial(backbone, "swin"),
        "layers.0.blocks.0",
        ("attn.qkv", "attn.proj"),
        ("mlp.fc1", "mlp.fc2"),
        ("norm1", "norm2"),
        2,
    ),
    "convnext": (
        functools.partial(backbone, "convnext"),
        "stages.0.blocks.0",
        None,
        ("mlp.fc1", "mlp.fc2"),
        ("norm",),
        None,
    ),
    "convnext, linear": (
        lambda: of_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(6, 8, 10, 12), conv_mlp=False),
        "stages.0.blocks.0",
        None,
        ("mlp.fc1", "mlp.fc2"),
        ("norm",),
        None,
    ),
    "mixer": (
        functools.partial(backbone, "mixer"),
        "blocks.0",
        None,
        ("mlp_channels.fc1", "mlp_channels.fc2"),
        ("norm1", "norm2"),
        None,
    ),
    "encoder": (prenorm_encoder, "layers.0", ("self_attn", "self_attn"), ("linear1", "linear2"), ("norm1", "norm2"), 3),
    "llama": (
        functools.partial(backbone, "llama"),
        "model.layers.0",
        ("self_attn.q_proj", "self_attn.o_proj"),
        ("mlp.gate_proj", "mlp.down_proj"),
        ("input_layernorm", "post_attention_layernorm"),
        3,
    ),
    "qwen3": (
        lambda: of_transformers("Qwen3ForCausalLM", **_SIZES, **_DECODER),
        "model.layers.0",
        ("self_attn.q_proj", "self_attn.o_proj"),
        ("mlp.gate_proj", "mlp.down_proj"),
        ("input_layernorm", "post_attention_layernorm"),
        3,
    ),
    "bert": (
        functools.partial(backbone, "bert"),
        "bert.encoder.layer.0",
        ("attention.self.query", "attention.output.dense"),
        ("intermediate.dense", "output.dense"),
        ("attention.output.LayerNorm", "output.LayerNorm"),
        3,
    ),
    "distilbert": (
        lambda: of_transformers("DistilBertModel", dim=12, hidden_dim=20, n_layers=2, n_heads=3, vocab_size=31),
        "transformer.layer.0",
        ("attention.q_lin", "attention.out_lin"),
        ("ffn.lin1", "ffn.lin2"),
        ("sa_layer_norm", "output_layer_norm"),
        3,
    ),
    "gpt2": (
        functools.partial(backbone, "gpt2"),
        "transformer.h.0",
        ("attn.c_attn", "attn.c_proj"),
        ("mlp.c_fc", "mlp.c_proj"),
        ("ln_1", "ln_2"),
        3,
    ),
    "bart": (
        lambda: of_transformers("BartModel", d_model=12, vocab_size=31, **_BART),
        "encoder.layers.0",
        ("self_attn.k_proj", "self_attn.out_proj"),
        ("fc1", "fc2"),
        ("self_attn_layer_norm", "final_layer_norm"),
        3,
    ),
    "t5": (
        lambda: of_transformers("T5Model", d_model=12, d_ff=20, num_layers=2, num_heads=3, d_kv=4, vocab_size=31),
        "encoder.block.0",
        ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o"),
        ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
        ("layer.0.layer_norm", "layer.1.layer_norm"),
        3,
    ),
    "clip": (
        lambda: of_transformers("CLIPVisionModel", **_SIZES, image_size=16, patch_size=8),
        "encoder.layers.0",
        ("self_attn.k_proj", "self_attn.out_proj"),
        ("mlp.fc1", "mlp.fc2"),
        ("layer_norm1", "layer_norm2"),
        3,
    ),
    "dit": (
        functools.partial(backbone, "dit"),
        "transformer_blocks.0",
        ("attn1.to_q", "attn1.to_out.0"),
        ("ff.net.0.proj", "ff.net.2"),
        ("norm1.norm", "norm3"),
        3,
    ),
    "sd3": (
        lambda: of_diffusers("SD3Transformer2DModel", **SD3),
        "transformer_blocks.0",
        ("attn.to_q", "attn.to_out.0"),
        ("ff.net.0.proj", "ff.net.2"),
        ("norm1.norm", "norm1_context.norm", "norm2", "norm2_context"),
        3,
    ),
}


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND.keys())
def test_sublayers_are_found(case: Any) -> None:
    build, block, attention, feedforward, norms, heads = case
    model = build()
    expected = {kind: pair for kind, pair in (("attention", attention), ("feedforward", feedforward)) if pair}
    found = find_sublayers(model, tuple(expected))  # type: ignore[arg-type]
    first = [s for s in found if s.block == block]
    ends = {s.kind: tuple(t.name.removeprefix(block + ".") for t in (s.entry, s.exit)) for s in first}
    assert ends == expected
    assert [tuple(name.removeprefix(block + ".") for name in s.norms) for s in first] == [norms] * len(first)
    assert [n_heads(model, s.projection) for s in first if s.kind == "attention"] == [heads] * bool(attention)
    # each block of the same stack has the same
    stack = block.rpartition(".")[0].partition(".")[0]
    counts = {b: len([s for s in found if s.block == b]) for b in {s.block for s in found} if b.startswith(stack)}
    assert len(counts) > 1
    assert set(counts.values()) == {len(first)}


def test_what_reads_the_input_is_all_that_reads_it() -> None:
    attention, feedforward = find_sublayers(backbone("llama"))[:2]
    ends = [t.name.split(".")[-1] for t in attention.readers]
    assert ends == ["q_proj", "k_proj", "v_proj"]
    assert [t.name.split(".")[-1] for t in feedforward.readers] == ["gate_proj", "up_proj"]
    assert [keys_and_values(t, attention) for t in attention.readers] == [(1, ()), (1, (0,)), (1, (0,))]
    assert keys_and_values(feedforward.readers[0], feedforward) == (1, ())
    fused = find_sublayers(backbone("vit"))[0]
    assert keys_and_values(fused.readers[0], fused) == (3, (1, 2))


def test_a_cross_attention_is_an_attention_of_its_own() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 3, 20), 2)
    assert [s.exit.name for s in find_sublayers(model)[:3]] == [
        "layers.0.self_attn",
        "layers.0.multihead_attn",
        "layers.0.linear2",
    ]


def test_what_looks_at_another_sequence_says_so() -> None:
    """By its own name, not by that of something around the model."""
    layer = nn.TransformerDecoderLayer(12, 3, 20, batch_first=True)
    bart = of_transformers("BartModel", vocab_size=31, d_model=12, **_BART)
    crossing = lambda model: {s.exit.name.split(".")[-2] for s in find_sublayers(model) if s.crosses}  # noqa: E731
    assert crossing(bart) == {"encoder_attn"}
    found = find_sublayers(nn.ModuleDict({"cross_encoder": nn.TransformerDecoder(layer, 2)}))
    assert [s.exit.name.split(".")[-1] for s in found if s.crosses] == ["multihead_attn"] * 2


def test_blocks_that_are_not_found_by_themselves_can_be_named() -> None:
    model = backbone("unet")
    with pytest.raises(TargetError, match=r"none of \d+ blocks .* has a feed-forward network\. Name other blocks"):
        find_sublayers(model, ("feedforward",))
    found = find_sublayers(model, ("attention",), blocks=["down_blocks.1.attentions"])
    # where the block is an attention itself
    assert [(s.entry.name, s.exit.name) for s in found] == [
        ("down_blocks.1.attentions.0.to_q", "down_blocks.1.attentions.0.to_out.0")
    ]


def test_blocks_that_stand_alone_count_with_those_of_a_list() -> None:
    found = find_sublayers(of_diffusers("UNet2DConditionModel", **UNET))
    assert [s.exit.name.split("transformer_blocks.0.")[1] for s in found[:3]] == [
        "attn1.to_out.0",
        "attn2.to_out.0",
        "ff.net.2",
    ]
    assert {s.block.partition(".attentions")[0] for s in found} == {"down_blocks.0", "up_blocks.1", "mid_block"}
    assert len(found) == 3 * 4


def test_a_block_of_convolutions_has_no_feedforward_network() -> None:
    """Its 1x1 convolutions alone would look like one."""
    for name in ("resnet50", "resnext50_32x4d"):
        model = of_timm(name, layers=(2, 1, 1, 1))
        with pytest.raises(TargetError, match=r"PfeifferAdapter: none of .* blocks of ResNet .* has a feed-forward"):
            PfeifferAdapter().targets(model)
        layers = PfeifferAdapter(target_modules=r"layer\d.*conv3").targets(model)
        assert [t.site.kind for t in layers] == ["conv"] * 5


def test_what_leaves_places_out_is_no_feedforward_network() -> None:
    """A branch beside it would answer for more places than there are behind it."""

    def inverted(stride: int) -> nn.Module:
        depthwise = nn.Conv2d(6, 6, 3, stride, padding=1, groups=6)
        return nn.Sequential(nn.Conv2d(4, 6, 1), depthwise, nn.Conv2d(6, 4, 1))

    assert len(find_sublayers(nn.ModuleList([inverted(1), inverted(1)]), ("feedforward",))) == 2
    with pytest.raises(TargetError, match=r"none of 2 blocks .* has a feed-forward network"):
        find_sublayers(nn.ModuleList([inverted(2), inverted(2)]), ("feedforward",))
    maxvit = of_timm("maxvit_nano_rw_256", img_size=64)
    model = inject(maxvit, ParallelAdapter(r=2)).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        (PfeifferAdapter(), nn.Linear(2, 2), "no list of like blocks is found in Linear. Give its path"),
        (HoulsbyAdapter(), "mixer", r"none of 2 blocks of MlpMixer \(blocks.0 to blocks.1\) has an attention. Name"),
        (ParallelAdapter(blocks="block"), "vit", "has no module 'block'. Did you mean 'blocks'?"),
        (PfeifferAdapter(target_modules="fc3"), "vit", "Did you mean 'fc2' or 'fc1'?"),
        (ParallelAdapter(target_modules="patch_embed.proj"), "vit", "a Conv2d; but ParallelAdapter adapts linear"),
        (PfeifferAdapter(exclude_modules="qkv"), "vit", "named by their last layers: blocks.0.mlp.fc2"),
        (PfeifferAdapter(exclude_modules="mlp"), "vit", "leave no sub-layer of 2 to adapt. Leave fewer"),
        (PfeifferAdapter(modules_to_save="blocks"), "vit", "leave no sub-layer of 2 to adapt. Leave fewer"),
        (PfeifferAdapter(layers_to_transform=(2,)), "vit", r"layers_to_transform \[2\] matched no block"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(method: Any, model: Any, message: str) -> None:
    model = backbone(model) if isinstance(model, str) else model
    with pytest.raises(TargetError, match=message.replace("?", r"\?")) as refusal:
        inject(model, method)
    assert type(method).__name__ in str(refusal.value)
    assert re.search(r"[.?] [A-Z].{10}|blocks 0 to 1", str(refusal.value))
    assert not any(type(m).__name__.startswith("Adapted") for m in model.modules())


def test_blocks_and_sublayers_are_chosen() -> None:
    vit = backbone("vit")
    exits = lambda method: [t.name for t in method.targets(vit)]  # noqa: E731
    assert exits(PfeifferAdapter(layers_to_transform=[1])) == ["blocks.1.mlp.fc2"]
    assert exits(PfeifferAdapter(blocks=["blocks.0"])) == ["blocks.0.mlp.fc2"]
    assert exits(HoulsbyAdapter(exclude_modules=r"blocks\.0.*")) == ["blocks.1.attn.proj", "blocks.1.mlp.fc2"]
    assert exits(HoulsbyAdapter(exclude_modules="Attention", layers_to_transform=[0])) == ["blocks.0.mlp.fc2"]
    assert exits(HoulsbyAdapter(modules_to_save=r"blocks\.1")) == ["blocks.0.attn.proj", "blocks.0.mlp.fc2"]
    scaled = ViT("vit_small_patch14_dinov2")
    excluded = HoulsbyAdapter(exclude_modules="fc2")  # the layer that scales follows it
    assert [t.name for t in excluded.targets(scaled)] == ["blocks.0.ls1", "blocks.1.ls1"]


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_an_adapted_model_has_the_same_sublayers(name: str) -> None:
    model = FOUND[name][0]()
    before = [(s.kind, s.entry.name, s.exit.name, s.norms) for s in find_sublayers(model)]
    inject(model, LoRA(r=2), name="lora")
    inject(model, AdaptFormer(r=2), name="parallel")
    inject(model, HoulsbyAdapter(r=2), name="series")
    assert [(s.kind, s.entry.name, s.exit.name, s.norms) for s in find_sublayers(model)] == before


@pytest.mark.parametrize("cls", [HoulsbyAdapter, ParallelAdapter])
def test_norm_layers_train_if_asked(cls: Any) -> None:
    model = backbone("bert")
    names = cls(train_norms=True).trained_in_place(model)
    expected = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) for p in ("weight", "bias")}
    assert set(names) == expected
    assert len(names) == len(expected)
    both = cls(train_norms=True, modules_to_save="classifier").trained_in_place(model)
    assert set(both) == expected | {"classifier.weight", "classifier.bias"}
    assert cls(train_norms=False).trained_in_place(model) == []


def test_a_norm_without_parameters_and_one_of_another_library_count() -> None:
    llama = PfeifferAdapter(train_norms=True).trained_in_place(backbone("llama"))
    assert "model.layers.0.input_layernorm.weight" in llama
    assert "model.norm.weight" in llama
    assert PfeifferAdapter(train_norms=True).trained_in_place(backbone("dit")) == []
    assert torch.is_tensor(inject(backbone("dit"), PfeifferAdapter(r=2)).get_parameter("pos_embed.proj.weight"))


def test_batch_norms_behind_layers_do_not_say_how_wide_a_block_is() -> None:
    attention, feedforward = find_sublayers(of_timm("levit_128s"))[:2]
    assert attention.exit.name == "stages.0.blocks.0.attn.proj.ln.linear"
    assert feedforward.exit.name == "stages.0.blocks.0.mlp.ln2.linear"
    assert attention.width == feedforward.width == 128


def test_a_sequence_beside_blocks_that_are_sequences_is_none() -> None:
    sequence = lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))  # noqa: E731
    model = nn.ModuleDict({"layers": nn.ModuleList([sequence(), sequence()]), "head": sequence()})
    assert [s.exit.name for s in find_sublayers(model, ("feedforward",))] == ["layers.0.2", "layers.1.2"]


def test_each_of_a_list_of_attentions_is_one() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.attns = nn.ModuleList([nn.Sequential(nn.Linear(4, 12), nn.Linear(4, 4)) for _ in range(2)])

    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
    found = find_sublayers(model, ("attention",), blocks="layers")
    assert [s.exit.name for s in found] == [f"layers.{block}.attns.{i}.1" for block in (0, 1) for i in (0, 1)]


def test_keys_of_another_width_do_not_read_the_input() -> None:
    found = find_sublayers(of_diffusers("UNet2DConditionModel", **UNET), ("attention",))
    assert [[t.name.split(".")[-1] for t in s.readers] for s in found[:2]] == [["to_q", "to_k", "to_v"], ["to_q"]]


def test_a_number_that_does_not_divide_is_no_number_of_heads() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Sequential(nn.Linear(12, 36), nn.Linear(12, 12))
            self.attn.num_heads = 5  # type: ignore[assignment]
            self.attn.n_heads = 3  # type: ignore[assignment]

    model = nn.ModuleList([Block(), Block()])
    assert [n_heads(model, s.projection) for s in find_sublayers(model, ("attention",))] == [3, 3]


def test_named_layers_below_what_is_trained_whole_get_no_adapter() -> None:
    method = PfeifferAdapter(target_modules="fc2", modules_to_save=r"blocks\.1")
    assert [t.name for t in method.targets(backbone("vit"))] == ["blocks.0.mlp.fc2"]
