"""Side networks against their formulas, written out with numbers of their own in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import LEVI, HierarchicalSideTuning, LadderSideTuning, SideTuning, UniPT, inject
from lightning_peft.engine import AdapterError, Method, adapters_of
from tests.methods.backbones import BACKBONES, TinyBlock, TinyBlocks, backbone, call, moved


def adapted(method: Method) -> tuple[nn.Module, Any, Tensor, list[Tensor]]:
    """Off the start: the model, its exit, an input, and h_0, h_1, h_2 of the base."""
    torch.manual_seed(0)
    model, x = TinyBlocks().double(), torch.randn(2, 13, 7, dtype=torch.float64)
    hidden: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda m, a, y: hidden.extend([a[0], y])) for b in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    moved(inject(model, method))
    return model, adapters_of(model)[-1][2], x, [hidden[0], hidden[1], hidden[3]]


def answer(model: Any, h: Tensor) -> Tensor:
    """What the model makes of the features behind its last block."""
    h = model.norm(h)
    return model.head(h[:, 1:] + h[:, :1])


def ln(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def lin(x: Tensor, layer: Any) -> Tensor:
    return torch.einsum("...i,oi->...o", x, layer.weight) + layer.bias


def token_net(net: Any, x: Tensor) -> Tensor:
    """A layer, a norm over tokens' own features and ReLU, twice; the tokens in front get the mean."""
    for layer, norm in zip(net.layers, net.norms, strict=True):
        x = ln(lin(x, layer), norm).clamp(min=0)
    x = lin(x, net.out)
    return torch.cat([x.mean(1, keepdim=True), x], dim=1)


@pytest.mark.parametrize("merge", ["alpha", "product", "film"])
def test_sidetuning_blends(merge: Any) -> None:
    model, exit_, x, (*_, h) = adapted(SideTuning(width=5, depth=2, merge=merge))
    s = token_net(exit_.net, x)
    if merge == "alpha":
        a = 1 / (1 + math.exp(-exit_.alpha.item()))
        assert abs(a - 0.5) > 1e-3
        expected = a * h + (1 - a) * s
    else:
        expected = h * s if merge == "product" else h * s[..., :12] + s[..., 12:]
    torch.testing.assert_close(model(x), answer(model, expected))


def test_tokens_in_front_of_a_causal_model_get_zeros() -> None:
    """Their mean would show them what follows."""
    model, exit_, x, (*_, h) = adapted(SideTuning(width=5, depth=2, causal=True))
    s = token_net(exit_.net, x)
    s[:, 0] = 0
    a = exit_.alpha.sigmoid()
    torch.testing.assert_close(model(x), answer(model, a * h + (1 - a) * s))
    model, views, x, (_, *hidden) = adapted(LEVI(width=5, depth=2, causal=True))
    g = token_net(views.net, x)
    g[:, 0] = 0
    each = zip(hidden, views.down, views.up, strict=True)
    y = sum(lin(lin(torch.cat([h, g], dim=-1), down).clamp(min=0), up) for h, down, up in each) / 2
    torch.testing.assert_close(model(x), answer(model, y))


@pytest.mark.parametrize("method", [LadderSideTuning, UniPT])
def test_what_replaces_the_answer_does_not_start_at_zero(method: Any) -> None:
    for residual in (True, False):
        model, x = TinyBlocks(), torch.randn(2, 13, 7)
        base = model(x)
        inject(model, method(r=2, residual=residual))
        assert bool(adapters_of(model)[-1][2].up.weight.any()) == (not residual)
        assert torch.equal(model(x), base) == residual


