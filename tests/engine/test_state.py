"""The state of an adapter is all that it has changed, and nothing of the base."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import IST, LinearProbe, LoRA, inject, merge, set_active, unload
from lightning_peft.engine import AdapterError, AdapterFileError
from lightning_peft.engine.state import adapter_state, fingerprint, load_adapter_state
from tests.methods.backbones import assert_unchanged, moved, snapshot, tiny, trainable


def test_keys_are_those_of_the_model_without_the_adapter_name() -> None:
    model = inject(tiny(), LoRA(r=2, target_modules="q_proj", modules_to_save="head"), name="first")
    state = adapter_state(model, "first")
    assert list(state) == ["q_proj.adapters.lora_A", "q_proj.adapters.lora_B", "head.weight", "head.bias"]
    inside = model.state_dict(keep_vars=True)
    assert state["q_proj.adapters.lora_A"] is inside["q_proj.adapters.first.lora_A"]


def test_a_module_with_several_weights_has_a_key_for_each() -> None:
    model = inject(nn.ModuleDict({"a": nn.MultiheadAttention(6, 2, kdim=3)}), LoRA(r=2))
    assert {key.rpartition(".")[0] for key in adapter_state(model)} == {
        "a.adapters:q_proj_weight",
        "a.adapters:k_proj_weight",
        "a.adapters:v_proj_weight",
        "a.out_proj.adapters",
    }


def test_the_whole_model_may_be_the_adapted_layer() -> None:
    model = moved(inject(nn.Linear(5, 3), LoRA(r=2)))
    assert list(adapter_state(model)) == ["adapters.lora_A", "adapters.lora_B"]


def test_running_statistics_belong_to_it_once_they_moved() -> None:
    model = inject(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), LoRA(r=2))
    before = set(adapter_state(model))
    model.train()(torch.randn(5, 3))
    moved_since = set(adapter_state(model)) - before
    assert moved_since == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_running_statistics_are_loaded() -> None:
    model = inject(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), LoRA(r=2))
    fresh = copy.deepcopy(model)
    model.train()(torch.randn(5, 3))
    load_adapter_state(fresh, adapter_state(model))
    assert torch.equal(fresh[1].running_var, model[1].running_var)


def test_what_a_method_keeps_is_read_with_the_state_of_the_model_and_by_its_copies(tmp_path: Path) -> None:
    method = IST(method=LoRA(r=2), n_layers=1, blocks=("q_proj", "v_proj"))
    model = inject(tiny(), method)
    state = model.state_dict()
    assert not any("method_state" in key for key in state), "no parameter and no buffer"
    told = {"method_state.default.importance": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    for one in copies:
        one.load_state_dict(state | told)
        assert adapter_state(one)["method_state.importance"].tolist() == [1.0, 2.0]
        one.load_state_dict(state)
        assert adapter_state(one)["method_state.importance"].tolist() == [1.0, 2.0], "nothing is told of it"
    nn.ModuleDict({"net": model}).load_state_dict({f"net.{key}": value for key, value in (state | told).items()})
    assert adapter_state(model)["method_state.importance"].tolist() == [1.0, 2.0]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state | {"method_state.other.importance": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        unload(model).load_state_dict(tiny().state_dict() | told)


def test_what_was_trained_in_place_is_there_while_it_does_not_act() -> None:
    model = moved(inject(tiny(), LinearProbe()))
    trained = {key: value.detach().clone() for key, value in adapter_state(model).items()}
    set_active(model, ())
    assert all(torch.equal(value, trained[key]) for key, value in adapter_state(model).items())
    assert torch.equal(model.head.weight, tiny().head.weight)


def test_the_state_of_a_merged_model_is_refused() -> None:
    model = merge(moved(inject(tiny(), LoRA(r=2))))
    with pytest.raises(AdapterError, match=r"merged into the base. unmerge\(model\) first"):
        adapter_state(model)


def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != "q_proj.adapters.lora_A"}


WRONG: list[tuple[Any, str]] = [
    (without, "1 tensors are missing: q_proj.adapters.lora_A"),
    (lambda state: state | {"k_proj.x": torch.zeros(1)}, "1 tensors are unexpected: k_proj.x"),
    (lambda state: state | {"head.bias": torch.zeros(3)}, "1 tensors are unexpected: head.bias"),
    (lambda state: state | {"q_proj.adapters.lora_A": torch.zeros(3, 7)}, "of the wrong shape: q_proj.adapters.lora_A"),
    (lambda state: state | {"q_proj.adapters.lora_A": torch.full((2, 7), torch.nan)}, "NaN or infinite: q_proj.ad"),
    (lambda state: state | {"q_proj.adapters.lora_B": torch.full((11, 2), torch.inf)}, "NaN or infinite: q_proj.ad"),
    (lambda state: {}, "4 tensors are missing"),
]


@pytest.mark.parametrize(("spoil", "part"), WRONG)
def test_tensors_that_do_not_fit_are_listed_and_change_nothing(spoil: Any, part: str) -> None:
    model = inject(tiny(), LoRA(r=2))
    state = {key: value.detach() + 1 for key, value in adapter_state(model).items()}
    before = snapshot(model)
    with pytest.raises(AdapterFileError) as error:
        load_adapter_state(model, spoil(state))
    assert part in str(error.value)
    assert "adapter 'default' of Tiny" in str(error.value)
    assert_unchanged(model, before)


def test_the_fingerprint_tells_bases_apart_and_nothing_else() -> None:
    same = fingerprint(inject(tiny(), LoRA(r=2)))
    assert fingerprint(moved(inject(tiny(), LoRA(r=3), name="other"))) == same
    assert fingerprint(inject(tiny().bfloat16(), LoRA(r=2))) == same
    other_values = inject(moved(tiny()), LoRA(r=2))
    assert fingerprint(other_values)["structure"] == same["structure"]
    assert fingerprint(other_values)["values"] != same["values"]
    wider = tiny()
    wider.head = nn.Linear(5, 4)
    assert fingerprint(inject(wider, LoRA(r=2)))["structure"] != same["structure"]


def test_the_fingerprint_does_not_follow_what_is_trained_in_place() -> None:
    model = inject(tiny(), LinearProbe())
    before = fingerprint(model)
    assert fingerprint(moved(model)) == before


def test_a_model_without_values_has_no_fingerprint_of_them() -> None:
    with torch.device("meta"):
        model = inject(nn.Sequential(nn.Linear(3, 5)), LoRA(r=2))
    assert fingerprint(model)["values"] is None


def test_state_follows_the_model_to_another_precision() -> None:
    model = moved(inject(tiny(), LinearProbe())).to(torch.float64)
    assert {value.dtype for value in adapter_state(model).values()} == {torch.float64}
    assert set(trainable(model)) == set(adapter_state(model))
