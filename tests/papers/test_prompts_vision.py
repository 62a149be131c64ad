"""VPT and prompts before blocks, against the same written out with the modules of timm, torchvision and torch."""

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import VPT, DePT, PrefixTuning, PromptTuning, PTuning, inject
from lightning_peft.engine import AdapterError, Method, TargetError, adapters_of
from lightning_peft.parts.attention import Products
from lightning_peft.parts.tokens import stack_targets
from tests.methods.backbones import backbone, moved

P = 3
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 3, "depth": 3, "num_classes": 5}
SWIN: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}


@functools.cache
def built(name: str) -> nn.Module:
    import timm

    torch.manual_seed(1)
    if name == "vit":
        model = timm.create_model("vit_tiny_patch16_224", **VIT)
    elif name == "average":
        model = timm.create_model("vit_tiny_patch16_224", **VIT, global_pool="avg", class_token=False, reg_tokens=2)
    elif name == "deit":
        model = timm.create_model("deit_tiny_distilled_patch16_224", **VIT)
    elif name == "swin":
        model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN, num_classes=5)
    else:
        model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN, features_only=True, out_indices=(0, 1))
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def base(name: str) -> Any:
    return copy.deepcopy(built(name))


def tables(model: nn.Module) -> list[Tensor]:
    return [a.prompt() for _, _, a in adapters_of(model) if a.prompt is not None]


