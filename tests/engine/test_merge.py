"""Merging folds exactly what acts into plain weights, and can be undone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import SSF, BitFit, DoRA, LinearProbe, LoRA, inject, merge, set_active, unload, unmerge
from lightning_peft.engine import AdapterError, MergeError, adapters_of
from tests.engine.test_inject import Gated
from tests.methods.backbones import assert_unchanged, moved, snapshot, tiny


def test_what_merges_is_what_acts() -> None:
    model = moved(inject(tiny(), LoRA(r=2), name="a"))
    moved(inject(model, LoRA(r=3), name="b"))
    x = torch.randn(3, 7)
    set_active(model, "b")
    expected, before = model(x), snapshot(model)
    torch.testing.assert_close(merge(model)(x), expected)
    assert_unchanged(unmerge(model), before)
    assert torch.equal(model(x), expected)


def test_unmerge_restores_half_precision_bit_for_bit() -> None:
    model = moved(inject(tiny().to(torch.bfloat16), LoRA(r=2)))
    before = snapshot(model)
    assert_unchanged(unmerge(merge(model)), before)


def test_merging_in_half_precision_rounds_once() -> None:
    model = moved(inject(nn.Sequential(nn.Linear(7, 5)).to(torch.bfloat16), LoRA(r=2, alpha=6.0)))
    (_, layer, adapter), *_ = adapters_of(model)
    exact = layer.weight.double() + 3.0 * adapter.lora_B.double() @ adapter.lora_A.double()
    # one rounding of a value that float32 has computed
    assert torch.equal(merge(model)[0].weight, exact.float().to(torch.bfloat16))


def test_merged_weights_have_the_layout_of_the_base() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Embedding(7, 4)).to(memory_format=torch.channels_last)
    merge(moved(inject(model, LoRA(r=2, target_modules="all-layers"))))
    assert model[1].weight.is_contiguous()
    assert model[0].weight.dtype == torch.float32


def test_a_tied_weight_is_untied_and_the_other_end_stays() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    ids, h = torch.tensor([1, 4]), torch.randn(2, 5)
    embedded = model["embed"](ids)
    moved(inject(model, LoRA(r=2, target_modules="head")))
    expected = model["head"](h)
    with pytest.warns(UserWarning, match="merge: head.weight was tied to embed.weight; it is untied now"):
        merge(model)
    torch.testing.assert_close(model["head"](h), expected)
    assert torch.equal(model["embed"](ids), embedded)
    assert unmerge(model)["head"].weight is model["embed"].weight


def test_an_adapter_on_each_end_of_a_tie_merges_into_each() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    ids, h = torch.tensor([1, 4]), torch.randn(2, 5)
    moved(inject(model, LoRA(r=2, target_modules=("head", "embed"))))
    expected = model["embed"](ids), model["head"](h)
    with pytest.warns(UserWarning, match="is untied now"):
        merge(model)
    torch.testing.assert_close((model["embed"](ids), model["head"](h)), expected)


def test_a_module_used_twice_merges_in_silence() -> None:
    shared = nn.Linear(4, 4)
    model = moved(inject(nn.Sequential(shared, nn.Tanh(), shared), LoRA(r=2)))
    x = torch.randn(3, 4)
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected)
    assert model[0] is model[2]


def test_without_the_base_nothing_can_be_undone() -> None:
    model = merge(moved(inject(tiny(), LoRA(r=2))), keep_base=False)
    assert "_peft" not in model.__dict__
    with pytest.raises(MergeError, match=r"unmerge: nothing is merged.*keep_base=False"):
        unmerge(model)
    inject(model, LoRA(r=2))


def test_flags_of_the_base_are_those_before_injection() -> None:
    base = {name: p.requires_grad for name, p in tiny().named_parameters()}
    model = merge(moved(inject(tiny(), LoRA(r=2))))
    merged = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: flag for name, flag in merged.items() if name not in ("q_proj.weight", "v_proj.weight")} == {
        name: flag for name, flag in base.items() if name not in ("q_proj.weight", "v_proj.weight")
    }


def test_unload_of_a_merged_model_gives_the_base_back() -> None:
    model = merge(moved(inject(tiny(), DoRA(r=2, modules_to_save="head"))))
    assert_unchanged(unload(model), snapshot(tiny()))


def test_merging_twice_is_refused() -> None:
    model = merge(moved(inject(tiny(), LoRA(r=2))))
    with pytest.raises(MergeError, match="merged already"):
        merge(model)
    with pytest.raises(AdapterError, match=r"unmerge\(model\) before injecting more"):
        inject(model, LoRA(r=2), name="second")
    with pytest.raises(MergeError, match="unmerge: nothing is merged"):
        unmerge(tiny())


def test_an_adapter_that_is_no_change_of_a_weight_is_refused_by_name() -> None:
    model = moved(inject(tiny(), LoRA(r=2), name="a"))
    moved(inject(model, Gated(), name="b"))
    before = snapshot(model)
    with pytest.raises(
        MergeError, match=r"on 'q_proj' \(and 1 more\) cannot be merged: Gate is not a change of weights"
    ):
        merge(model)
    assert_unchanged(model, before)
    set_active(model, "a")
    merge(model)


@pytest.mark.parametrize("method", [LoRA(r=2), LinearProbe()])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_adapter_is_not_merged(method: LoRA | LinearProbe, value: float) -> None:
    model = inject(tiny(), method)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = value
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(MergeError, match=r"(lora_A|head.weight) holds NaN or infinite values.*earlier checkpoint"):
        merge(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalisation_without_weights_gets_some_in_the_precision_of_the_model(dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5, elementwise_affine=False)).to(dtype)
    model = moved(inject(base, SSF(modules_to_save=())))
    x = torch.randn(3, 5, dtype=dtype)
    expected, before = model(x), snapshot(model)
    # two roundings to 8 bits in bfloat16
    torch.testing.assert_close(merge(model)(x), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2)
    assert model[1].weight.dtype == model[1].bias.dtype == dtype
    assert_unchanged(unmerge(model), before)


@pytest.mark.parametrize("bias", [True, False])
def test_normalisation_over_several_axes_is_scaled_along_the_first(bias: bool) -> None:
    base = nn.Sequential(nn.LayerNorm((3, 3), bias=bias)).double()  # as wide as it is high: an axis could be mistaken
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    y = base(x)
    model = moved(inject(base, SSF(modules_to_save=())))
    (_, _, adapter), *_ = adapters_of(model)
    expected = y * adapter.scale[:, None] + adapter.shift[:, None]
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(merge(model)(x), expected)


def test_unmerge_follows_a_model_that_was_moved() -> None:
    model = merge(moved(inject(tiny(), LoRA(r=2)))).to("meta")
    unmerge(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_fused_activation_of_a_normalisation_stays_after_scale_and_shift() -> None:
    from timm.layers import BatchNormAct2d, LayerNorm2d

    base = nn.Sequential(LayerNorm2d(4), BatchNormAct2d(4)).double().eval()
    plain, x = copy.deepcopy(base), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    model = moved(inject(base, SSF(modules_to_save=())))
    by_path = {path: adapter for path, _, adapter in adapters_of(model)}
    with torch.no_grad():  # scale * op(x) + shift before the activation
        for layer, path in zip(plain, "01", strict=True):
            layer.bias.copy_(layer.bias * by_path[path].scale + by_path[path].shift)
            layer.weight.copy_(layer.weight * by_path[path].scale)
    expected = plain(x)
    assert expected.min() == 0
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merge(model)(x), expected, rtol=1e-10, atol=1e-10)


def test_adapters_that_do_not_act_are_left_out_and_come_back() -> None:
    model, x = tiny(), torch.randn(3, 7)
    inject(model, LoRA(r=2, target_modules="q_proj"), "a")
    moved(inject(model, LoRA(r=2, target_modules="v_proj"), "b"))
    both = model(x)
    set_active(model, "a")
    only_a, before = model(x), snapshot(model)
    torch.testing.assert_close(merge(model)(x), only_a)
    unmerge(model)
    assert_unchanged(model, before)
    assert torch.equal(model(x), only_a)
    set_active(model, ("a", "b"))
    assert torch.equal(model(x), both)


class Saved(nn.Module):
    """As the models of transformers and diffusers, it writes its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))

    def save_pretrained(self) -> list[str]:
        return list(self.state_dict())


