"""Layers that another library quantised: they are called, and their codes are never taken for weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import BitFit, DoRA, FullFineTuning, LoRA, merge, unload
from lightning_peft.engine import METHODS, AdapterError, MergeError, Method, TargetError, adapters_of, inject
from tests.methods.backbones import Tiny, assert_unchanged, moved, snapshot, tiny


class Int8Linear(nn.Linear):
    """As of bitsandbytes in 8 bits: codes of the shape of the weight, and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        absmax = linear.weight.detach().abs().amax(1, keepdim=True)
        self.weight = nn.Parameter(self.codes(linear.weight.detach() / absmax), requires_grad=False)
        self.register_buffer("absmax", absmax)
        self.bias = linear.bias

    def codes(self, unit: Tensor) -> Tensor:
        return (unit * 127).round().to(torch.int8)

    def whole(self) -> Tensor:
        return self.weight.view(self.out_features, self.in_features) / 127 * self.absmax

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.whole(), self.bias)


class FlatLinear(Int8Linear):
    """As of bitsandbytes in 4 bits: a column of bytes whose shape says nothing."""

    def codes(self, unit: Tensor) -> Tensor:
        return ((unit * 127).round() + 127).to(torch.uint8).view(-1, 1)

    def whole(self) -> Tensor:
        return (self.weight.view(self.out_features, self.in_features).float() - 127) / 127 * self.absmax


KINDS = [Int8Linear, FlatLinear]


@pytest.fixture(params=KINDS)
def base(request: Any) -> Tiny:
    return quantised(Tiny().eval(), request.param)  # type: ignore[return-value]


def quantised(model: nn.Module, kind: Any) -> nn.Module:
    """``model`` with all linear layers but the head in codes."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and name != "head":
                setattr(parent, name, kind(child))
    return model


def test_lora_acts_on_a_layer_that_is_called(base: Tiny) -> None:
    model, x, z = moved(inject(base, LoRA(r=2, alpha=3.0))), torch.randn(4, 7), torch.randn(4, 11)
    assert [path for path, _, _ in adapters_of(model)] == ["q_proj", "v_proj"]
    adapter = model.q_proj.adapters["default"]
    delta = 3 / 2 * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(model.q_proj(x), x @ (model.q_proj.whole() + delta).T + model.q_proj.bias)
    adapter = model.v_proj.adapters["default"]
    delta = 3 / 2 * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(model.v_proj(z), z @ (model.v_proj.whole() + delta).T)
    model(x).square().sum().backward()
    assert all(p.grad.any() for _, _, a in adapters_of(model) for p in a.parameters())


def test_codes_are_not_merged(base: Tiny) -> None:
    model = moved(inject(base, LoRA(r=2)))
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"Linear keeps its weight in torch\.u?int8 codes that only its own forward"):
        merge(model)
    assert_unchanged(model, before)
    unload(model)


def test_a_start_at_codes_is_refused(base: Tiny) -> None:
    before = snapshot(base)
    with pytest.raises(TargetError, match=r"on 'q_proj': .*Linear keeps its weight in .* codes.*such as LoRA"):
        inject(base, DoRA(r=2))
    assert_unchanged(base, before)


def test_codes_are_not_trained_in_place(base: Tiny) -> None:
    before = snapshot(base)
    for method in (FullFineTuning(), LoRA(r=2, target_modules="v_proj", modules_to_save="q_proj")):
        with pytest.raises(TargetError, match=r"'q_proj\.weight' is kept in few bits, which no gradient can change"):
            inject(base, method)
        assert_unchanged(base, before)
    inject(base, BitFit())  # which trains no weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [cls.examples()[0] for cls in METHODS.values()], ids=METHODS.keys())
def test_every_method_calls_the_layer_or_is_refused(kind: Any, method: Method) -> None:
    base = quantised(tiny(method), kind)
    model, before, x = copy.deepcopy(base), snapshot(base), torch.randn(2, 13, 7)
    try:
        inject(model, method)
    except AdapterError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "codes" in refusal or "in few bits" in refusal
        assert_unchanged(model, before)
        return
    if method.identity_at_init:
        torch.testing.assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)
    moved(model)
    assert not torch.allclose(model(x), base(x), atol=1e-4)