def test_sidetuning_of_images_is_a_net_of_convolutions() -> None:
    model = backbone("vit")
    held: list[Tensor] = []
    hook = model.blocks[1].register_forward_hook(lambda m, a, y: held.append(y))  # type: ignore[union-attr, operator]
    call("vit", model)
    hook.remove()
    moved(inject(model, SideTuning(width=6, depth=3)))
    exit_: Any = adapters_of(model)[-1][2]
    noise = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s, net = noise, exit_.net
    for layer, norm, (stride, padding) in zip(net.layers, net.norms, [(4, 2), (2, 1), (1, 1)], strict=True):
        s = F.conv2d(s, layer.weight, layer.bias, stride=stride, padding=padding)
        mean, var = s.mean((1, 2, 3), keepdim=True), s.var((1, 2, 3), unbiased=False, keepdim=True)
        s = ((s - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    assert s.shape == (2, 6, 2, 2)  # as the tokens lie
    s = lin(s.flatten(2).transpose(1, 2), net.out)
    s = torch.cat([s.mean(1, keepdim=True), s], dim=1)
    a = exit_.alpha.sigmoid()
    expected = model.head(model.norm(a * held[0] + (1 - a) * s)[:, 0])  # type: ignore[operator]
    torch.testing.assert_close(call("vit", model), expected)


@pytest.mark.parametrize("residual", [True, False])
def test_a_ladder_climbs_from_gate_to_gate(residual: bool) -> None:
    method = LadderSideTuning(r=2, num_heads=3, mlp_ratio=2, temperature=0.5, residual=residual)
    model, ladder, x, (h0, *hidden) = adapted(method)
    s = lin(h0, ladder.start)
    for i, (h, block) in enumerate(zip(hidden, ladder.blocks, strict=True)):
        g = 1 / (1 + math.exp(-ladder.gates[i].item() / 0.5))
        s = g * s + (1 - g) * lin(h, ladder.down[i])
        q, k, v = lin(ln(s, block.norm1), block.qkv).split(6, dim=-1)
        heads = []
        for n in range(3):
            of = slice(2 * n, 2 * n + 2)
            weights = (q[..., of] @ k[..., of].transpose(1, 2) / math.sqrt(2)).softmax(-1)
            heads.append(weights @ v[..., of])
        s = s + lin(torch.cat(heads, dim=-1), block.proj)
        s = s + lin(lin(ln(s, block.norm2), block.fc1).clamp(min=0), block.fc2)
    up = lin(ln(s, ladder.norm), ladder.up)
    torch.testing.assert_close(model(x), answer(model, hidden[-1] + up if residual else up))


@torch.no_grad()
def test_a_side_block_of_maps_mixes_by_a_depthwise_convolution() -> None:
    model = moved(inject(backbone("convnext"), LadderSideTuning(r=2, mlp_ratio=2)))
    block, s = adapters_of(model)[-1][2].blocks[1], torch.randn(2, 3, 5, 4, dtype=torch.float64)
    h = F.pad(ln(s, block.norm1), (0, 0, 1, 1, 1, 1))
    weight, expected = block.mix.weight[:, 0], s + block.mix.bias  # (d, rows, columns)
    for row in range(3):
        for column in range(3):
            expected = expected + h[:, row : row + 3, column : column + 5] * weight[:, row, column]
    expected = expected + lin(lin(ln(expected, block.norm2), block.fc1).clamp(min=0), block.fc2)
    torch.testing.assert_close(block(s, None), expected)


@pytest.mark.parametrize("residual", [True, False])
def test_unipt_weighs_what_its_anchor_finds(residual: bool) -> None:
    model, side, x, hidden = adapted(UniPT(r=3, residual=residual))
    z = [ln(lin(h, down), norm) for h, down, norm in zip(hidden, side.down, side.norms, strict=True)]
    anchor, found, scores = z[-1], [], []
    for other in z[:-1]:
        near = (anchor @ other.transpose(1, 2)).clamp(min=0)
        near = near / near.abs().sum(-1, keepdim=True).clamp(min=1e-6) + torch.eye(14)
        found.append(near @ other)
        scores.append((anchor.mean(1) * other.mean(1)) @ side.confidence)
    weights = torch.stack(scores, dim=1).softmax(1)
    mixed = sum(weights[:, i, None, None] * m for i, m in enumerate(found))
    up = lin((anchor + ln(lin(mixed, side.project), side.norm)).clamp(min=0), side.up)
    torch.testing.assert_close(model(x), answer(model, hidden[-1] + up if residual else up))


def test_unipt_of_a_language_model_takes_means_of_the_past() -> None:
    """The last token of a causal model sees all, so what it answers is what the formula without a mask answers."""
    model = backbone("llama")
    hidden: list[Tensor] = []
    for block in model.model.layers:  # type: ignore[union-attr]
        block.register_forward_hook(lambda m, a, y: hidden.extend([a[0], y]))  # type: ignore[operator]
    call("llama", model)
    h = [hidden[0], hidden[1], hidden[3]]
    moved(inject(model, UniPT(r=2, modules_to_save=())))
    side: Any = adapters_of(model)[-1][2]
    got: list[Tensor] = []
    model.model.norm.register_forward_hook(lambda m, a, y: got.append(a[0]))  # type: ignore[union-attr]
    call("llama", model)
    z = [ln(lin(t, down), norm) for t, down, norm in zip(h, side.down, side.norms, strict=True)]
    found, scores = [], []
    for other in z[:-1]:
        near = (z[-1][:, -1:] @ other.transpose(1, 2)).clamp(min=0)
        found.append(near @ other / near.sum(-1, keepdim=True) + other[:, -1:])
        scores.append((z[-1].mean(1) * other.mean(1)) @ side.confidence)
    weights = torch.stack(scores, dim=1).softmax(1)
    mixed = sum(weights[:, i, None, None] * m for i, m in enumerate(found))
    up = lin((z[-1][:, -1:] + ln(lin(mixed, side.project), side.norm)).clamp(min=0), side.up)
    torch.testing.assert_close(got[-1][:, -1:], h[-1][:, -1:] + up)


def test_levi_averages_its_views() -> None:
    model, views, x, (_, *hidden) = adapted(LEVI(width=5, depth=2))
    g = token_net(views.net, x)
    each = [
        lin(lin(torch.cat([h, g], dim=-1), down).clamp(min=0), up)
        for h, down, up in zip(hidden, views.down, views.up, strict=True)
    ]
    assert len(each) == 2
    torch.testing.assert_close(model(x), answer(model, (each[0] + each[1]) / 2))


def test_levi_spreads_its_taps_and_ends_at_the_last() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(10)))
    model = inject(nn.Sequential(nn.Linear(2, 4), blocks), LEVI(num_taps=3, modules_to_save=()))
    assert [path for path, _, _ in adapters_of(model)] == ["0", "1.2", "1.5", "1.9"]


