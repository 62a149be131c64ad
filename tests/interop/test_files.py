"""Adapter folders are complete or not there, say whose they are, and are never unpickled."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft import (
    SSF,
    BitFit,
    DoRA,
    FullFineTuning,
    LinearProbe,
    LoRA,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_active,
    unload,
)
from lightning_peft.engine import AdapterError, AdapterFileError
from lightning_peft.interop import read_adapter
from tests.methods.backbones import assert_unchanged, moved, snapshot, tiny

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of the tiny net, in the format that HF PEFT reads."""
    return save_adapter(moved(inject(tiny(), LoRA(r=2, modules_to_save="head"))), tmp_path / "adapter")


def test_a_folder_holds_two_files_and_the_tensor_file_is_enough(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]
    expected = load_adapter(tiny(), folder)
    x = torch.randn(3, 7)
    assert torch.equal(load_adapter(tiny(), folder / TENSORS)(x), expected(x))
    (folder / CONFIG).unlink()
    assert torch.equal(load_adapter(tiny(), folder)(x), expected(x))


def test_the_file_says_what_made_it(folder: Path) -> None:
    facts, config, _ = read_adapter(folder)
    assert facts is not None
    assert facts["method"] == "lora"
    assert facts["arguments"]["r"] == 2
    assert facts["arguments"]["modules_to_save"] == "head"
    assert facts["base"]["class"] == "Tiny"
    assert config["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "method", [LoRA(r=2, rank_pattern={"v_proj": 1}), SSF(modules_to_save="head"), BitFit(), DoRA(r=2)]
)
def test_the_method_comes_back_as_it_was(method: Any, tmp_path: Path) -> None:
    loaded = load_adapter(tiny(), save_adapter(inject(tiny(), method), tmp_path))
    assert_unchanged(inject(loaded, method), snapshot(loaded))  # another method would be refused


def test_loading_again_replaces_the_values(folder: Path) -> None:
    model = load_adapter(tiny(), folder)
    expected = snapshot(model)
    moved(model)
    assert_unchanged(load_adapter(model, folder), expected)


def test_two_adapters_live_side_by_side(folder: Path) -> None:
    model = inject(tiny(), LoRA(r=2, target_modules="v_proj"), name="mine")
    load_adapter(model, folder, name="theirs")
    unload(model, "mine")
    x = torch.randn(3, 7)
    assert torch.equal(model(x), load_adapter(tiny(), folder)(x))


def test_what_another_adapter_trains_in_place_does_not_make_another_base(tmp_path: Path) -> None:
    model = inject(tiny(), LoRA(r=2, target_modules="v_proj"), name="mine")
    moved(inject(model, LinearProbe(), name="theirs"))
    loaded = load_adapter(tiny(), save_adapter(model, tmp_path, "mine"))
    set_active(model, "mine")
    x = torch.randn(3, 7)
    assert torch.equal(loaded(x), model(x))


def test_a_bare_layer_is_a_model_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = moved(inject(nn.Linear(5, 3), LoRA(r=2)))
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="not a model that is one layer"):
        save_adapter(model, tmp_path)
    loaded = load_adapter(nn.Linear(5, 3), tmp_path)
    x = torch.randn(2, 5)
    assert torch.equal(loaded(x), model(x))


def test_a_half_precision_model_keeps_its_precise_adapter(tmp_path: Path) -> None:
    model = moved(inject(tiny().bfloat16(), LoRA(r=2)))
    loaded = load_adapter(tiny().bfloat16(), save_adapter(model, tmp_path))
    assert_unchanged(loaded, snapshot(model))


@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("new", [LoRA(r=3), SSF(modules_to_save="head")])
def test_an_interrupted_save_leaves_the_former_adapter(
    failing_call: int, new: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, x = (folder / TENSORS).read_bytes(), torch.randn(3, 7)
    expected = load_adapter(tiny(), folder)(x)
    calls = []

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == failing_call:
            raise OSError("no space left on device")
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(moved(inject(tiny(), new)), folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]
    assert (folder / TENSORS).read_bytes() == before
    assert torch.equal(load_adapter(tiny(), folder)(x), expected)


def test_a_save_that_fails_while_writing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk on fire")

    monkeypatch.setattr("lightning_peft.interop.files.save_file", torn)
    with pytest.raises(OSError, match="disk on fire"):
        save_adapter(inject(tiny(), LoRA(r=2)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [LoRA(r=2), LinearProbe()])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_adapter_is_not_saved(method: Any, value: float, tmp_path: Path) -> None:
    model = inject(tiny(), method)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = value
    with pytest.raises(AdapterError, match=r"(lora_A|head.weight) holds NaN or infinite values.*learning rate"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_merged_or_plain_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"unmerge\(model\) first"):
        save_adapter(merge(inject(tiny(), LoRA(r=2))), tmp_path)
    with pytest.raises(AdapterError, match="Tiny has no adapters"):
        save_adapter(tiny(), tmp_path)
    with pytest.raises(AdapterError, match="there is no adapter 'other'.*There are: default"):
        save_adapter(inject(tiny(), LoRA(r=2)), tmp_path, name="other")


def other_values() -> nn.Module:
    return moved(tiny())


def other_structure() -> nn.Module:
    model = tiny()
    model.norm = nn.BatchNorm1d(13)
    return model


@pytest.mark.parametrize(
    ("build", "what"), [(other_values, "the same model with other weights"), (other_structure, "another model")]
)
def test_an_adapter_of_another_base_is_refused(build: Any, what: str, folder: Path) -> None:
    model = build()
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=rf"trained on {what}: Tiny with \d+ parameters.*allow_other_base=True"):
        load_adapter(model, folder)
    assert_unchanged(model, before)
    load_adapter(model, folder, allow_other_base=True)


def test_a_fully_fine_tuned_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_adapter(inject(tiny(), FullFineTuning()), tmp_path)
    model = other_structure()
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match="trained on another model"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / TENSORS)
    facts, _, _ = read_adapter(folder)
    save_file(change(tensors), folder / TENSORS, metadata={"format": "pt", "lightning_peft": json.dumps(facts)})


