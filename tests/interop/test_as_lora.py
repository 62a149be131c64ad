"""Changes of weights as plain LoRA, the same or the nearest of a rank: here, and in HF PEFT."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import (
    SSF,
    BitFit,
    DoRA,
    FullFineTuning,
    HoulsbyAdapter,
    LinearProbe,
    LoHa,
    LoKr,
    LoRA,
    PaCA,
    PiSSA,
    disabled,
    inject,
    load_adapter,
    save_adapter,
    set_active,
)
from lightning_peft.engine import METHODS, AdapterError, AdapterFileError, adapters_of
from lightning_peft.interop import read_adapter
from tests.methods.backbones import assert_unchanged, backbone, call, kept, moved, snapshot, suited, tiny


def trained(method: Any, name: str = "llama") -> nn.Module:
    return moved(inject(backbone(name), method))


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_pissa_as_lora_of_twice_the_rank_answers_the_same(name: str, tmp_path: Path) -> None:
    model = trained(PiSSA(r=2, alpha=4.0), name)
    folder = save_adapter(model, tmp_path, as_lora=True)
    loaded = load_adapter(backbone(name), folder)
    assert {len(adapter.lora_A) for _, _, adapter in adapters_of(loaded)} == {4}
    torch.testing.assert_close(call(name, loaded), call(name, model), rtol=1e-5, atol=1e-6)


def test_hf_peft_reads_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(PiSSA(r=2, rank_pattern={"q_proj": 1}))
    save_adapter(model, tmp_path, as_lora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(backbone("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(call("llama", theirs), call("llama", model), rtol=1e-5, atol=1e-5)


def test_more_factors_than_directions_are_made_fewer(tmp_path: Path) -> None:
    model = moved(inject(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), PiSSA(r=2, target_modules="all-layers")))
    folder = save_adapter(model, tmp_path, as_lora=True)
    loaded = load_adapter(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), folder, allow_other_base=True)
    assert [len(adapter.lora_A) for _, _, adapter in adapters_of(loaded)] == [3, 2]
    for (_, _, ours), (_, _, plain) in zip(adapters_of(model), adapters_of(loaded), strict=True):
        torch.testing.assert_close(plain.delta(), ours.delta(), rtol=1e-5, atol=1e-6)


def test_one_scaling_is_enough_to_read_it(tmp_path: Path) -> None:
    """Servers read ``lora_alpha / r`` of the config, and pass over what single layers have."""
    method = LoRA(r=2, rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 1.0}, target_modules=("q_proj", "v_proj"))
    model, x = moved(inject(tiny(), method)), torch.randn(3, 7)
    save_adapter(model, tmp_path, as_lora=True)
    _, config, tensors = read_adapter(tmp_path)
    served = tiny()
    for name in method.target_modules:
        down, up = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        served.get_submodule(name).weight.data += config["lora_alpha"] / config["r"] * up @ down
    torch.testing.assert_close(served(x), model(x))


def test_a_plain_lora_stays_what_it_is(tmp_path: Path) -> None:
    plain = trained(LoRA(r=2))
    again = load_adapter(backbone("llama"), save_adapter(plain, tmp_path, as_lora=True))
    torch.testing.assert_close(call("llama", again), call("llama", plain), rtol=1e-5, atol=1e-6)


def peft_model(name: str, folder: Path) -> nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(backbone(name), str(folder)).eval()


FULL = 1000  # more than any layer of the small models has room for


@pytest.mark.parametrize("name", ["gpt2", "convnet", "encoder"])
@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS.keys())
@pytest.mark.filterwarnings("ignore:.* is written in our own format:UserWarning")
def test_of_full_rank_every_change_of_weights_is_the_same_function(cls: Any, name: str, tmp_path: Path) -> None:
    method = suited(cls, name)
    if isinstance(method, AdapterError):
        return
    model = moved(inject(backbone(name), method))
    before = snapshot(model)
    refusal = None
    try:
        save_adapter(model, tmp_path / "new", as_lora=FULL)
    except AdapterFileError as error:
        refusal = str(error)
    assert_unchanged(model, before)
    if refusal is not None:
        assert re.search(r"\. Save (it|the)", refusal), "what to do"
        assert not (tmp_path / "new").exists()
        # what is a change of weights is refused for a bias, a norm, or a base that is lost, and for nothing else
        reasons = ("changes the bias", "norm layers", "beside weights", "not kept", "nothing but weights")
        assert not method.mergeable or any(reason in refusal for reason in reasons)
        return
    base = kept(backbone(name), method)
    loaded = load_adapter(base, tmp_path / "new", allow_other_base=cls.changes_base)
    # all is computed in float64
    torch.testing.assert_close(call(name, loaded), call(name, model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "method",
    [LoHa(r=2), LoKr(r=2), DoRA(r=2), PiSSA(r=2), PaCA(r=4)],
    ids=["loha", "lokr", "dora", "pissa", "paca"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_rank_gives_the_best_approximation_and_says_its_error(method: Any, name: str, tmp_path: Path) -> None:
    model = trained(method, name)
    with pytest.warns(UserWarning, match=r"as_lora=3 leaves out a part of the change that .* made: \d") as caught:
        save_adapter(model, tmp_path, as_lora=3)
    loaded = load_adapter(backbone(name), tmp_path)
    errors = {}
    for (path, module, ours), (_, _, plain) in zip(adapters_of(model), adapters_of(loaded), strict=True):
        weight = ours.site.get(module)[0].double()
        change = (ours.merged(weight, None)[0] - weight).detach()
        U, values, Vh = torch.linalg.svd(change)
        best = (U[:, :3] * values[:3]) @ Vh[:3]
        assert plain.lora_A.shape[0] == 3
        torch.testing.assert_close(plain.delta(), best, rtol=1e-9, atol=1e-9)
        errors[path] = float(values[3:].norm() / values.norm())
    facts, config, _ = read_adapter(tmp_path)
    assert facts is not None
    assert facts["as_lora"] == {"method": method.name, "relative_error": pytest.approx(max(errors.values()), rel=1e-6)}
    said = str(caught[0].message)
    assert repr(max(errors, key=lambda path: errors[path])) in said
    assert f"{max(errors.values()):.2g} of its" in said
    assert config["r"] == 3
    assert config["rank_pattern"] == {}
    torch.testing.assert_close(call(name, peft_model(name, tmp_path)), call(name, loaded), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [LoHa(r=1), PiSSA(r=1), PaCA(r=3), LoRA(r=2)], ids=["loha", "pissa", "paca", "lora"])
def test_a_rank_that_is_enough_is_exact_and_the_same_in_all_layers(method: Any, tmp_path: Path) -> None:
    model = trained(method)
    folder = save_adapter(model, tmp_path, as_lora=5)
    loaded = load_adapter(backbone("llama"), folder)
    assert {len(adapter.lora_A) for _, _, adapter in adapters_of(loaded)} == {5}
    torch.testing.assert_close(call("llama", loaded), call("llama", model), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(call("llama", peft_model("llama", folder)), call("llama", model), rtol=1e-5, atol=1e-5)
    facts, _, _ = read_adapter(folder)
    assert facts is not None
    assert facts["as_lora"]["relative_error"] < 1e-6


def test_in_single_precision_too(tmp_path: Path) -> None:
    model = moved(inject(tiny(), LoHa(r=1)))
    loaded = load_adapter(tiny(), save_adapter(model, tmp_path, as_lora=2))
    x = torch.randn(3, 7)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PaCA(r=3), r"as_lora=r \(--r on the command line\) writes the nearest .* and as_lora=3 is exact here"),
        (DoRA(r=2), r"'model.layers.0.self_attn.q_proj' is no low-rank product.*\. Or save it as it is"),
    ],
    ids=["paca", "dora"],
)
def test_without_a_rank_what_is_no_product_is_refused_and_a_rank_named(
    method: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterFileError, match=message):
        save_adapter(trained(method), tmp_path / "new", as_lora=True)
    assert not (tmp_path / "new").exists()


def test_no_rank_is_named_where_none_is_small(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(80, 90))
    with pytest.raises(AdapterFileError, match="nearest one of rank r. Or save it as it is"):
        save_adapter(moved(inject(wide, DoRA(r=2))), tmp_path / "new", as_lora=True)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            SSF(target_modules="q_proj"),
            "ScaleShift on 'q_proj' changes the bias as well, so it cannot be saved as LoRA",
        ),
        (SSF(target_modules="norm"), "LoRA does not sit on norm layers"),
        (HoulsbyAdapter(r=2, target_modules="v_proj", modules_to_save=()), "its activation makes it no change"),
        (FullFineTuning(), "base value of 'q_proj' was not kept .* convert .* compares it with a base"),
        (BitFit(), "'q_proj.bias' was trained .* cannot be saved as LoRA|nothing but weights"),
        (LinearProbe(), "'head.bias' was trained beside weights that become LoRA"),
    ],
    ids=["bias", "norm", "bottleneck", "no base kept", "biases", "head with a bias"],
)
def test_what_lora_cannot_do_is_refused(method: Any, message: str, tmp_path: Path) -> None:
    model = moved(inject(tiny(), method))
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=message):
        save_adapter(model, tmp_path / "new", as_lora=2)
    assert not (tmp_path / "new").exists()
    assert_unchanged(model, before)


@pytest.mark.parametrize("as_lora", [-1, 2.0, "8"])
def test_a_rank_is_a_positive_number(as_lora: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="as_lora must be True, False or an integer >= 1, got"):
        save_adapter(trained(LoRA(r=2)), tmp_path / "new", as_lora=as_lora)


class Whole(LinearProbe):
    """Trains layers, and a norm, in place."""

    def trained_in_place(self, model: nn.Module) -> list[str]:
        return ["v_proj.weight", "norm.weight", "norm.bias", "q_proj.weight"]


@pytest.mark.parametrize("active", [True, False])
def test_weights_that_were_trained_in_place_become_lora_and_norms_go_along(active: bool, tmp_path: Path) -> None:
    model, x = moved(inject(tiny(), Whole())), torch.randn(3, 7)
    with torch.no_grad():
        model.q_proj.weight.copy_(tiny().q_proj.weight)  # what has not changed needs no LoRA
    expected = model(x)
    with disabled(model):
        base = model(x)
    if not active:
        set_active(model, ())
    loaded = load_adapter(tiny(), save_adapter(model, tmp_path, as_lora=5))
    assert [path for path, _, _ in adapters_of(loaded)] == ["v_proj"]
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, base, atol=1e-2)
    with disabled(loaded):
        torch.testing.assert_close(loaded(x), base)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.lm_head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.inner(self.embed(ids)).tanh())


def build() -> nn.Module:
    torch.manual_seed(1)
    return Tied()


def test_of_a_tie_that_was_trained_beside_an_adapter_both_ends_go_along(tmp_path: Path) -> None:
    model = moved(inject(build(), DoRA(r=2, target_modules="inner", modules_to_save=("embed", "lm_head"))))
    loaded, ids = load_adapter(build(), save_adapter(model, tmp_path, as_lora=6)), torch.arange(9)
    torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-5, atol=1e-6)


def test_tied_weights_change_at_both_ends(tmp_path: Path) -> None:
    class InPlace(LinearProbe):
        def trained_in_place(self, model: nn.Module) -> list[str]:
            return ["embed.weight", "lm_head.weight"]

    model, ids = moved(inject(build(), InPlace())), torch.arange(9)
    loaded = load_adapter(build(), save_adapter(model, tmp_path, as_lora=6))
    torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-5, atol=1e-6)


def test_the_base_counts_and_not_what_another_adapter_trains_in_place(tmp_path: Path) -> None:
    alone = moved(inject(tiny(), DoRA(r=2, target_modules="v_proj")))
    save_adapter(alone, tmp_path / "alone", as_lora=5)
    both = inject(tiny(), DoRA(r=2, target_modules="v_proj"))
    both.v_proj.adapters["default"].load_state_dict(alone.v_proj.adapters["default"].state_dict())
    moved(inject(both, Whole(), name="other"), seed=4)
    both.v_proj.adapters["default"].load_state_dict(alone.v_proj.adapters["default"].state_dict())
    save_adapter(both, tmp_path / "both", as_lora=5)
    x = torch.randn(3, 7)
    torch.testing.assert_close(load_adapter(tiny(), tmp_path / "both")(x), alone(x), rtol=1e-5, atol=1e-6)


def test_large_weights_are_decomposed_near_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_peft.interop.as_lora._LARGE", 8)
    model = moved(inject(nn.Sequential(nn.Linear(50, 60).double()), DoRA(r=2)))
    ((_, module, adapter),) = adapters_of(model)
    change = (adapter.merged(module.weight, None)[0] - module.weight).detach()
    values = torch.linalg.svdvals(change)
    with pytest.warns(UserWarning, match="leaves out"):
        save_adapter(model, tmp_path, as_lora=4)
    facts, _, tensors = read_adapter(tmp_path)
    assert facts is not None
    written = tensors["base_model.model.0.lora_B.weight"] @ tensors["base_model.model.0.lora_A.weight"]
    said = facts["as_lora"]["relative_error"]
    # that of what is written, and within a percent of the least there can be
    assert said == pytest.approx(float((change - written).norm() / change.norm()), rel=1e-9)
    least = float(values[4:].norm() / values.norm())
    assert least * (1 - 1e-9) <= said < 1.01 * least


def test_a_name_that_ends_another_selects_itself_alone(tmp_path: Path) -> None:
    base = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "block": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
    model = moved(inject(copy.deepcopy(base), PiSSA(r=1, target_modules="^q_proj")))
    loaded = load_adapter(base, save_adapter(model, tmp_path, as_lora=True))
    assert [path for path, _, _ in adapters_of(loaded)] == ["q_proj"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded["q_proj"](x), model["q_proj"](x))