def test_hierarchical_side_tuning_steps_through_its_stages() -> None:
    method = HierarchicalSideTuning(dims=(4, 6), num_heads=(2, 3), mlp_ratio=2)
    model, _, x, _ = adapted(method)
    exits: Any = [a for _, _, a in adapters_of(model) if hasattr(a, "bridge")]
    h = torch.cat([model.cls_token.expand(2, -1, -1), model.embed(x)], dim=1)
    tokens, features = [], []
    for block, stage in zip(model.blocks, exits, strict=True):  # type: ignore[call-overload]
        h = torch.cat([stage.meta.expand(2, 1, -1), h], dim=1)
        y = h + block.attn(block.norm1(h))
        y = y + block.mlp(block.norm2(y))
        tokens.append(y[:, :1])
        features.append(y[:, 2:])
        h = y[:, 1:]
    first, second = exits
    m = F.conv1d(x.transpose(1, 2), first.stem.weight, first.stem.bias, stride=2, padding=1)
    m = F.group_norm(m, 1, first.stem_norm.weight, first.stem_norm.bias).clamp(min=0)
    m = F.conv1d(m, first.step.weight, first.step.bias, stride=2).transpose(1, 2)
    for i, (stage, d, heads) in enumerate(((first, 4, 2), (second, 6, 3))):
        if i:
            m = F.conv1d(m.transpose(1, 2), stage.step.weight, stage.step.bias, stride=2, padding=1).transpose(1, 2)
        m = ln(m, stage.step_norm)
        assert m.shape == (2, (3, 2)[i], d)
        v = F.adaptive_avg_pool1d(features[i].transpose(1, 2), m.shape[1]).transpose(1, 2)
        v, (block,) = lin(v, stage.bridge), stage.blocks
        token = ln(lin(tokens[i], stage.bridge), stage.meta_norms[0])
        both = torch.cat([token, v.mean(1, keepdim=True)], dim=1)
        q, (key, value) = lin(ln(m, block.norm1), block.q), lin(both, block.kv).split(d, dim=-1)
        parts, w = [], d // heads
        for n in range(heads):
            of = slice(w * n, w * n + w)
            parts.append((q[..., of] @ key[..., of].transpose(1, 2) / math.sqrt(w)).softmax(-1) @ value[..., of])
        m = m + lin(torch.cat(parts, dim=-1), block.proj)
        m = m + v
        hidden = lin(ln(m, block.norm2), block.fc1)
        m = m + lin(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, block.fc2)
        m = ln(m, stage.norm)
    up = F.interpolate(lin(m, second.up).transpose(1, 2), 13, mode="linear").transpose(1, 2)
    torch.testing.assert_close(model(x), answer(model, torch.cat([up.mean(1, keepdim=True), up], dim=1)))