A = "base_model.model.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: {k: v for k, v in t.items() if k != A}, "1 tensors are missing: q_proj.adapters.lora_A"),
        (lambda t: t | {"k_proj.lora_A.weight": torch.zeros(2, 3)}, "unexpected: k_proj.lora_A.weight"),
        (lambda t: t | {A: torch.zeros(5, 7)}, "1 tensors are of the wrong shape: q_proj.adapters.lora_A"),
        (lambda t: t | {A: torch.full((2, 7), torch.nan)}, "NaN or infinite: q_proj.adapters.lora_A"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_key(change: Any, part: str, folder: Path) -> None:
    rewrite(folder, change)
    model = tiny()
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match="does not fit adapter 'default' of Tiny") as error:
        load_adapter(model, folder)
    assert part in str(error.value)
    assert_unchanged(model, before)
    other = inject(tiny(), LoRA(r=2, modules_to_save="head"))
    before = snapshot(other)
    with pytest.raises(AdapterFileError):
        load_adapter(other, folder)
    assert_unchanged(other, before)


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of the file was run')",)


def test_a_torn_file_is_refused(folder: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        (folder / TENSORS).write_bytes(whole[:length])
        with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors is damaged, or of another kind"):
            load_adapter(tiny(), folder)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_under_a_false_name_is_not_run(dump: Any, folder: Path) -> None:
    with (folder / TENSORS).open("wb") as stream:
        dump(Bomb(), stream)
    with pytest.raises(AdapterFileError, match="is a pickle under a false name, which is never read"):
        load_adapter(tiny(), folder)


def test_a_pickled_adapter_is_named_and_not_run(tmp_path: Path) -> None:
    torch.save(Bomb(), tmp_path / "adapter_model.bin")
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(AdapterFileError, match=r"no adapter_model.safetensors.*adapter_model.bin is a pickle.*convert"):
        load_adapter(tiny(), tmp_path)


def test_a_folder_of_folders_names_those_with_adapters(folder: Path) -> None:
    # as HF PEFT writes several adapters
    with pytest.raises(AdapterFileError, match="There are adapters in folders of it: adapter. Name one of them"):
        load_adapter(tiny(), folder.parent)
    with pytest.raises(AdapterFileError, match="in user/lora. Nothing of that name is on this machine"):
        load_adapter(tiny(), "user/lora")


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="there is no adapter_model.safetensors"):
        load_adapter(tiny(), tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError, match=r"there is no adapter_config.json beside"):
        load_adapter(tiny(), tmp_path)


@pytest.mark.parametrize(("text", "part"), [("{", "damaged, or of another kind"), ("[1]", "expected a JSON object")])
def test_a_torn_description_is_refused(text: str, part: str, folder: Path) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(AdapterFileError, match=part):
        load_adapter(tiny(), folder)


def edit_facts(folder: Path, **changes: Any) -> None:
    facts, _, tensors = read_adapter(folder)
    metadata = {"format": "pt", "lightning_peft": json.dumps({**(facts or {}), **changes})}
    save_file(tensors, folder / TENSORS, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format": 99, "version": "9.0"}, "has format 99, this library reads up to 1.*lightning_peft 9.0. Upgrade"),
        ({"method": "lroa"}, "unknown method 'lroa'. Did you mean 'lora'"),
        ({"arguments": {"r": 2, "colour": "red"}}, "LoRA has no argument 'colour'.*another version"),
    ],
)
def test_a_file_of_another_version_says_so(changes: dict[str, Any], part: str, folder: Path) -> None:
    edit_facts(folder, **changes)
    with pytest.raises(AdapterError, match=part):
        load_adapter(tiny(), folder)


class TrainingModule(nn.Module):
    """As much of a LightningModule as counts here: it has a ``training_step``, and the model is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def training_step(self) -> None: ...


def test_files_of_a_lightning_module_fit_the_plain_model_and_back(tmp_path: Path) -> None:
    module = moved(inject(TrainingModule(), LoRA(r=2, target_modules=("q_proj", "v_proj"))))
    save_adapter(module, tmp_path / "outer")
    plain = load_adapter(tiny(), tmp_path / "outer")
    x = torch.randn(3, 7)
    assert torch.equal(plain(x), module.net(x))
    save_adapter(plain, tmp_path / "inner")
    assert torch.equal(load_adapter(TrainingModule(), tmp_path / "inner").net(x), plain(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": None}, "does not say which method"),
        ({"method": "lroa"}, "unknown method 'lroa'"),
        ({"arguments": {"r": 2, "rnak": 3}}, "no argument 'rnak'"),
        ({"arguments": {"alpha": "much"}}, "LoRA: alpha must be a number > 0, got 'much'"),
        ({"arguments": {"target_modules": 3}}, "LoRA: target_modules must be a pattern or several, got 3"),
        ({"base": {}}, "does not say on which base"),
    ],
    ids=["no method", "unknown method", "unknown argument", "out of range", "wrong type", "no base"],
)
def test_a_description_that_was_tampered_with_is_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    facts, _, tensors = read_adapter(folder)
    save_file(tensors, folder / TENSORS, metadata={"lightning_peft": json.dumps({**(facts or {}), **change})})
    model = tiny()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, folder)
    assert_unchanged(model, before)