def test_save_pretrained_is_refused_while_adapters_are_inside() -> None:
    keys = Saved().save_pretrained()
    model = Saved()
    whole = nn.ModuleDict({"unet": model, "vae": Saved()})
    inject(whole, LoRA(r=2, target_modules=r"unet.*0"))
    inject(whole, LoRA(r=1, target_modules=r"unet.*1"), name="other")
    assert whole["vae"].save_pretrained() == keys

    def refused(module: Any) -> None:
        with pytest.raises(AdapterError, match=r"that from_pretrained passes over. merge\(model\) first, or write"):
            module.save_pretrained()

    refused(model)
    refused(copy.deepcopy(whole)["unet"])
    refused(pickle.loads(pickle.dumps(whole))["unet"])
    merge(whole)
    assert model.save_pretrained() == keys
    refused(unmerge(whole)["unet"])
    unload(whole, "other")
    refused(model)
    unload(whole)
    assert model.save_pretrained() == keys
    assert "save_pretrained" not in vars(model)
    assert (
        inject(model, BitFit(modules_to_save=())).save_pretrained() == keys
    )  # trained in place: these are its weights


def test_save_pretrained_of_a_merged_model_with_more_weights_is_refused() -> None:
    model = inject(Saved(), SSF(modules_to_save=()))
    merge(model)
    with pytest.raises(AdapterError, match=r"'inner.0' has a bias that the model does not have .* with save_adapter"):
        model.save_pretrained()
    unload(model)
    assert model.save_pretrained() == Saved().save_pretrained()
