"""Attentions are found by their projections, and seen by what they multiply."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine import AdapterError
from lightning_peft.parts.attention import Prepend, Record, Widths, find_attentions, fused, seen_by, widths_of
from tests.methods.backbones import TinyAttention, backbone


@pytest.mark.parametrize(
    ("name", "attentions", "widths"),
    [
        ("encoder", ["layers.0.self_attn", "layers.1.self_attn"], Widths(12, 12, 12, 12)),
        ("vit", ["blocks.0.attn", "blocks.1.attn"], Widths(12, 12, 12, 12)),
        ("llama", ["model.layers.0.self_attn", "model.layers.1.self_attn"], Widths(12, 12, 12, 12)),
        (
            "bert",
            ["bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self"],
            Widths(12, 12, 12, 12),
        ),
        ("gpt2", ["transformer.h.0.attn", "transformer.h.1.attn"], Widths(12, 12, 12, 12)),
        ("dit", ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"], Widths(12, 12, 12, 12)),
        ("resnet", [], None),
        ("mixer", [], None),
    ],
)
def test_attentions_of_libraries_are_found(name: str, attentions: list[str], widths: Widths | None) -> None:
    found = find_attentions(backbone(name))
    assert list(found) == attentions
    assert {widths_of(module) for module in found.values()} == ({widths} if widths else set())


class Grouped(nn.Module):
    """Six heads of queries, two of keys and values."""

    def __init__(self, fused: bool, own: bool) -> None:
        super().__init__()
        sizes = {"num_key_value_heads": 2, "head_dim": 4}
        if own:
            self.num_key_value_heads, self.head_dim = 2, 4
        else:
            self.config = type("Config", (), sizes)
        if fused:
            self.qkv_proj = nn.Linear(10, 24 + 16)
        else:
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(10, 24), nn.Linear(10, 8), nn.Linear(10, 6)


def test_fewer_heads_of_keys_are_told_from_the_projections() -> None:
    assert widths_of(Grouped(False, True)) == Widths(10, 8, 6, 10)
    assert widths_of(Grouped(True, True)) == widths_of(Grouped(True, False)) == Widths(10, 8, 8, 10)
    many = Grouped(True, True)
    many.num_heads, many.num_key_value_heads = 6, None
    assert widths_of(many) == Widths(10, 8, 8, 10)
    many.head_dim = None
    assert widths_of(many) == Widths(10, 40 // 3, 40 // 3, 10)
    cross = nn.ModuleDict({"c_attn": nn.Linear(6, 12), "q_attn": nn.Linear(6, 6)})
    assert widths_of(cross) == Widths(6, 6, 6, 6)
    text = {"to_q": nn.Linear(12, 8), "to_k": nn.Linear(6, 8), "to_v": nn.Linear(6, 8)}
    assert widths_of(nn.ModuleDict(text)) == Widths(12, 8, 8, 6)
    assert widths_of(nn.MultiheadAttention(12, 2, kdim=6, vdim=6)) == Widths(12, 12, 12, 6)
    assert widths_of(nn.ModuleDict({"key": nn.Linear(3, 4)})) is None
    assert widths_of(nn.ModuleDict({"key": nn.ReLU(), "value": nn.ReLU()})) is None


def by_hand(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, closed: Any) -> Tensor:
    """Two heads of keys for four of queries."""
    keys, values = (t.view(3, 2, -1).transpose(0, 1) for t in (keys, values))
    k, v = (torch.cat([t.expand(2, -1, -1, -1), x], dim=2).repeat_interleave(2, 1) for t, x in ((keys, k), (values, v)))
    scores = q @ k.transpose(-1, -2) * 0.3
    scores[..., 3:] += closed
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "row", "causal", "positional"])
def test_a_product_with_keys_and_values_before_its_own(repeated: bool, masks: str) -> None:
    q, k = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(2, 2, 5, 6, dtype=torch.float64)
    v = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    keys, values = torch.randn(3, 12, dtype=torch.float64), torch.randn(3, 14, dtype=torch.float64)
    open_: Any = torch.rand(2, 1, 5, 5) < 0.7
    if masks == "row":  # the same for all keys
        open_ = torch.ones(2, 1, 5, 1, dtype=torch.bool)
    if masks == "causal":
        open_ = torch.ones(5, 5).tril().bool()
    if masks == "none":
        open_ = torch.tensor(True)
    closed = torch.zeros(open_.shape, dtype=torch.float64).masked_fill(~open_, -torch.inf)
    given: dict[str, Any] = {"scale": 0.3, "enable_gqa": not repeated}
    if masks in ("bool", "row", "positional"):
        given["attn_mask"] = open_
    elif masks == "float":
        given["attn_mask"] = closed
    elif masks == "causal":
        given["is_causal"] = True
    more = (x.repeat_interleave(2, 1) if repeated else x for x in (k, v))
    with Prepend(keys, values) as mode:
        if masks == "positional":
            seen = F.scaled_dot_product_attention(q, *more, given.pop("attn_mask"), 0.0, False, **given)
        else:
            seen = F.scaled_dot_product_attention(q, *more, **given)
    torch.testing.assert_close(seen, by_hand(q, k, v, keys, values, closed))
    assert mode.calls == 1


def test_prefixes_under_each_other() -> None:
    q = torch.randn(1, 1, 2, 4)
    outer, inner = torch.randn(2, 4), torch.randn(3, 4)
    with Prepend(outer, outer), Prepend(inner, inner):
        seen = F.scaled_dot_product_attention(q, q, q)
    all_ = torch.cat([outer[None, None], inner[None, None], q], dim=2)
    torch.testing.assert_close(seen, F.scaled_dot_product_attention(q, all_, all_))


def test_keys_and_values_are_recorded_and_nothing_is_multiplied() -> None:
    attention, x, mode = TinyAttention(), torch.randn(2, 5, 12), Record()
    seen_by(mode, attention, lambda: attention(x), "Test")
    _, k, v = attention.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    assert torch.equal(mode.key, k)
    assert torch.equal(mode.value, v)


def test_a_prefix_of_another_width_is_an_error() -> None:
    q = torch.randn(1, 3, 2, 4)
    for width in (10, 8):
        message = rf"a prefix of {width} features .* 3 heads of 4 features. Leave it out"
        with pytest.raises(AdapterError, match=message), Prepend(torch.randn(2, width), torch.randn(2, width)):
            F.scaled_dot_product_attention(q, q, q)


def test_an_attention_that_multiplies_by_itself_is_an_error() -> None:
    table = torch.randn(2, 4)
    with pytest.raises(AdapterError, match="Test: Linear computes its attention without F.scaled_dot"):
        seen_by(Prepend(table, table), nn.Linear(4, 4), lambda: None, "Test")


def test_an_attention_of_timm_is_fused_while_it_is_called() -> None:
    attention = backbone("swin").layers[0].blocks[0].attn
    assert attention.fused_attn is False
    with fused(attention):
        assert attention.fused_attn is True
    assert attention.fused_attn is False
    with pytest.raises(ZeroDivisionError), fused(attention):
        raise ZeroDivisionError
    assert attention.fused_attn is False
