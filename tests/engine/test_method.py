"""Methods are frozen hyper-parameters with declared facts, and the registry knows them all."""

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import SSF, LoRA, get_method, inject, list_methods
from lightning_peft.engine import METHODS, AdapterError, Method, adapters_of, register

every_method = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS.keys())


@every_method
def test_a_method_is_frozen_and_takes_keywords_only(cls: type[Any]) -> None:
    fields = dataclasses.fields(cls)
    assert all(field.kw_only for field in fields)
    for field in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cls(), field.name, None)


@every_method
def test_equal_arguments_make_equal_methods(cls: type[Method]) -> None:
    assert cls() == cls()
    first, *others = cls.examples()
    assert all(first != other for other in others)


@every_method
def test_the_registry_is_where_a_method_says_it_is(cls: type[Method]) -> None:
    assert get_method(cls.name) is cls
    assert cls.name == cls.name.lower()
    assert cls.__module__.removeprefix("lightning_peft.methods.") in (
        f"{cls.family}.{cls.name}",
        "lightning_peft.interop.hfpeft",
    )
    (row,) = [row for row in list_methods() if row.cls is cls]
    assert row[:5] == (cls.name, cls, cls.family, cls.paper, cls.mergeable)
    assert set(row.modalities) <= {"vision", "text", "diffusion"}
    assert row.modalities


@every_method
def test_limits_of_a_parent_hold_where_another_default_is_given(cls: type[Any]) -> None:
    own = {field.name: field.type for field in dataclasses.fields(cls)}
    for parent in cls.__mro__:
        for name, annotation in inspect.get_annotations(parent).items():
            assert "Annotated" not in repr(annotation) or "Annotated" in repr(own[name]), name


@every_method
def test_ranks_and_patterns_are_checked(cls: type[Any]) -> None:
    for field in dataclasses.fields(cls):
        if field.name == "r" and "an integer >= 1" in repr(field.type):
            with pytest.raises(AdapterError, match=f"{cls.__name__}: r must be .*, got 0"):
                cls(r=0)
        if "a pattern or several" in repr(field.type):
            assert getattr(cls(**{field.name: ["a", "b"]}), field.name) == ("a", "b")
            with pytest.raises(AdapterError, match=f"{cls.__name__}: {field.name} must be a pattern or several, got 3"):
                cls(**{field.name: 3})


@every_method
def test_facts_agree_with_the_adapters(cls: type[Method]) -> None:
    for adapter in cls.adapter_types.values():
        assert isinstance(adapter, type)
    example = cls.examples()[0]
    assert "adapter_types" not in repr(example)


def test_the_representation_shows_what_differs_from_the_defaults() -> None:
    assert repr(LoRA()) == "LoRA()"
    assert repr(LoRA(r=4, target_modules=["a", "b"])) == "LoRA(target_modules=('a', 'b'), r=4)"
    assert repr(LoRA(rank_pattern={"q": 2})) == "LoRA(rank_pattern={'q': 2})"


def test_lists_and_classes_are_taken_as_tuples_and_names() -> None:
    assert LoRA(target_modules=["q", "v"]) == LoRA(target_modules=("q", "v"))
    assert LoRA(target_modules=[nn.Linear]).target_modules == ("Linear",)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(AdapterError, match=r"unknown method 'lroa'. Did you mean 'lora'.*list_methods\(\) shows all"):
        get_method("lroa")


def test_a_name_is_given_once() -> None:
    before = dict(METHODS)
    with pytest.raises(AdapterError, match="the method name 'lora' is taken by LoRA. Choose another"):
        register("lora")(SSF)
    assert before == METHODS
    assert SSF.name == "ssf"


def test_rows_are_sorted_by_family_and_name() -> None:
    rows = [(row.family, row.name) for row in list_methods()]
    assert rows == sorted(rows)
    assert len(rows) == len(METHODS)


def test_rank_and_alpha_patterns_give_a_layer_its_own() -> None:
    base = nn.ModuleDict({"a": nn.Linear(5, 7), "b": nn.Linear(7, 5)})
    method = LoRA(r=2, alpha=4.0, rank_pattern={"b": 4}, alpha_pattern={"a": 6.0})
    inject(base, method)
    by_path = {path: adapter for path, _, adapter in adapters_of(base)}
    assert by_path["a"].lora_A.shape == (2, 5)
    assert by_path["b"].lora_A.shape == (4, 7)
    torch.testing.assert_close([float(by_path[p].scaling) for p in "ab"], [6.0 / 2, 4.0 / 4])


def test_ranks_are_clipped_on_request() -> None:
    base = nn.ModuleDict({"a": nn.Linear(5, 7), "b": nn.Linear(7, 2)})
    inject(base, LoRA(r=6, alpha=6.0, clip_rank=True))
    by_path = {path: adapter for path, _, adapter in adapters_of(base)}
    assert [by_path[p].lora_A.shape[0] for p in "ab"] == [5, 2]
    torch.testing.assert_close([float(by_path[p].scaling) for p in "ab"], [6.0 / 5, 6.0 / 2])


def test_one_method_may_adapt_many_models() -> None:
    method = LoRA(r=2)
    one, other = (inject(nn.Sequential(nn.Linear(5, 7)), method) for _ in range(2))
    nn.init.ones_(one[0].adapters["default"].lora_B)
    assert not other[0].adapters["default"].lora_B.any()
