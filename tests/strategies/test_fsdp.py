"""peft_fsdp on two processes: the same training as in one, with half of the base on each."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor

from lightning_peft import PEFT, DoRA, PEFTFSDPStrategy, get_method, inject, load_adapter
from tests.callbacks.nets import trainer
from tests.strategies.blocks import (
    METHOD,
    SAMPLED,
    Net,
    SmoothNet,
    adapters_by_turns,
    blocks_by_epoch,
    blocks_by_turns,
    by_hand,
)
from tests.strategies.launch import launched
from tests.strategies.nets import data

FULL = get_method("fullfinetuning")()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes work; with a checkpoint of one device in it."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("fsdp")
    alone = trainer(made, PEFT(METHOD, summary=False), max_epochs=1)
    alone.fit(Net(adam=True), data(8), data(8))
    alone.save_checkpoint(made / "single.ckpt")
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes saw: one launch for all tests."""
    return launched("fsdp_script.py", folder)


def same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


EXACT = {"rtol": 0, "atol": 0}
ROUNDED = {"rtol": 1e-4, "atol": 2e-6}  # a mean of two means is rounded in another order

REFERENCES: dict[str, dict[str, Any]] = {
    "plain": {"adam": True, "clip": 0.05},
    "resumed": {"adam": True, "clip": 0.05, "epochs": 2},
    "in shares": {"adam": True, "epochs": 2},
    "from one device": {"adam": True, "epochs": 2},
    "injected before": {"adam": True},
    "injected after": {"adam": True},
    "by our operations": {"adam": True, "net": SmoothNet},
    "plain early": {},
    "accumulated": {},
    "by turns": {"adam": True, "epochs": 2, "before": adapters_by_turns},
    "base by turns": {"method": FULL, "before": blocks_by_turns},
    "base by epoch": {"method": FULL, "before": blocks_by_epoch, "epochs": 2},
    "base by epoch, again": {"method": FULL, "before": blocks_by_epoch, "epochs": 3},
    "dora early": {"method": DoRA(r=2, target_modules=("up",)), "batches": 1},
    "dora late": {"method": DoRA(r=2, target_modules=("up",)), "batches": 1},
}


@pytest.mark.parametrize("run", [*REFERENCES, "lisa", "mixed", "bf16"])
def test_ranks_end_bit_for_bit_equal(run: str, ranks: list[dict[str, Any]]) -> None:
    same(ranks[0][run], ranks[1][run], **EXACT)


@pytest.mark.parametrize("run", REFERENCES)
def test_two_ranks_train_as_one_process_does_on_both_their_batches(run: str, ranks: list[dict[str, Any]]) -> None:
    expected = by_hand(**REFERENCES[run])
    torch.manual_seed(0)
    start = inject(REFERENCES[run].get("net", Net)(), REFERENCES[run].get("method", METHOD)).state_dict()
    assert any(not torch.allclose(value, start[key], **ROUNDED) for key, value in expected.items())
    same(ranks[0][run], dict(expected), **ROUNDED)


