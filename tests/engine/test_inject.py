"""Injection, switching and unloading leave exactly what they promise; a failed injection leaves nothing."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    SSF,
    BitFit,
    DoRA,
    FullFineTuning,
    LinearProbe,
    LoRA,
    disabled,
    inject,
    set_active,
    set_trainable,
    unload,
)
from lightning_peft.engine import Adapter, AdapterError, Kind, Layer, TargetedMethod, TargetError, adapters_of
from tests.methods.backbones import Tiny, assert_unchanged, moved, snapshot, tiny, trainable


def test_a_default_device_changes_nothing() -> None:
    expected = inject(tiny(), LoRA(r=2)).state_dict()
    base = tiny()
    with torch.device("meta"):  # nothing may be made where no tensor of the model is
        inject(base, LoRA(r=2))
    for key, value in base.state_dict().items():
        assert torch.equal(value, expected[key]), key


class Gate(Adapter):
    """No change of a weight: it acts on what comes out."""

    def __init__(self, target: Any, method: Any) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(target.d_out))

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        return layer(x) * torch.exp(self.gate * layer(x).tanh())


class Gated(TargetedMethod):
    """A method of the tests alone, never registered."""

    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Gate}
    mergeable: ClassVar[bool] = False

    @classmethod
    def examples(cls) -> tuple["Gated", ...]:
        return (cls(),)


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "body": nn.Linear(5, 5), "head": nn.Linear(5, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def attention() -> nn.Module:
    return nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2)})


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.qkv.weight, self.qkv.bias)


REFUSED: list[tuple[Any, Any, dict[str, Any], list[str]]] = [
    (tiny, LoRA(r=2, target_modules="q_porj"), {}, ["LoRA", "'q_porj'", "Did you mean 'q_proj'"]),
    (tiny, LoRA(r=2, target_modules=("q_proj", "zzz")), {}, ["'zzz' matched none of", "q_proj"]),
    (tiny, LoRA(r=2, target_modules="norm"), {}, ["'norm', a LayerNorm", "conv, embedding, linear"]),
    (tiny, LoRA(r=6), {}, ["r=6", "'v_proj' (5 x 11)", "rank_pattern", "clip_rank=True"]),
    (
        tiny,
        LoRA(r=2, rank_pattern={"k_proj": 1}),
        {},
        ["rank_pattern 'k_proj' matched none of the 2 layers to adapt. Did you mean"],
    ),
    (tiny, LoRA(r=2, modules_to_save="haed"), {}, ["'haed' matched none of", "Did you mean 'head'?"]),
    (tiny, LoRA(r=2), {"name": ""}, ["not empty", "got ''"]),
    (tiny, LoRA(r=2), {"name": "a.b"}, ["without '.' or ':'", "got 'a.b'"]),
    (tiny, LoRA(r=2), {"name": "half"}, ["'half' is taken by an attribute of nn.ModuleDict"]),
    (tiny, LoRA(r=2), {"name": "training"}, ["'training' is taken by an attribute of nn.ModuleDict"]),
    (tiny, LoRA(r=2), {"name": "a:b"}, ["got 'a:b'"]),
    (tiny, "lora", {}, ["expected a method", "got 'lora'"]),
    (nn.ReLU, LoRA(r=2), {}, ["ReLU has no parameters"]),
    (tied, LinearProbe(), {}, ["LinearProbe", "'head.weight' is tied to 'embed.weight'", "untie"]),
    (tied, LoRA(r=2, modules_to_save="embed"), {}, ["tied"]),
    (tiny, LinearProbe(modules_to_save=()), {}, ["LinearProbe found nothing to train in Tiny", "name some"]),
    (lambda: nn.Sequential(nn.Linear(3, 2)), LinearProbe(), {}, ["give its name instead of 'output-head'"]),
    (lambda: nn.Sequential(nn.Linear(3, 2, bias=False)), BitFit(modules_to_save=()), {}, ["create_missing=True"]),
    (attention, LoRA(r=2, dropout=0.1), {}, ["MultiheadAttention reads", "set dropout=0", "exclude_modules"]),
    (attention, LoRA(r=2, dropout=0.1, target_modules="out_proj"), {}, ["out_proj", "set dropout=0"]),
    (Reading, LoRA(r=2, dropout=0.1), {}, ["'qkv'", "Reading reads", "set dropout=0"]),
    (Reading, Gated(), {}, ["Gate cannot act on 'qkv'", "Reading reads", "not a change of weights"]),
    (attention, Gated(), {}, ["Gate cannot act on", "MultiheadAttention reads"]),
    (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(6, 2, kdim=3)}), SSF(modules_to_save=()), {}, ["no bias"]),
]


@pytest.mark.parametrize(("build", "method", "options", "parts"), REFUSED)
def test_a_refused_injection_says_why_and_changes_nothing(
    build: Any, method: Any, options: dict[str, Any], parts: list[str]
) -> None:
    model = build()
    before = snapshot(model)
    with pytest.raises(AdapterError) as error:
        inject(model, method, **options)
    for part in parts:
        assert part in str(error.value)
    assert_unchanged(model, before)
    assert "_peft" not in model.__dict__


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"r": 2.5}, "r must be an integer >= 1, got 2.5"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\] must be an integer >= 1, got -1"),
        ({"alpha": 0.0}, "alpha must be a number > 0, got 0.0"),
        ({"alpha": float("nan")}, "alpha must be a number > 0, got nan"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be a number in \[0, 1\), got -0.1"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments: dict[str, Any], parts: str) -> None:
    with pytest.raises(AdapterError, match=f"LoRA: {parts}"):
        LoRA(**arguments)
    with pytest.raises(AdapterError, match=f"DoRA: {parts}"):
        DoRA(**arguments)


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"expected a torch.nn.Module to adapt, got dict"):
        inject({}, LoRA())  # type: ignore[type-var]


def test_a_name_belongs_to_one_method() -> None:
    layers = ("q_proj", "v_proj")  # the same in both, so of no interest
    model = inject(tiny(), LoRA(r=2, target_modules=layers))
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"'default' is taken by LoRA\(r=2\); asked for now: LoRA\(r=3\)\."):
        inject(model, LoRA(r=3, target_modules=layers))
    with pytest.raises(AdapterError, match=r"is taken by LoRA\(target_modules=.*\); asked for now: LinearProbe\(\)\."):
        inject(model, LinearProbe())
    assert_unchanged(model, before)


def test_a_parameter_is_trained_in_place_once() -> None:
    model = inject(tiny(), LoRA(r=2, modules_to_save="head"))
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"LinearProbe: 'head.weight' is trained in place by adapter 'default'"):
        inject(model, LinearProbe(), name="second")
    assert_unchanged(model, before)


def test_two_adapters_with_a_head_each_take_turns() -> None:
    model, x = tiny(), torch.randn(3, 7)
    base = model(x)
    answers = {}
    for name in ("a", "b"):
        inject(model, LoRA(r=2, modules_to_save="head"), name)
        assert torch.equal(model(x), base), "the second starts from the base, not from the first"
        set_trainable(model, name)
        answers[name] = moved(model)(x)
        set_active(model, ())
    for name in ("b", "a", "b"):
        set_active(model, name)
        assert torch.equal(model(x), answers[name])
    before = model.head.weight.clone()
    with pytest.raises(AdapterError, match=r"'head\.weight' is trained in place by several of 'a', 'b'"):
        set_active(model, ("a", "b"))
    assert torch.equal(model.head.weight, before)
    set_trainable(model, "a")
    assert model.head.weight.requires_grad
    unload(model, "a")
    assert torch.equal(model(x), answers["b"])
    set_active(model, ())
    assert torch.equal(model(x), base)


def test_part_of_an_adapted_model_is_refused() -> None:
    model = nn.Sequential(tiny())
    inject(model[0], LoRA(r=2))
    with pytest.raises(AdapterError, match="the submodule '0' was adapted before"):
        inject(model, LoRA(r=2), name="second")


@pytest.mark.parametrize(
    "verb", [lambda m: set_active(m, "x"), lambda m: set_trainable(m, "x"), lambda m: unload(m, "x")]
)
def test_an_unknown_adapter_name_is_answered_with_the_known(verb: Any) -> None:
    model = inject(tiny(), LoRA(r=2), name="first")
    with pytest.raises(AdapterError, match="there is no adapter 'x'.*There are: first"):
        verb(model)


def test_a_plain_model_has_no_adapters_to_handle() -> None:
    with pytest.raises(AdapterError, match=r"Tiny has no adapters. Call inject\(model, method\)"):
        unload(tiny())
    model = nn.Sequential(inject(tiny(), LoRA(r=2)))
    with pytest.raises(AdapterError, match="Its submodule '0' is the one that was adapted"):
        unload(model)


def test_dropout_is_allowed_where_training_calls_the_layer() -> None:
    # the fused path of evaluation reads these weights, and knows no dropout
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    model = moved(inject(nn.Sequential(layer), LoRA(r=2, dropout=0.5, target_modules=("linear1", "linear2"))))
    x = torch.randn(2, 3, 4)
    assert not torch.equal(model.train()(x), model(x))
    model.eval()
    with torch.no_grad():
        fused = model(x)
    torch.testing.assert_close(fused, model(x))


def test_only_what_the_method_trains_requires_gradients() -> None:
    model = inject(tiny(), LoRA(r=2, target_modules="q_proj", modules_to_save="head"))
    assert list(trainable(model)) == [
        "q_proj.adapters.default.lora_A",
        "q_proj.adapters.default.lora_B",
        "head.weight",
        "head.bias",
    ]


def test_injecting_again_tops_up_what_was_built_since() -> None:
    model = inject(tiny(), LoRA(r=2))
    first = [adapter for _, _, adapter in adapters_of(model)]
    model.add_module("late", nn.Linear(5, 5))
    inject(model, LoRA(r=2))
    found = adapters_of(model)
    assert [path for path, _, _ in found] == ["q_proj", "v_proj", "late"]
    assert [adapter for _, _, adapter in found][:2] == first
    assert not model.late.weight.requires_grad


def test_full_fine_tuning_of_tied_weights_injects_twice() -> None:
    model = inject(tied(), FullFineTuning())
    before = snapshot(model)
    assert_unchanged(inject(model, FullFineTuning()), before)
    assert all(before["flags"].values())


def test_full_fine_tuning_takes_a_module_that_is_used_twice() -> None:
    shared = nn.Linear(3, 3)
    model = inject(nn.Sequential(shared, shared), FullFineTuning())
    assert list(trainable(model)) == ["0.weight", "0.bias"]


def test_the_start_depends_on_seed_and_name_alone() -> None:
    def start(seed: int, *names: str) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        torch.rand(seed + 1)
        model = tiny()
        for name in names:
            inject(model, LoRA(r=2), name=name)
        return {key: p.clone() for key, p in trainable(model).items() if "lora_A" in key}

    one, other = start(0, "a"), start(0, "b", "a")
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not any(torch.equal(value, other[key.replace(".a.", ".b.")]) for key, value in one.items())
    assert not any(torch.equal(value, start(1, "a")[key]) for key, value in one.items())


def test_unload_restores_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = snapshot(model)
    moved(inject(model, LoRA(r=2))).train()(torch.randn(5, 3))
    assert not torch.equal(model[1].running_mean, before["tensors"]["1.running_mean"])
    assert_unchanged(unload(model), before)


def test_unloading_one_name_leaves_the_other() -> None:
    base = tiny()
    model = moved(inject(base, LoRA(r=2, modules_to_save="head"), name="a"))
    moved(inject(model, DoRA(r=2), name="b"))
    x = torch.randn(3, 7)
    set_active(model, "b")
    expected = model(x)
    set_active(model, ["a", "b"])
    unload(model, "a")
    assert torch.equal(model(x), expected)
    assert {key.split(".")[-2] for key in trainable(model)} == {"b"}
    assert_unchanged(unload(model), snapshot(tiny()))


def test_what_was_trained_in_place_is_exchanged_with_the_base() -> None:
    model = moved(inject(tiny(), LinearProbe()))
    trained = model.head.weight.detach().clone()
    with disabled(model):
        assert torch.equal(model.head.weight, tiny().head.weight)
    assert torch.equal(model.head.weight, trained)


def test_disabled_ends_with_an_error_inside() -> None:
    model = moved(inject(tiny(), LoRA(r=2)))
    x = torch.randn(3, 7)
    y = model(x)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(model(x), y)


def test_what_is_trainable_can_be_switched_without_changing_what_acts() -> None:
    model = moved(inject(tiny(), LoRA(r=2, modules_to_save="head"), name="a"))
    moved(inject(model, LoRA(r=3), name="b"))
    x = torch.randn(3, 7)
    y = model(x)
    set_trainable(model, "b")
    assert all(".b." in key for key in trainable(model))
    set_trainable(model, ["a"])
    assert {key for key in trainable(model) if "adapters" not in key} == {"head.weight", "head.bias"}
    assert not any(".b." in key for key in trainable(model))
    assert torch.equal(model(x), y)


def test_a_model_on_the_meta_device_can_be_adapted() -> None:
    with torch.device("meta"):
        model = inject(Tiny(), LoRA(r=2))
    assert all(p.is_meta for p in model.parameters())


def test_an_adapter_that_is_no_change_of_a_weight_acts_when_its_layer_is_called() -> None:
    model = inject(tiny(), Gated())
    x = torch.randn(3, 7)
    assert torch.equal(model(x), tiny()(x))
    assert not torch.allclose(moved(model)(x), tiny()(x))
    assert_unchanged(unload(model), snapshot(tiny()))


def test_normalisation_without_weights_follows_the_precision_of_its_input() -> None:
    base = nn.ModuleDict({"norm": nn.LayerNorm(5, elementwise_affine=False), "other": nn.Linear(2, 2)})
    norm = inject(base, SSF(modules_to_save=()))["norm"]
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert norm(torch.randn(3, 5, dtype=dtype)).dtype == dtype


def test_target_errors_are_value_errors() -> None:
    assert issubclass(TargetError, AdapterError)
    assert issubclass(AdapterError, ValueError)
