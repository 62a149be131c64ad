"""Layers that another library quantised: they are called, and their codes are never taken for weights."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import (
    PEGO,
    AdapterError,
    BitFit,
    DoRA,
    FullFineTuning,
    LoRA,
    PiSSA,
    QLoRA,
    SaRA,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from lightning_peft.engine import METHODS, MergeError, Method, TargetError, adapters_of, get_method, inject
from lightning_peft.engine.slots import Layer
from lightning_peft.engine.state import fingerprint
from lightning_peft.engine.targets import candidates
from tests.engine.quantised_layers import (
    KINDS,
    AbstractLinear,
    Float8Linear,
    Int8Linear,
    NamelessLinear,
    Swapped,
    quantised,
    whole,
)
from tests.methods.backbones import Tiny, assert_unchanged, moved, snapshot, tiny


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: Any) -> Any:
    return request.param


@pytest.fixture
def base(kind: Any) -> Any:
    return quantised(Tiny().eval(), kind)


def merged(model: Any) -> Any:
    with pytest.warns(UserWarning, match="no longer quantised"):
        return merge(model, dequantize=True)


def test_lora_acts_on_a_layer_that_is_called(base: Any) -> None:
    model, x, z = moved(inject(base, LoRA(r=2, alpha=3.0))), torch.randn(4, 7), torch.randn(4, 11)
    assert [path for path, _, _ in adapters_of(model)] == ["q_proj", "v_proj"]
    adapter = model.q_proj.adapters["default"]
    delta = 3 / 2 * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(model.q_proj(x), x @ (whole(model.q_proj) + delta).T + model.q_proj.bias)
    adapter = model.v_proj.adapters["default"]
    delta = 3 / 2 * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(model.v_proj(z), z @ (whole(model.v_proj) + delta).T)
    model(x).square().sum().backward()
    assert all(p.grad.any() for _, _, a in adapters_of(model) for p in a.parameters())


def test_they_are_found_by_name_and_as_linear_layers(base: Any) -> None:
    assert [t.name for t in candidates(base)] == ["q_proj", "v_proj", "norm", "head"]
    shapes = {t.name: tuple(t.shape) for t in candidates(base) if t.site.kind == "linear"}
    assert shapes == {"q_proj": (11, 7), "v_proj": (5, 11), "head": (3, 5)}
    inject(base, LoRA(r=2, target_modules="v_proj"))
    assert [path for path, _, _ in adapters_of(base)] == ["v_proj"]


def test_a_weight_that_is_computed_from_others_is_not_taken_for_codes() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    assert [t.name for t in candidates(model)] == ["1"]


def test_the_weight_is_read_through_the_layer(base: Any) -> None:
    for target in candidates(base)[:2]:
        layer = Layer(target.module, target.site)
        torch.testing.assert_close(layer.weight, whole(target.module), rtol=1e-6, atol=0)
        bias = target.module.bias
        assert layer.bias is None if bias is None else torch.equal(layer.bias, bias)


def test_what_is_read_is_not_rounded_beside_a_large_bias(base: Any) -> None:
    base.q_proj.bias.detach().fill_(1e6)
    target = candidates(base)[0]
    torch.testing.assert_close(Layer(target.module, target.site).weight, whole(base.q_proj), rtol=1e-6, atol=0)


def test_a_bias_that_cannot_be_found_is_taken_off() -> None:
    class Hidden(NamelessLinear):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear)
            self.shift, self.bias = self.bias, None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.shift

    layer = Hidden(nn.Linear(3, 4))
    target = candidates(nn.Sequential(layer))[0]
    torch.testing.assert_close(Layer(layer, target.site).weight, layer.whole())
    x, model = torch.randn(2, 3), moved(inject(nn.Sequential(layer), LoRA(r=2)))
    y = model(x)
    torch.testing.assert_close(merged(model)(x), y)
    assert torch.equal(model[0].bias, layer.shift)


@pytest.mark.parametrize("method", [DoRA(r=2), PiSSA(r=2)], ids=["dora", "pissa"])
def test_a_method_that_starts_at_the_weight_computes_the_same_as_on_the_plain_layer(base: Any, method: Method) -> None:
    plain = copy.deepcopy(base)
    for name in ("q_proj", "v_proj"):
        layer = getattr(plain, name)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.data = whole(layer).detach()
        linear.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
        setattr(plain, name, linear)
    one, other = moved(inject(base, method)), inject(plain, method)
    theirs = {key: value for key, value in one.state_dict().items() if "adapters" in key}
    assert theirs
    other.load_state_dict(theirs, strict=False)
    x = torch.randn(4, 7)
    torch.testing.assert_close(one(x), other(x))
    one(x).square().sum().backward(), other(x).square().sum().backward()
    for (_, _, a), (_, _, b) in zip(adapters_of(one), adapters_of(other), strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_codes_are_not_merged_unless_somebody_says_so(base: Any) -> None:
    model = moved(inject(base, LoRA(r=2)))
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"Linear keeps its weight in .*codes that only .*dequantize=True\) puts a"):
        merge(model)
    assert_unchanged(model, before)
    unload(model)


def test_a_merged_layer_is_a_plain_one_that_computes_the_same(base: Any, kind: Any) -> None:
    model, x = moved(inject(base, LoRA(r=2))), torch.randn(4, 7)
    expected = model(x)
    with pytest.warns(
        UserWarning, match=r"merge: q_proj and 1 more are in torch.float32 now .*: 572 bytes, which were "
    ):
        merge(model, dequantize=True)
    assert [type(layer) for layer in (model.q_proj, model.v_proj)] == [nn.Linear, nn.Linear]
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    torch.testing.assert_close(model(x), expected)
    assert set(model.state_dict()) == set(Tiny().state_dict())
    assert not model.q_proj.weight.requires_grad, "it was frozen before"
    assert model.v_proj.bias is None


def test_unmerging_puts_the_layers_back(base: Any) -> None:
    model, x = moved(inject(base, LoRA(r=2))), torch.randn(4, 7)
    layers, before, y = [model.q_proj, model.v_proj], snapshot(model), model(x)
    parameters = [id(p) for p in model.parameters()]
    unmerge(merged(model))
    assert [model.q_proj, model.v_proj] == layers
    assert [id(p) for p in model.parameters()] == parameters
    assert_unchanged(model, before)
    assert torch.equal(model(x), y)
    unload(merged(model))
    assert not any("Adapted" in type(m).__name__ for m in model.modules())
    assert model.q_proj is layers[0]


def test_a_layer_that_is_used_in_two_places_stays_one(kind: Any) -> None:
    shared = kind(nn.Linear(6, 6)).eval()
    model = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared)).eval()
    x = torch.randn(4, 6)
    y = moved(inject(model, LoRA(r=2)))(x)
    merged(model)
    assert model[0] is model[2][0]
    torch.testing.assert_close(model(x), y)
    unmerge(model)
    assert model[0] is model[2][0] is shared


def test_a_merge_of_codes_and_plain_layers_that_is_refused_changes_neither(kind: Any) -> None:
    model = moved(inject(nn.Sequential(nn.Linear(3, 4), kind(nn.Linear(4, 5))).eval(), LoRA(r=2)))
    before = snapshot(model)
    with pytest.raises(MergeError, match="dequantize=True"):
        merge(model)
    assert_unchanged(model, before)
    x = torch.randn(2, 3)
    y = model(x)
    torch.testing.assert_close(merged(model)(x), y)


def test_a_merged_layer_has_the_dtype_of_the_model_and_keeps_hooks(kind: Any) -> None:
    model, seen = quantised(Tiny().eval(), kind), []
    for module in (model.norm, model.head):
        module.bfloat16()
    moved(inject(model, LoRA(r=2, target_modules="q_proj")))
    model.q_proj.register_forward_hook(lambda *_: seen.append(1))
    merged(model)
    assert model.q_proj.weight.dtype == model.q_proj.bias.dtype == torch.bfloat16
    model.q_proj(torch.randn(1, 7).bfloat16())
    assert seen == [1]


def test_a_model_that_is_the_layer_itself_is_not_merged(kind: Any) -> None:
    model = moved(inject(kind(nn.Linear(3, 4)), LoRA(r=2)))
    with pytest.raises(
        MergeError, match=r"that layer itself, so no other can take its place. Put it into nn.Sequential"
    ):
        merge(model, dequantize=True)


def test_a_dequantised_model_of_transformers_does_not_say_that_it_is_quantised(kind: Any) -> None:
    class Saved(Tiny):
        def save_pretrained(self) -> str:
            return "saved"

    model = merged(moved(inject(quantised(Saved().eval(), kind), LoRA(r=2))))
    with pytest.raises(AdapterError, match=r"'v_proj' was dequantised, .*Load the base in full precision, then"):
        model.save_pretrained()
    unload(model)
    assert model.save_pretrained() == "saved"


def test_an_adapter_loads_into_the_same_base_and_goes_on(base: Any, kind: Any, tmp_path: Path) -> None:
    fresh, x = copy.deepcopy(base), torch.randn(4, 7)
    model = moved(inject(base, LoRA(r=2)))
    first = fingerprint(model)
    loaded = load_adapter(fresh, save_adapter(model, tmp_path))
    assert torch.equal(loaded(x), model(x))
    assert fingerprint(unmerge(merged(loaded))) == first
    y = loaded(x)
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
    loaded(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(loaded(x), y)
    torch.manual_seed(1)
    with pytest.raises(AdapterError, match="the same model with other weights"):
        load_adapter(quantised(Tiny().eval(), kind), tmp_path)


def test_the_codes_tell_one_base_from_another(kind: Any, tmp_path: Path) -> None:
    model = Tiny().eval()
    other = copy.deepcopy(model)
    nn.init.ones_(other.q_proj.weight)
    prints = [fingerprint(inject(quantised(m, kind), LoRA(r=2))) for m in (model, other)]
    assert prints[0]["structure"] == prints[1]["structure"]
    # where codes are buffers, what else the model has must tell
    assert (prints[0]["values"] == prints[1]["values"]) == (kind is NamelessLinear)


def test_codes_that_change_their_form_stay_the_same_base() -> None:
    model = inject(quantised(Tiny().eval(), Int8Linear), LoRA(r=2))
    before = fingerprint(model)
    model.q_proj.weight.data = model.q_proj.weight.data.view(-1, 1).flip(0)
    assert fingerprint(model) == before


def test_a_layer_that_takes_another_form_to_be_evaluated_is_saved_before_it_trains() -> None:
    class Packs(Int8Linear):
        packed = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.packed = self.packed or not (self.training or x.requires_grad)
            return super().forward(x)

        def _save_to_state_dict(self, *args: Any) -> None:
            self.packed = False
            super()._save_to_state_dict(*args)

    layer = Packs(nn.Linear(3, 4)).eval()
    layer(torch.randn(1, 3))
    assert layer.packed
    model = inject(nn.Sequential(layer), DoRA(r=2))
    target = candidates(model)[0]
    assert Layer(layer, target.site).weight.shape == (4, 3)
    assert not layer.packed, "nor does it pack while its weight is read"
    model(torch.randn(1, 3))
    assert layer.packed
    model.train()
    assert not layer.packed


def test_copies_and_pickles_compute_the_same(base: Any, kind: Any) -> None:
    model, x = moved(inject(base, LoRA(r=2))), torch.randn(4, 7)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    if kind not in (Float8Linear, Swapped):  # whose tensors cannot be pickled
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_a_state_dict_holds_the_adapters_and_gives_them_back(base: Any) -> None:
    fresh, x = copy.deepcopy(base), torch.randn(4, 7)
    model = moved(inject(base, LoRA(r=2)))
    state = model.state_dict()
    adapters = {key: value for key, value in state.items() if ".adapters." in key}
    assert len(adapters) == 4
    assert len(model.q_proj.state_dict()) == len([key for key in state if key.startswith("q_proj.")])
    inject(fresh, LoRA(r=2)).load_state_dict(adapters, strict=False)
    assert torch.equal(fresh(x), model(x))


def test_codes_are_not_copied_at_injection(kind: Any) -> None:
    model = inject(quantised(Tiny().eval(), kind), LoRA(r=2))
    assert model.__dict__["_peft"].buffers == {}


def test_codes_are_not_trained_in_place(base: Any) -> None:
    before = snapshot(base)
    if isinstance(base.q_proj, NamelessLinear):  # which has no parameters
        inject(base, FullFineTuning())
        assert {n.split(".")[0] for n, p in base.named_parameters() if p.requires_grad} == {"norm", "head"}
        return
    for method in (FullFineTuning(), LoRA(r=2, target_modules="v_proj", modules_to_save="q_proj")):
        with pytest.raises(TargetError, match=r"'q_proj\.weight' is kept in few bits, which no gradient can change"):
            inject(base, method)
        assert_unchanged(base, before)
    inject(base, BitFit())  # which trains no weight


@pytest.mark.parametrize("method", [QLoRA(r=2), SaRA(target_modules="q_proj")], ids=["qlora", "sara"])
def test_what_would_take_the_weight_itself_is_refused(base: Any, method: Method) -> None:
    before = snapshot(base)
    with pytest.raises(TargetError, match="q_proj.* (codes|quantised).*LoRA"):
        inject(base, method)
    assert_unchanged(base, before)


def test_a_reader_of_codes_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = Int8Linear(nn.Linear(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.proj.weight.float().T

    with pytest.raises(TargetError, match=r"Reads reads that weight .*in torch.int8 codes.*such as LoRA"):
        inject(Reads(), LoRA(r=2))


def test_a_penalty_on_the_weight_sees_numbers_and_not_codes(base: Any) -> None:
    method = PEGO(r=1, n=1, target_modules="q_proj")
    model = moved(inject(base, method))
    from lightning_peft.engine.training import Training

    found = method.penalties(Training(model, "default", None, 0))["preserve"]
    adapter, weight = model.q_proj.adapters["default"], whole(model.q_proj)
    product = adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(found, method.weight * (weight @ product.T).abs().sum())


def test_a_module_below_an_abstract_class_gets_its_own_class_back() -> None:
    layer = AbstractLinear(nn.Linear(3, 4))
    model = nn.Sequential(layer)
    inject(model, LoRA(r=2))
    assert isinstance(layer, AbstractLinear)
    assert type(layer).__name__ == "AdaptedAbstractLinear"
    unload(model)
    assert type(layer) is AbstractLinear


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
        # what wants parameters, or an nn.Linear, does not find them in a layer that is neither
        assert re.search("codes|quantised|in few bits", refusal) or kind is NamelessLinear
        assert_unchanged(model, before)
        return
    if method.identity_at_init:
        torch.testing.assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)
    moved(model)
    assert not torch.allclose(model(x), base(x), atol=1e-4)


def test_the_tuners_of_hf_peft_do_not_merge_into_codes() -> None:
    """What their own code would write there is codes again, and not what the model answered."""
    peft = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    for kind in KINDS[:2]:
        model = moved(inject(quantised(Tiny().eval(), kind), get_method("hfpeft")(config=peft)))
        before = snapshot(model)
        with pytest.raises(MergeError, match="in torch.u?int8 codes .* LoRA of lightning_peft merges there"):
            merge(model, dequantize=True)
        assert_unchanged(model, before)
