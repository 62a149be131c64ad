"""PYRA: which tokens are merged, into what, and that a block in halves is the block."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import PYRA, LoRA, inject
from lightning_peft.adapters.token_merging import Proportional
from lightning_peft.engine import AdapterError, TargetError, adapters_of
from tests.methods.backbones import TinyBlock, TinyBlocks, backbone, call, moved

TOLD: dict[str, Any] = {"num_patches": 13, "num_prefix_tokens": 1, "num_heads": 3}


def attention_by_hand(attention: Any, x: Tensor, size: Tensor) -> Tensor:
    """One sample (N, D): a token that stands for several is as many keys and values."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, 3, 4)).permute(1, 2, 0, 3)
    shares = (q @ k.mT / 2).exp() * size
    return attention.proj((shares / shares.sum(-1, keepdim=True) @ v).transpose(0, 1).flatten(1))


def block_by_hand(
    block: Any, merge: Any, x: Tensor, size: Tensor, r: int, prefix: int
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """One sample (N, D): the block, its tokens merged one by one; the tokens that each of the new ones holds."""
    h = x + attention_by_hand(block.attn, block.norm1(x), size)
    keys = block.attn.qkv(block.norm1(x))[:, 12:24].unflatten(-1, (3, 4)).mean(1)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    evens, odds = (range(first + (prefix - first + 1) // 2 * 2, len(x), 2) for first in (0, 1))  # behind the prefix
    near = {i: max(odds, key=lambda j: float(keys[i] @ keys[j])) for i in evens}
    order = sorted(near, key=lambda i: -float(keys[i] @ keys[near[i]]))[:r]
    q = torch.stack([h[i] * size[i] + h[near[i]] * size[near[i]] for i in order])
    q = nn.functional.layer_norm(q, (12,), merge.norm.weight, merge.norm.bias)
    w1 = 2 * torch.sigmoid(q.T @ merge.weight_r)
    groups = {i: [i] for i in range(len(x)) if i not in order}
    total = {i: h[i] * size[i] for i in groups}
    for place, i in enumerate(order):
        s = h[i] * size[i]
        w2 = 2 * torch.sigmoid(q[place] @ merge.weight_D) - 1
        total[near[i]] = total[near[i]] + s + s * w1 * w2
        groups[near[i]].append(i)
    new = sorted(groups, key=lambda i: (i >= prefix, i % 2 if i >= prefix else 0, i))
    sizes = torch.stack([sum(size[i] for i in groups[n]) for n in new])  # type: ignore[misc]
    h = torch.stack([total[n] / sizes[place] for place, n in enumerate(new)])
    return h + block.mlp(block.norm2(h)), sizes, [groups[n] for n in new]


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
@torch.no_grad()
def test_tokens_are_modulated_merged_and_given_back(prefix: int) -> None:
    torch.manual_seed(0)
    model, x = TinyBlocks().double(), torch.randn(2, 13, 7, dtype=torch.float64)
    model.blocks.append(TinyBlock().double())
    n = 13 + prefix
    model.cls_token = nn.Parameter(torch.randn(1, prefix, 12, dtype=torch.float64))
    moved(inject(model, PYRA(r=(4, 3, 2), **{**TOLD, "num_prefix_tokens": prefix})))
    merges = [a for _, _, a in adapters_of(model) if hasattr(a, "weight_r")]
    base: Any = TinyBlocks().double()
    base.blocks.append(TinyBlock().double())
    base.cls_token = nn.Parameter(torch.empty_like(model.cls_token))
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    rows = []
    for sample in x:
        h = torch.cat([base.cls_token[0], base.embed(sample)])
        size, held = torch.ones(n, dtype=torch.float64), [[i] for i in range(n)]
        for block, merge, r in zip(base.blocks, merges, (4, 3, 2), strict=True):
            h, size, groups = block_by_hand(block, merge, h, size, r, prefix)
            held = [[first for i in group for first in held[i]] for group in groups]
        assert h.shape == (n - 4 - 3 - 2, 12)
        assert sorted(sum(held, [])) == list(range(n))
        assert all([i] in held for i in range(prefix))  # class tokens stay by themselves
        rows.append(torch.stack([next(t for t, group in zip(h, held, strict=True) if i in group) for i in range(n)]))
    h = base.norm(torch.stack(rows))
    torch.testing.assert_close(model(x), base.head(h[:, 1:] + h[:, :1]))


@pytest.mark.parametrize("masked", ["", "bool", "scores"])
@pytest.mark.parametrize("front", [0, 2])
def test_a_token_counts_as_often_as_its_group_is_large(front: int, masked: str) -> None:
    """As if keys and values were repeated; those of a prefix in front of the tokens are single."""
    size = torch.tensor([[1, 3, 2], [2, 1, 1]])
    q, k, v = (torch.randn(2, 4, n, 5, dtype=torch.float64) for n in (3, front + 3, front + 3))
    mask: Any = None
    if masked:
        mask = torch.ones(2, 1, 3, front + 3, dtype=torch.bool)
        mask[0, :, 1, -1] = mask[1, :, :, 0] = False
        mask = mask if masked == "bool" else torch.randn(mask.shape, dtype=torch.float64)
    with Proportional(size[..., None].double()):
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for i, own in enumerate(size):
        times = torch.cat([torch.ones(front, dtype=torch.long), own])
        many = (t[i].repeat_interleave(times, dim=-2) for t in (k, v))
        wide = None if mask is None else mask[i].repeat_interleave(times, dim=-1)
        torch.testing.assert_close(y[i], nn.functional.scaled_dot_product_attention(q[i], *many, attn_mask=wide))


def test_no_activation_outlives_the_forward() -> None:
    model = moved(inject(TinyBlocks(), PYRA(r=(4, 3), **TOLD)))
    model(torch.randn(2, 13, 7))
    held = {id(a.merging): a.merging for _, _, a in adapters_of(model)}
    assert [(m.keys, m.size, m.state, m.skipped, len(m.before)) for m in held.values()] == [(None, None, None, "", 0)]


def test_a_block_that_merges_nothing_is_the_block() -> None:
    model, x = TinyBlocks(), torch.randn(2, 13, 7)
    seen: list[int] = []
    model.blocks[1].mlp[0].register_forward_hook(lambda m, a, y: seen.append(y.shape[1]))  # type: ignore[union-attr, operator]
    inject(model, PYRA(r=(0, 2), **TOLD))
    halves = inject(TinyBlocks(), PYRA(r=(2, 0), **TOLD))
    halves.load_state_dict(model.state_dict(), strict=False)
    model(x)
    assert seen == [12]
    merge: Any = adapters_of(halves)[0][2]
    h = torch.randn(2, 14, 12)

    class Below:
        def __call__(self, x: Tensor) -> Tensor:
            block: Any = halves.blocks[0]
            x = x + block.attn(block.norm1(x))
            return x + block.mlp(block.norm2(x))

    block: Any = TinyBlocks().blocks[0]
    block.load_state_dict({k: v for k, v in halves.blocks[0].state_dict().items() if "adapters" not in k})  # type: ignore[union-attr, operator]
    half = merge.without("attention", merge.without("mlp", h, Below()), Below())
    torch.testing.assert_close(half, block(h))


def test_at_the_start_it_is_token_merging_alone() -> None:
    model, x = inject(TinyBlocks(), PYRA(r=4, **TOLD)), torch.randn(2, 13, 7)
    y = model(x)
    (merge,) = [a for _, _, a in adapters_of(model) if hasattr(a, "weight_r")]
    nn.init.normal_(merge.weight_r)
    assert torch.equal(model(x), y)
    nn.init.normal_(merge.weight_D)
    assert not torch.allclose(model(x), y)


def test_a_vit_tells_all_that_is_asked() -> None:
    model = backbone("vit")
    inject(model, PYRA(r=1))
    assert [a.r for _, _, a in adapters_of(model) if hasattr(a, "tokens")] == [1, 0]
    assert {a.tokens for _, _, a in adapters_of(model) if hasattr(a, "tokens")} == {5, 4}
    assert {a.heads for _, _, a in adapters_of(model) if hasattr(a, "heads")} == {3}
    assert call("vit", model).shape == (2, 5)


def test_it_trains_beside_lora_and_under_activation_checkpoints() -> None:
    class Checkpointed(TinyBlocks):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x)], dim=1)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]
            x = self.norm(x)
            return self.head(x[:, 1:] + x[:, :1])

    models = [TinyBlocks(), Checkpointed()]
    one, two = torch.randn(2, 13, 7), torch.randn(2, 13, 7)
    for model in models:
        inject(model, LoRA(r=2), name="lora")
        inject(model, PYRA(r=(4, 3), **TOLD), name="pyra")
        moved(model)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        (model(one).square().mean() + model(two).sin().mean()).backward()
    for (path, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if p.requires_grad:
            assert p.grad is not None
            assert p.grad.any()
            torch.testing.assert_close(q.grad, p.grad, msg=path)


def test_another_number_of_tokens_is_refused() -> None:
    model = inject(TinyBlocks(), PYRA(r=2, **TOLD))
    with pytest.raises(AdapterError, match=r"PYRA: 'blocks.0' was given \(2, 12, 12\); expected 14 tokens. Say how"):
        model(torch.randn(2, 11, 7))


@pytest.mark.parametrize(
    ("build", "method", "message"),
    [
        (TinyBlocks, PYRA(r=2), r"does not tell its num_patches. Give PYRA\(num_patches="),
        (TinyBlocks, PYRA(r=2, num_patches=13), r"does not tell its num_heads. Give PYRA\(num_heads="),
        (TinyBlocks, PYRA(r=0, **TOLD), r"merges none of 14 tokens. Raise r"),
        (TinyBlocks, PYRA(r=(1, 1, 1), **TOLD), r"r must be one number, or one for each of 2 blocks"),
        (
            lambda: backbone("swin"),
            PYRA(r=2, num_patches=4),
            r"does not begin with a norm of its own before an attention that.*\. Choose",
        ),
        (lambda: backbone("llama"), PYRA(r=2), r"PYRA: .*num_patches"),
    ],
)
def test_what_does_not_suit_is_refused(build: Any, method: PYRA, message: str) -> None:
    with pytest.raises((TargetError, AdapterError), match=message):
        inject(build(), method)
