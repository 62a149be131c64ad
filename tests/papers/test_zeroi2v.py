"""ZeroI2V: linear maps that merging folds away, and attention that looks at other frames."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import AdapterError, ZeroI2V, inject, merge, unmerge
from lightning_peft.engine import MergeError, TargetError, adapters_of
from tests.methods.backbones import backbone, call, moved, tiny


def maps(model: nn.Module) -> dict[str, Any]:
    return {path: adapter for path, _, adapter in adapters_of(model)}


def mapped(adapter: Any, x: Tensor, scaling: float = 0.5) -> Tensor:
    return x + scaling * ((x @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias)


def shifted(y: Tensor, frames: int, n: int) -> Tensor:
    """(B * T, ..., d) channel by channel: the first n from the frame before, the next n from the one behind."""
    out = y.clone()
    for i in range(len(y)):
        t = i % frames
        if t > 0:
            out[i, ..., :n] = y[i - 1, ..., :n]
        if t < frames - 1:
            out[i, ..., n : 2 * n] = y[i + 1, ..., n : 2 * n]
    return out


def tiny_by_hand(base: Any, x: Tensor, a: dict[str, Any], frames: int = 1, n: int = 1) -> Tensor:
    x = torch.cat([base.cls_token.expand(len(x), -1, -1), base.embed(x)], dim=1)
    for i, block in enumerate(base.blocks):
        at = lambda name, i=i: a[f"blocks.{i}.{name}"]  # noqa: E731
        q, k, v = block.attn.qkv(mapped(at("attn.qkv"), block.norm1(x))).chunk(3, dim=-1)
        k, v = shifted(k, frames, n), shifted(v, frames, n)
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v))
        attended = (q @ k.mT / 2).softmax(-1) @ v
        x = x + mapped(at("attn.proj"), block.attn.proj(attended.transpose(1, 2).flatten(2)))
        x = x + mapped(at("mlp.2"), block.mlp[2](F.gelu(block.mlp[0](mapped(at("mlp.0"), block.norm2(x))))))
    x = base.norm(x)
    return base.head(x[:, 1:] + x[:, :1])


def stack(**arguments: Any) -> nn.Module:
    method = ZeroI2V(**{"r": 2, "dropout": 0.0} | arguments)
    return moved(inject(tiny(method).double(), method))


def test_four_maps_in_each_block_follow_the_formula_and_merge_away() -> None:
    model, x, base = stack(), torch.randn(4, 5, 7).double(), tiny(ZeroI2V()).double()
    expected = tiny_by_hand(base, x, maps(model))
    torch.testing.assert_close(model(x), expected)
    parameters = [p for adapter in maps(model).values() for p in adapter.parameters()]
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), parameters), theirs)
    torch.testing.assert_close(merge(model)(x), expected, rtol=1e-10, atol=1e-10)
    assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}
    torch.testing.assert_close(unmerge(model)(x), expected)


@pytest.mark.parametrize("frames", [2, 4])
@pytest.mark.parametrize(("shift_div", "n"), [(12, 1), (3, 4), (4, 3)])
def test_keys_and_values_come_from_the_frames_around(frames: int, shift_div: int, n: int) -> None:
    model, x = stack(frames=frames, shift_div=shift_div), torch.randn(8, 5, 7).double()
    expected = tiny_by_hand(tiny(ZeroI2V()).double(), x, maps(model), frames, n)
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(model(x), stack()(x))


def test_clips_do_not_see_each_other() -> None:
    model, x = stack(frames=3), torch.randn(6, 5, 7).double()
    torch.testing.assert_close(model(x)[:3], model(x[:3]))
    assert not torch.allclose(model(x)[:2], stack(frames=2)(x[:2]))


def test_a_clip_of_one_frame_is_an_image() -> None:
    x = torch.randn(4, 5, 7).double()
    assert torch.equal(stack(frames=1)(x), stack()(x))
    assert ZeroI2V(frames=1).mergeable
    assert ZeroI2V(frames=1).identity_at_init


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layers_for_queries_keys_and_values_share_one_map(name: str) -> None:
    model = moved(inject(backbone(name), ZeroI2V(r=2)))
    first, *others = list(maps(model).items())[:3]
    assert [p.rpartition(".")[2] for p, _ in (first, *others)] in (
        ["q_proj", "k_proj", "v_proj"],
        ["query", "key", "value"],
    )
    assert [len(list(a.parameters())) for _, a in (first, *others)] == [4, 0, 0]
    reference = backbone(name)
    for path, adapter in maps(model).items():
        holder, layer = adapter.first[0] if adapter.first else adapter, reference.get_submodule(path)
        if adapter.before:
            layer.register_forward_pre_hook(lambda m, args, a=holder: mapped(a, args[0]))
        else:
            layer.register_forward_hook(lambda m, args, y, a=holder: mapped(a, y))
    torch.testing.assert_close(call(name, model), call(name, reference), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(call(name, merge(model)), call(name, reference), rtol=1e-5, atol=1e-6)


def test_keys_and_values_of_layers_of_their_own_are_shifted() -> None:
    model = moved(inject(backbone("bert"), ZeroI2V(r=2, frames=2)))
    shifts = {path.rpartition(".")[2]: adapter.shifted for path, adapter in maps(model).items() if adapter.before}
    assert shifts == {"query": (), "key": (0,), "value": (0,), "dense": ()}
    for path, adapter in maps(model).items():
        if path.endswith("0.attention.self.key"):
            x, layer = torch.randn(4, 3, 12).double(), backbone("bert").get_submodule(path)
            y = layer(mapped(adapter.first[0], x))
            torch.testing.assert_close(model.get_submodule(path)(x), shifted(y, 2, 1))


@pytest.mark.parametrize("training", [False, True])
def test_an_attention_that_reads_its_weights(training: bool) -> None:
    """Both the fused and the other way take the maps in; dropout and the shift cannot act there."""
    model = moved(inject(backbone("encoder"), ZeroI2V(r=2, dropout=0.0))).train(training)
    assert [path.partition("layers.0.")[2] for path in maps(model)][:4] == [
        "self_attn",
        "self_attn.out_proj",
        "linear1",
        "linear2",
    ]
    layer: Any = backbone("encoder").get_submodule("layers.0")
    a, given = {path: m for path, m in maps(model).items() if "layers.0." in path}, torch.randn(2, 5, 12).double()
    read = mapped(a["layers.0.self_attn"], given)
    y, _ = layer.self_attn(read, read, read)
    projection = layer.self_attn.out_proj
    inner = torch.linalg.solve(projection.weight, (y - projection.bias).mT).mT  # what the projection was given
    y = mapped(a["layers.0.self_attn.out_proj"], projection(inner))
    x = layer.norm1(given + y)
    fed = layer.linear2(layer.linear1(mapped(a["layers.0.linear1"], x)).relu())
    expected = layer.norm2(x + mapped(a["layers.0.linear2"], fed))
    torch.testing.assert_close(model.get_submodule("layers.0")(given), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.get_submodule("layers.0")(given), expected)
    with pytest.raises(TargetError, match=r"the weight of .* read without a call, where dropout=0.1 cannot act\. Set"):
        inject(backbone("encoder"), ZeroI2V())
    with pytest.raises(TargetError, match="reads that weight without a call of the layer, and its shift of keys and"):
        inject(backbone("encoder"), ZeroI2V(dropout=0.0, frames=2))


def test_a_shift_is_not_merged() -> None:
    model, x = stack(frames=2), torch.randn(4, 5, 7).double()
    y = model(x)
    with pytest.raises(MergeError, match=r"'blocks.0.attn.qkv' .* shift of keys and values over frames is no change"):
        merge(model)
    assert torch.equal(model(x), y)
    assert not ZeroI2V(frames=2).mergeable
    assert not ZeroI2V(frames=2).identity_at_init


def test_dropout_falls_on_the_bottleneck_in_training_alone() -> None:
    method = ZeroI2V(r=3, dropout=0.4, scaling=2.0, target_modules="0")
    model = moved(inject(nn.Sequential(nn.Linear(4, 4)), method))
    adapter, x = maps(model)["0"], torch.randn(6, 4)
    model.eval()
    y = F.linear(x, model.get_parameter("0.weight"), model.get_parameter("0.bias"))
    torch.testing.assert_close(model(x), mapped(adapter, y, 2.0))
    torch.manual_seed(3)
    hidden = F.dropout(y @ adapter.down.T + adapter.down_bias, 0.4)
    torch.manual_seed(3)
    torch.testing.assert_close(model.train()(x), y + 2.0 * (hidden @ adapter.up.T + adapter.up_bias))


def test_the_count_is_that_of_the_paper() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    method = ZeroI2V()
    assert method.total_trainable(method.targets(vit)) == 4 * 12 * (2 * 768 * 192 + 192 + 768)
    llama, method = backbone("llama"), ZeroI2V(r=3)
    assert method.total_trainable(method.targets(llama)) == 4 * 2 * (2 * 12 * 3 + 3 + 12)


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        (
            ZeroI2V(frames=2, shift_div=5),
            "vit",
            r"shift_div=5 does not divide the 12 features .*\. Set it to the number",
        ),
        (ZeroI2V(), "mixer", "has an attention. Name"),
        (ZeroI2V(target_modules="patch_embed.proj"), "vit", "a Conv2d; but ZeroI2V adapts linear"),
        (ZeroI2V(frames=2, shift_div=2), "swin", r"'layers.0.blocks.0' looks at windows or a map.*\. Set frames=None"),
        (ZeroI2V(frames=2), "gqa", r"which features of .* are keys and values cannot be told\. Set frames=None"),
    ],
)
def test_what_cannot_be_adapted_is_refused(method: ZeroI2V, model: str, message: str) -> None:
    if model == "gqa":
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 31, "pad_token_id": 0}
        config = transformers.Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
        base = transformers.Phi3ForCausalLM(config)
    else:
        base = backbone(model)
    with pytest.raises(TargetError, match=message):
        inject(base, method)


def test_a_batch_of_broken_clips_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"a batch of 5 is no whole number of clips of 2 frames\. Give the frames"):
        stack(frames=2)(torch.randn(5, 3, 7).double())


@pytest.mark.parametrize("arguments", [{"r": 0}, {"scaling": 0}, {"dropout": 1.0}, {"frames": 0}, {"shift_div": 0}])
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=f"ZeroI2V: {next(iter(arguments))} must be .*, got "):
        ZeroI2V(**arguments)