@pytest.mark.parametrize("front", [0, 2])
def test_the_first_token_or_the_maximum_stands_for_the_meta_token(front: int) -> None:
    class Three(TinyBlocks):
        def __init__(self) -> None:
            super().__init__()
            self.blocks.append(copy.deepcopy(self.blocks[0]))
            self.cls_token = nn.Parameter(torch.randn(1, front, 12))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x)], dim=1)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model, x = Three().double(), torch.randn(2, 12, 7, dtype=torch.float64)
    hidden: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda m, a, y: hidden.append(y)) for block in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    moved(inject(model, HierarchicalSideTuning(dims=(6,), num_heads=(2,), detach_taps=True, modules_to_save=())))
    stage: Any = adapters_of(model)[-1][2]
    given: list[Any] = []
    for block in stage.blocks:
        block.register_forward_hook(lambda m, a, y: given.append(a))
    model(x)
    assert len(given) == 3
    for h, norm, (_, tokens, v) in zip(hidden, stage.meta_norms, given, strict=True):
        expected = lin(h[:, front:].unflatten(1, (3, 4)).mean(2), stage.bridge)
        torch.testing.assert_close(v, expected)
        token = lin(h[:, 0], stage.bridge) if front else expected.amax(1)
        torch.testing.assert_close(tokens, torch.stack([ln(token, norm), expected.mean(1)], dim=1))


def test_blocks_that_want_their_tokens_in_a_grid_take_no_meta_token() -> None:
    """Attention over all tokens, whose keys a convolution makes of the grid."""
    import timm

    sizes: dict[str, Any] = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    model = timm.create_model("pvt_v2_b0", num_classes=5, **sizes).double().eval()
    inject(model, HierarchicalSideTuning(dims=(4, 4, 6, 6), num_heads=(2, 2, 3, 3)))
    assert all(adapter.meta is None for _, _, adapter in adapters_of(model) if hasattr(adapter, "meta"))
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).shape == (2, 5)


@pytest.mark.parametrize("argument", ["attn_mask", "rope", "position_embeddings", "freqs_cis"])
def test_what_has_no_place_for_a_meta_token_is_refused(argument: str) -> None:
    class Told(TinyBlock):
        def forward(  # type: ignore[override]
            self,
            x: Tensor,
            attn_mask: Any = None,
            rope: Any = None,
            position_embeddings: Any = None,
            freqs_cis: Any = None,
        ) -> Tensor:
            return super().forward(x)

    class Tells(TinyBlocks):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x, **{argument: torch.ones(13, 13)})
            return x

    def build(detach_taps: bool) -> nn.Module:
        model = Tells()
        model.blocks = nn.ModuleList([Told(), Told()])
        method = HierarchicalSideTuning(dims=(4, 6), num_heads=(2, 3), detach_taps=detach_taps, modules_to_save=())
        return inject(model, method)

    message = (
        rf"HierarchicalSideTuning: 'blocks.0' is given '{argument}', .*\. Leave the meta tokens out with detach_taps"
    )
    with pytest.raises(AdapterError, match=message):
        build(False)(torch.randn(2, 13, 7))
    assert build(True)(torch.randn(2, 13, 7)).shape == (2, 13, 12)


def test_unipt_starts_with_confidences_of_one_in_sum() -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512)) for _ in range(2)))
    model = inject(nn.Sequential(nn.Linear(2, 512), blocks), UniPT(r=1, modules_to_save=()))
    assert 0.7 < adapters_of(model)[-1][2].confidence.square().sum() < 1.3  # w ~ N(0, 1/d)


def test_hierarchical_side_tuning_trains_the_norms_of_the_blocks() -> None:
    model = inject(TinyBlocks(), HierarchicalSideTuning(dims=(4, 6), num_heads=(2, 3)))
    base = {n for n, p in model.named_parameters() if p.requires_grad and "adapters" not in n}
    norms = {f"blocks.{i}.norm{j}.{key}" for i in range(2) for j in (1, 2) for key in ("weight", "bias")}
    assert base == norms | {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "llama"])
@pytest.mark.parametrize(
    "method",
    [
        SideTuning(width=4, depth=3, modules_to_save=()),
        LadderSideTuning(r=2),
        UniPT(r=2, modules_to_save=()),
        LEVI(width=4, depth=2, modules_to_save=()),
        HierarchicalSideTuning(dims=(4, 6), num_heads=(2, 3), modules_to_save=(), detach_taps=True),
        HierarchicalSideTuning(dims=(4, 6, 6, 8), num_heads=(2, 3, 3, 4), modules_to_save=(), detach_taps=True),
    ],
    ids=lambda method: type(method).__name__,
)
def test_counts_hold_on_models_of_many_kinds(name: str, method: Method) -> None:
    assert name in BACKBONES
    model = backbone(name)
    stages = len(getattr(method, "dims", ()))
    if stages and (stages == 4) != (name == "convnext"):
        return
    if stages and name == "llama":
        return
    expected = method.total_trainable(method.targets(model))
    inject(model, method)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