def image(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize(("name", "front"), [("vit", 1), ("average", 2), ("deit", 2)])
@pytest.mark.parametrize("deep", [True, False])
def test_vpt_is_the_model_with_longer_sequences(name: str, front: int, deep: bool) -> None:
    model = moved(inject(base(name), VPT(num_virtual_tokens=P, deep=deep)))
    prompts, plain, x = tables(model), base(name), image()
    assert len(prompts) == (3 if deep else 1)
    h = plain._pos_embed(plain.patch_embed(x))
    n = h.shape[1]
    for i, block in enumerate(plain.blocks):
        if i == 0:
            h = torch.cat([h[:, :front], prompts[0].expand(2, -1, -1), h[:, front:]], dim=1)
        elif deep:
            h = torch.cat([h[:, :front], prompts[i].expand(2, -1, -1), h[:, front + P :]], dim=1)
        assert h.shape[1] == n + P
        h = block(h)
    h = torch.cat([h[:, :front], h[:, front + P :]], dim=1)
    torch.testing.assert_close(model(x), plain.forward_head(plain.norm(h)))


def test_vpt_starts_as_the_paper_says() -> None:
    model = inject(base("vit"), VPT(num_virtual_tokens=100))
    bound = math.sqrt(6 / (3 * 8 * 8 + 12))
    for table in tables(model):
        assert 0.97 * bound < table.max() <= bound
        assert -bound <= table.min() < -0.97 * bound
    assert not torch.equal(*tables(model)[:2])


def test_dropout_of_a_prompt_acts_in_training_alone() -> None:
    model, x = inject(base("vit"), VPT(num_virtual_tokens=P, dropout=0.5)), image()
    expected = inject(base("vit"), VPT(num_virtual_tokens=P))(x)
    torch.testing.assert_close(model(x), expected)
    model.train()
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("deep", [True, False])
def test_other_numbers_of_a_prompt_are_dropped_for_each_sample(deep: bool) -> None:
    model = inject(base("vit"), VPT(num_virtual_tokens=P, dropout=0.5, deep=deep)).train()
    seen: list[Tensor] = []
    model.get_submodule("blocks.0.norm1").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(image()[:1].expand(3, -1, -1, -1))
    prompts, table = seen[0][:, 1 : 1 + P], tables(model)[0]
    assert not torch.equal(prompts[0], prompts[1])
    kept = prompts != 0
    torch.testing.assert_close(prompts, kept * 2 * table)
    assert 0.2 < kept.double().mean() < 0.8
    others = torch.cat([seen[0][:, :1], seen[0][:, 1 + P :]], dim=1)
    assert torch.equal(others, others[:1].expand_as(others))


def swin_by_hand(model: Any, prompts: list[Tensor], x: Tensor) -> Tensor:
    """The windows are cut out, prompts are put before their tokens, and thrown away behind each block."""
    h, prompts = model.patch_embed(x), list(prompts)
    for layer in model.layers:
        h = layer.downsample(h)
        for block in layer.blocks:
            h = block_by_hand(block, prompts.pop(0), h)
    return model.forward_head(model.norm(h))


def block_by_hand(block: Any, prompt: Tensor, x: Tensor) -> Tensor:
    attention, (B, H, W, C) = block.attn, x.shape
    w, s, heads = block.window_size[0], block.shift_size[0], block.attn.num_heads
    shifted = torch.roll(block.norm1(x), (-s, -s), (1, 2))
    windows = shifted.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)
    tokens = torch.cat([block.norm1(prompt).expand(len(windows), -1, -1), windows], dim=1)
    q, k, v = attention.qkv(tokens).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * attention.scale
    bias = torch.zeros_like(scores)
    bias[:, :, P:, P:] += attention._get_rel_pos_bias()
    if block.attn_mask is not None:
        bias[:, :, P:, P:] += block.attn_mask.repeat(B, 1, 1)[:, None]
    out = ((scores + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = attention.proj(out)[:, P:].view(B, H // w, W // w, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
    x = x + torch.roll(out, (s, s), (1, 2))
    return x + block.mlp(block.norm2(x))


def test_vpt_on_swin_puts_the_prompt_into_each_window() -> None:
    model, x = moved(inject(base("swin"), VPT(num_virtual_tokens=P))), image(32)
    assert any(block.attn_mask is not None for layer in model.layers for block in layer.blocks)
    torch.testing.assert_close(model(x), swin_by_hand(base("swin"), tables(model), x))
    assert [tuple(t.shape) for t in tables(model)] == [(P, 8), (P, 8), (P, 16), (P, 16)]
    assert not any(block.attn.fused_attn for layer in model.layers for block in layer.blocks)


def test_vpt_on_swin_compiles() -> None:
    torch._dynamo.reset()
    model, x = moved(inject(base("swin"), VPT(num_virtual_tokens=P))), image(32)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_vpt_works_on_features_of_swin() -> None:
    model, x = base("features"), image(32)
    inject(model, VPT(num_virtual_tokens=P))
    moved(model)
    assert len(tables(model)) == 4
    h, features, prompts = model.patch_embed(x), [], tables(model)
    for layer in (model.layers_0, model.layers_1):
        h = layer.downsample(h)
        for block in layer.blocks:
            plain = copy.deepcopy(block)
            h = block_by_hand(plain, prompts.pop(0), h)
        features.append(h)
    for seen, expected in zip(model(x), features, strict=True):
        torch.testing.assert_close(seen, expected)


METHODS: list[Method] = [
    PromptTuning(num_virtual_tokens=P),
    PTuning(num_virtual_tokens=P, encoder_hidden_size=4),
    DePT(num_virtual_tokens=P, r=2, max_length=8),
]


@pytest.mark.parametrize("method", METHODS)
def test_prompts_stand_before_the_first_block(method: Method) -> None:
    model, plain, x = moved(inject(base("vit"), method)), base("vit"), image()
    (prompt,) = [a.prompt for _, _, a in adapters_of(model) if a.prompt is not None]
    h = plain._pos_embed(plain.patch_embed(x))
    if isinstance(method, DePT):
        h = h + (prompt.A @ prompt.B)[: h.shape[1]]
    h = torch.cat([prompt().expand(2, -1, -1), h], dim=1)
    for block in plain.blocks:
        h = block(h)
    torch.testing.assert_close(model(x), plain.forward_head(plain.norm(h[:, P:])))


def encoder(layers: int = 2, norm_first: bool = False) -> nn.Module:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double().eval()


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("names", [1, 2])
def test_masks_of_an_encoder_grow_with_the_sequence(deep: bool, names: int) -> None:
    model, x = encoder(3), torch.randn(4, 4, 12, dtype=torch.float64)
    padding = torch.tensor([[False] * 4, [False] * 3 + [True], [False] * 4, [False, True, False, True]])
    closed = torch.zeros(4, 4, dtype=torch.bool)
    closed[1:, 0] = True
    for name in "ab"[:names]:
        moved(inject(model, VPT(num_virtual_tokens=P, deep=deep), name=name), seed=5)
    p = P * names
    prompts = [torch.cat(list(pair)) for pair in zip(*[tables_of(model, n) for n in "ab"[:names]], strict=True)]
    plain, h = encoder(3), x
    long_padding = nn.functional.pad(padding, (p, 0))
    long_closed = nn.functional.pad(closed, (p, 0, p, 0))
    long_closed[:p, p:] = closed[:1]  # the prompt sees what the first token sees
    for i, block in enumerate(plain.layers):
        h = h if i and not deep else torch.cat([prompts[i].expand(4, -1, -1), h], dim=1)
        h = block(h, src_mask=long_closed, src_key_padding_mask=long_padding)
        h = h[:, p:] if deep or i == 2 else h
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            seen = model(x, mask=closed, src_key_padding_mask=padding)
        torch.testing.assert_close(seen[~padding], h[~padding])


def test_a_prompt_in_each_block_stands_beside_one_that_is_carried_on() -> None:
    x, padding = torch.randn(3, 4, 12, dtype=torch.float64), torch.tensor([[False] * 4, [False, True, False, True]] * 2)
    x, padding = x[:2], padding[:2]
    for first in (True, False):
        model, h = encoder(3), x
        for name, deep in (("a", first), ("b", not first)):
            moved(inject(model, VPT(num_virtual_tokens=2 if deep else P, deep=deep), name=name), seed=5)
        deep_tables, (carried,) = (tables_of(model, n) for n in ("ab" if first else "ba"))
        h = torch.cat([carried.expand(2, -1, -1), h], dim=1)
        for table, block in zip(deep_tables, encoder(3).layers, strict=True):
            h = torch.cat([table.expand(2, -1, -1), h], dim=1)
            h = block(h, src_key_padding_mask=nn.functional.pad(padding, (5, 0)))[:, 2:]
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], h[:, P:][~padding])


def test_a_prefix_in_the_same_windows_counts_once() -> None:
    model, x = base("swin"), torch.randn(1, 8, 8, 8, dtype=torch.float64)
    inject(model, VPT(num_virtual_tokens=P))
    inject(model, PrefixTuning(num_virtual_tokens=2, init_std=1.0), name="prefix")
    block = model.layers[0].blocks[0]
    lengths: list[int] = []

    class Lengths(Products):
        def product(self, given: Any) -> Tensor:
            lengths.append(given["key"].shape[-2])
            return nn.functional.scaled_dot_product_attention(**given)

    with Lengths():
        block(x)
    assert lengths == [4 * 4 + P + 2]


def tables_of(model: nn.Module, name: str) -> list[Tensor]:
    return [a.prompt() for _, _, a in adapters_of(model, name) if a.prompt is not None]


class Stack(nn.Module):
    """Hands masks on as they are given, where ``nn.TransformerEncoder`` turns them into numbers."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, **masks)
        return x


def test_true_is_closed_in_torch_and_open_elsewhere() -> None:
    x, open_ = torch.randn(2, 5, 12, dtype=torch.float64), torch.ones(5, 5).tril().bool()
    longer = nn.functional.pad(open_, (P, 0, P, 0), value=True)
    longer[:P, P:] = open_[:1]
    for blocks, name in ((list(encoder().layers), "src_mask"), (list(base("vit").blocks), "attn_mask")):
        model, h = moved(inject(Stack(copy.deepcopy(blocks)), VPT(num_virtual_tokens=P))), x
        closed = name == "src_mask"
        for prompt, block in zip(tables(model), blocks, strict=True):
            h = block(torch.cat([prompt.expand(2, -1, -1), h], dim=1), **{name: longer ^ closed})[:, P:]
        torch.testing.assert_close(model(x, **{name: open_ ^ closed}), h)


def test_nothing_of_the_future_reaches_a_causal_encoder() -> None:
    model = inject(encoder(), VPT(num_virtual_tokens=P))
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    before = model(x, mask=causal, is_causal=True)
    x[:, 3] += 1
    after = model(x, mask=causal, is_causal=True)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:])


def test_torchvision_keeps_its_class_token_in_front() -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 8, 2, 3, 12, 20, num_classes=5).eval()
    plain = copy.deepcopy(model)
    inject(model, VPT(num_virtual_tokens=P))
    moved(model)
    x, prompts = torch.randn(2, 3, 16, 16), tables(model)
    h = torch.cat([plain.class_token.expand(2, -1, -1), plain._process_input(x)], dim=1) + plain.encoder.pos_embedding
    for prompt, block in zip(prompts, plain.encoder.layers, strict=True):
        h = block(torch.cat([h[:, :1], prompt.expand(2, -1, -1), h[:, 1:]], dim=1))
        h = torch.cat([h[:, :1], h[:, 1 + P :]], dim=1)
    torch.testing.assert_close(model(x), plain.heads(plain.encoder.ln(h)[:, 0]))


def clip() -> Any:
    import transformers as t

    small = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {**small, "vocab_size": 31, "max_position_embeddings": 8, "eos_token_id": 30}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(1)
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).double().eval()


def test_one_of_the_two_towers_of_clip_is_named() -> None:
    with pytest.raises(TargetError, match="VPT: there are 2 stacks of blocks"):
        inject(clip(), VPT())
    vision = [t for t in stack_targets(clip(), "VPT", deep=True, blocks="vision_model.encoder.layers")]
    assert [t.start for t in vision] == [1, 1]
    assert vision[0].patch == 64
    text = inject(clip(), PromptTuning(num_virtual_tokens=P, blocks="text_model.encoder.layers"))
    moved(text)
    ids = torch.tensor([[3, 4, 5, 30], [3, 4, 6, 30]])
    seen = text.text_model(ids).last_hidden_state
    plain = clip().text_model
    h = plain.embeddings(ids)
    h = torch.cat([tables(text)[0].expand(2, -1, -1), h], dim=1)
    for block in plain.encoder.layers:
        h = block(h, attention_mask=None, is_causal=True)
        h = h[0] if isinstance(h, tuple) else h
    torch.testing.assert_close(seen, plain.final_layer_norm(h[:, P:]))


@pytest.mark.parametrize("name", ["resnet", "convnext", "mixer", "convnet", "unet"])
@pytest.mark.parametrize("method", [VPT(), PromptTuning()])
def test_models_without_tokens_are_refused(name: str, method: Method) -> None:
    with pytest.raises(TargetError, match=rf"{type(method).__name__}: .*\. [A-Z].{{20}}"):
        inject(backbone(name), method)


def test_models_that_cannot_carry_tokens_are_refused() -> None:
    import timm

    with pytest.raises(
        TargetError, match=r"VPT: 'model.layers.0' is given a table of positions \(position_embeddings\)"
    ):
        inject(backbone("llama"), VPT())
    with pytest.raises(TargetError, match=r"VPT: 'bert.encoder.layer.0' keeps the keys and values .* Use PromptTuning"):
        inject(backbone("bert"), VPT())
    with pytest.raises(TargetError, match=r"through which no token is carried on. Use VPT\(deep=True\)"):
        inject(base("swin"), VPT(deep=False))
    with pytest.raises(TargetError, match="PromptTuning: 'layers.0.blocks.0' looks at windows"):
        inject(base("swin"), PromptTuning())
    second = timm.create_model("swinv2_tiny_window8_256", **{**SWIN, "window_size": 4})
    with pytest.raises(TargetError, match="looks at windows, in a way that is not known here"):
        inject(second, VPT())
    hiera = timm.create_model("hiera_tiny_224", img_size=(64, 64), embed_dim=8, stages=(1, 1, 1, 1))
    for method in (VPT(), PromptTuning()):  # its attention, not its block, has the windows
        with pytest.raises(TargetError, match="'blocks.0', a HieraBlock, looks at windows"):
            inject(hiera, method)
    sequence_first = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 20), 2, enable_nested_tensor=False)
    with pytest.raises(TargetError, match="batch_first=False"):
        inject(sequence_first, VPT())
    with pytest.raises(TargetError, match="PromptTuning: 'blocks.0' embeds no ids"):
        inject(base("vit"), PromptTuning(init="vocabulary"))
    with pytest.raises(TargetError, match="class_tokens=2, but VisionTransformer has 1"):
        inject(base("vit"), VPT(class_tokens=2))


def test_what_is_not_a_sequence_is_an_error() -> None:
    model = inject(encoder(), VPT(class_tokens=2))
    with pytest.raises(AdapterError, match=r"VPT: TransformerEncoderLayer was given \(2, 1, 12\), not tokens"):
        model(torch.randn(2, 1, 12, dtype=torch.float64))
    with pytest.raises(AdapterError, match=r"VPT: TransformerEncoderLayer was given \(4, 12\), not tokens"):
        model(torch.randn(4, 12, dtype=torch.float64))


class Pooling(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src, *args, **kwargs)[:, ::2]


def test_a_block_that_drops_tokens_is_an_error() -> None:
    model = nn.Sequential(Pooling(12, 3, 20, batch_first=True), Pooling(12, 3, 20, batch_first=True))
    inject(model, VPT())
    with pytest.raises(AdapterError, match="VPT: Pooling answered 5 tokens where it was given 9"):
        model(torch.randn(2, 4, 12))


def test_activation_checkpoints_change_nothing() -> None:
    model, x = moved(inject(base("vit"), VPT(num_virtual_tokens=P, deep=False))), image()
    model(x).square().sum().backward()
    (expected,) = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model.set_grad_checkpointing()
    model.train()(x).square().sum().backward()
    (seen,) = [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(seen, expected)


def test_a_block_with_a_table_of_biases_takes_the_prompt_as_keys_and_values() -> None:
    """Its sequences cannot grow. What a deep prompt makes as queries is thrown away, so keys and values are enough."""
    import timm

    torch.manual_seed(1)
    beit = timm.create_model("beit_base_patch16_224", **VIT, use_rel_pos_bias=True).double().eval()
    plain, x = copy.deepcopy(beit), image()
    model = moved(inject(beit, VPT(num_virtual_tokens=P)))
    h = plain.patch_embed(x)
    h = torch.cat([plain.cls_token.expand(2, -1, -1), h], dim=1)
    h = h if plain.pos_embed is None else h + plain.pos_embed
    for prompt, block in zip(tables(model), plain.blocks, strict=True):
        h = h + scaled(block.gamma_1, with_prompt(block.attn, block.norm1(prompt), block.norm1(h)))
        h = h + scaled(block.gamma_2, block.mlp(block.norm2(h)))
    torch.testing.assert_close(model(x), plain.forward_head(plain.norm(h)))


def scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def with_prompt(attention: Any, prompt: Tensor, x: Tensor) -> Tensor:
    tokens = torch.cat([prompt.expand(len(x), -1, -1), x], dim=1)
    bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = nn.functional.linear(tokens, attention.qkv.weight, bias)
    q, k, v = qkv.unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    scores = q[:, :, P:] @ k.transpose(-2, -1) * attention.scale
    scores[..., P:] += attention._get_rel_pos_bias()
    return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_vpt_on_a_vision_transformer_of_transformers() -> None:
    import transformers as t

    small = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
    torch.manual_seed(1)
    plain = (
        t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**small, image_size=16, patch_size=8, num_register_tokens=2)
        )
        .double()
        .eval()
    )
    model, x = moved(inject(copy.deepcopy(plain), VPT(num_virtual_tokens=P))), image()
    h = plain.embeddings(x)
    for prompt, block in zip(tables(model), plain.encoder.layer, strict=True):
        h = block(torch.cat([h[:, :3], prompt.expand(2, -1, -1), h[:, 3:]], dim=1))
        h = h[0] if isinstance(h, tuple) else h
        h = torch.cat([h[:, :3], h[:, 3 + P :]], dim=1)
    torch.testing.assert_close(model(x).last_hidden_state, plain.layernorm(h))


def test_tokens_of_the_model_itself_are_counted() -> None:
    """Attention does not mind where a prompt stands, so outputs do not show it."""
    import transformers as t

    small = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
    registers = t.Dinov2WithRegistersConfig(**small, image_size=16, patch_size=8, num_register_tokens=4)
    models = [base("vit"), base("average"), base("deit"), encoder(), t.Dinov2WithRegistersModel(registers)]
    assert [stack_targets(model, "VPT", deep=True)[0].start for model in models] == [1, 2, 2, 0, 5]