def test_a_method_that_samples_blocks_trains_as_on_one_device(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Net(adam=True)
    trainer(tmp_path, PEFT(SAMPLED, summary=False), max_epochs=2).fit(module, data(8), data(8))
    start = Net().state_dict()
    assert all(not torch.equal(module.state_dict()[key], start[key]) for key in ("head.weight", "embed.weight"))
    same(ranks[0]["lisa"], dict(module.state_dict()), **ROUNDED)


def test_lower_precision_trains_nearly_the_same(ranks: list[dict[str, Any]]) -> None:
    expected = by_hand()
    for run in ("mixed", "bf16"):
        for key, value in expected.items():
            torch.testing.assert_close(ranks[0][run][key].float(), value, rtol=0.05, atol=0.05)
        assert any(not torch.allclose(ranks[0][run][k].float(), v, **ROUNDED) for k, v in expected.items())


def test_each_rank_holds_its_share_of_the_base_and_the_adapters_whole(ranks: list[dict[str, Any]]) -> None:
    for name, share in ranks[0]["local bytes"].items():
        rows = 3 if name.startswith("head") else 2
        assert share + ranks[1]["local bytes"][name] == pytest.approx(2 if "adapters" in name else 1)
        assert share == (1 if "adapters" in name else pytest.approx(2 / 3 if rows == 3 else 1 / 2))
    assert all(ranks[0]["is whole"][name] == ("adapters" in name) for name in ranks[0]["is whole"])
    assert ranks[0]["base is sharded"]


def test_the_base_is_in_bfloat16_when_asked_and_the_adapters_are_not(ranks: list[dict[str, Any]]) -> None:
    for name, dtype in ranks[0]["dtypes"].items():
        assert dtype == ("torch.float32" if "adapters" in name else "torch.bfloat16")
    assert sum(facts["bf16 bytes"] for facts in ranks) == 2 * ranks[0]["numbers"]


@pytest.mark.parametrize(
    ("run", "numbers"),
    [("gathered", 3 * 21), ("gathered in shares", 0), ("injected after gathered", 3 * 21)]
    + [("gathered in validation", 21 + 6 * 2 * (6 + 10)), ("injected before gathered", 3 * (21 + 6 * 2 * (6 + 10)))],
)
def test_a_checkpoint_puts_together_what_was_trained_and_not_the_base(
    run: str, numbers: int, ranks: list[dict[str, Any]]
) -> None:
    assert ranks[0][run] == numbers  # of the head (and of adapters that are in shards), each with the two of Adam


def test_a_checkpoint_is_that_of_one_device(ranks: list[dict[str, Any]], folder: Path) -> None:
    expected = torch.load(folder / "single.ckpt", weights_only=True)
    trained = {name for name in expected["state_dict"] if "adapters" in name or name.startswith("head")}
    assert expected["state_dict"].keys() == trained
    for file in ("before.ckpt", "after.ckpt"):
        found = torch.load(folder / file, weights_only=True)
        assert found.keys() == expected.keys()
        assert found["peft"]["adapters"] == expected["peft"]["adapters"]
        for fact in ("parameters", "structure", "values"):
            assert found["peft"]["base"][fact] == expected["peft"]["base"][fact]
        same(found["state_dict"], expected["state_dict"], **ROUNDED)
        one, other = (c["optimizer_states"][0] for c in (found, expected))
        assert one["param_groups"] == other["param_groups"]
        assert one["state"].keys() == other["state"].keys()
        for i, values in other["state"].items():
            same(one["state"][i], values, **ROUNDED)


def test_a_checkpoint_loads_on_one_device(ranks: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    module = Net(adam=True)
    alone = trainer(tmp_path, PEFT(METHOD, summary=False), max_epochs=2, gradient_clip_val=0.05)
    alone.fit(module, data(8), data(8), ckpt_path=folder / "plain.ckpt")
    assert alone.global_step == 6
    same(module.state_dict(), ranks[0]["resumed"], **ROUNDED)


def test_a_resumed_run_ends_where_one_without_a_stop_does(ranks: list[dict[str, Any]]) -> None:
    for run in ("resumed", "in shares"):
        assert ranks[0][f"{run} steps"] == 6
    same(ranks[0]["resumed"], ranks[0]["straight"], **EXACT)
    same(ranks[0]["in shares"], ranks[0]["straight in shares"], **EXACT)


def test_a_checkpoint_after_validation_holds_no_base_and_loads_for_a_test(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    saved = torch.load(folder / "validated.ckpt", weights_only=True)["state_dict"]
    assert all("adapters" in name or name.startswith("head") for name in saved)
    same(ranks[0]["tested again"], ranks[0]["resumed"], **EXACT)
    saved = torch.load(folder / "in_validation.ckpt", weights_only=True)["state_dict"]
    assert ranks[0]["whole after validation"]
    assert all("adapters" in name or name.startswith("head") for name in saved)
    assert ranks[0]["tested"] == ranks[1]["tested"]
    assert ranks[0]["predicted"] == 3


def test_the_adapter_folder_is_written_once_and_whole(ranks: list[dict[str, Any]], folder: Path) -> None:
    torch.manual_seed(1)
    same(load_adapter(Net(), folder / "adapter").state_dict(), ranks[0]["saved"], **EXACT)


def test_disabled_gives_back_the_base_of_what_is_trained_in_place(ranks: list[dict[str, Any]]) -> None:
    base = Net().state_dict()
    same({name: ranks[0]["disabled"][name] for name in base}, dict(base), **EXACT)
    assert not torch.equal(ranks[0]["plain"]["head.weight"], base["head.weight"])


def test_a_module_without_configure_model_stays_without(ranks: list[dict[str, Any]]) -> None:
    assert not ranks[0]["overridden"]
    assert ranks[0]["signature"] == str(inspect.signature(Net().training_step))  # Lightning reads it


def test_adapters_injected_before_the_user_shards_are_sharded_too(ranks: list[dict[str, Any]]) -> None:
    assert not any(ranks[0]["injected before is whole"])
    assert all(ranks[0]["injected after is whole"])


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("nothing injected", ["nothing was injected into Net", "PEFTFSDPStrategy(method=LoRA(r=8))"]),
        ("plain late", ["6 of them are whole", "'blocks.0.up'", "strategy='peft_fsdp'", "before fully_shard"]),
        ("tensor parallel mesh", ["tensor_parallel_size=2", "strategy='peft_fsdp'"]),
        ("tensor parallel ours", ["6 parameters are tensor parallel", "'blocks.0.down.weight'"]),
        ("tensor parallel plain", ["6 parameters are tensor parallel", "'blocks.0.down.weight'"]),
        ("meta", ["28 parameters on the meta device have no values", "Load the base before the run starts"]),
        ("no such block", ["has no module 'layers'"]),
        ("other seed", ["rank 1 differs from rank 0 in 6 of", "lora_A"]),
        ("other method", ["the checkpoint was made with", "target_modules=('up', 'down')"]),
        ("wrong key", ["blocks.1.up.adapters.default.lora_X", "blocks.1.up.adapters.default.lora_A"]),
    ],
)
def test_errors_come_on_all_ranks_and_say_what_to_do(run: str, words: list[str], ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert all(word in facts[run] for word in words), facts[run]


def test_it_is_known_by_name() -> None:
    assert StrategyRegistry["peft_fsdp"]["strategy"] is PEFTFSDPStrategy
