"""What every registered method must satisfy on models of many kinds. Adding a method adds no line here."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft import load_adapter, merge, save_adapter, unload
from lightning_peft.engine import METHODS, AdapterError, HostedMethod, Method, TargetError, inject
from tests.methods.backbones import (
    BACKBONES,
    assert_unchanged,
    backbone,
    call,
    kept,
    moved,
    snapshot,
    suited,
    trainable,
)

every_backbone = pytest.mark.parametrize("name", BACKBONES)
every_method = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS.keys())

# some backbones compute parts of their forward in float32, whose roundings a change of 1e-16 can flip
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def adapted(cls: type[Method], name: str, move: bool = True) -> nn.Module | None:
    """Backbone ``name`` with the method; None if it holds nothing that the method can adapt."""
    method = suited(cls, name)
    if isinstance(method, AdapterError):
        return None
    model = inject(backbone(name), method)
    return moved(model) if move else model


@every_method
def test_some_backbone_of_each_method_can_be_adapted(cls: type[Method]) -> None:
    assert any(isinstance(suited(cls, name), Method) for name in BACKBONES)


@every_method
@every_backbone
def test_a_refusal_says_what_to_do(cls: type[Method], name: str) -> None:
    refusal = suited(cls, name)
    if isinstance(refusal, AdapterError):
        assert isinstance(refusal, TargetError)
        # one that hosts another may leave it to the other to refuse
        named = [cls.__name__, *([type(cls().host).__name__] if issubclass(cls, HostedMethod) else [])]
        assert any(name in str(refusal) for name in named)
        assert re.search(r"\. [A-Z].{20}", str(refusal)), "one sentence on what happened, and one on what to do"


@every_method
@every_backbone
def test_the_start_is_as_declared(cls: type[Method], name: str) -> None:
    model = adapted(cls, name, move=False)
    if model is not None:
        same = torch.allclose(call(name, model), call(name, backbone(name)), **CLOSE)
        assert same == cls.identity_at_init


@every_method
@every_backbone
def test_every_trainable_parameter_gets_a_gradient(cls: type[Method], name: str) -> None:
    model = adapted(cls, name)
    if model is not None:
        call(name, model).square().mean().backward()
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
        assert frozen == []
        for seed in range(3, 20):  # a unit that is off at one point (ReLU) is on at another
            if all(p.grad is not None and p.grad.any() for p in trainable(model).values()):
                break
            call(name, moved(model, seed)).square().mean().backward()
        # those that even the base cannot train (unused, or cancelled by a later layer) show in the base as well
        base = backbone(name).requires_grad_(True)
        call(name, base).square().mean().backward()
        idle = {path for path, p in base.named_parameters() if p.grad is None or not p.grad.any()}
        some = {path.rpartition(".")[0] for path in idle}
        whole = {m for m in some if all(f"{m}.{key}" in idle for key, _ in base.get_submodule(m).named_parameters())}

        def excused(path: str) -> bool:
            module, adapted, _ = path.partition(".adapters")
            return module in whole if adapted else path.rpartition(".")[0] in some

        without = [path for path, p in trainable(model).items() if p.grad is None or not p.grad.any()]
        assert [path for path in without if not excused(path)] == []


@every_method
@every_backbone
def test_all_ways_to_run_agree(cls: type[Method], name: str) -> None:
    model = adapted(cls, name)
    if model is not None:
        expected = call(name, model)
        with torch.no_grad():
            torch.testing.assert_close(call(name, model), expected, **CLOSE)
        with torch.inference_mode():
            torch.testing.assert_close(call(name, model), expected, **CLOSE)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        first = call(name, model)
        if not torch.allclose(first, expected, **CLOSE):  # then the method draws random numbers in training
            assert any(not torch.equal(call(name, model), first) for _ in range(10))


@every_method
@every_backbone
@pytest.mark.filterwarnings("ignore:merge:UserWarning")  # tied weights, which GPT-2 has, are untied with a warning
def test_merged_equals_unmerged(cls: type[Method], name: str) -> None:
    model = adapted(cls, name)
    method = suited(cls, name)
    if model is not None and isinstance(method, Method) and method.mergeable:
        expected = call(name, model)
        torch.testing.assert_close(call(name, merge(model)), expected, **CLOSE)
        if method.keeps_base:
            assert_unchanged(unload(model), snapshot(kept(backbone(name), method)))


@every_method
@every_backbone
@pytest.mark.filterwarnings("ignore:.* is written in our own format:UserWarning")  # HF PEFT has no place for some
def test_files_carry_the_whole_adapter(cls: type[Method], name: str, tmp_path: Path) -> None:
    model = adapted(cls, name)
    if model is not None:
        loaded = load_adapter(backbone(name), save_adapter(model, tmp_path))
        assert torch.equal(call(name, loaded), call(name, model))
