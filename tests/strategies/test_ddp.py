"""peft_ddp on two processes: the same training as in one, and nothing sent but what trains."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor
from torch.nn import functional as F

import lightning_peft.strategies
from lightning_peft import PEFT, AdapterError, LoRA, PEFTDDPStrategy, PEFTFederatedStrategy, inject
from tests.callbacks.nets import trainer
from tests.strategies.launch import launched
from tests.strategies.nets import METHOD, Net, Projections, by_hand, data, let_train, switching


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw: one launch for all tests."""
    return launched("ddp_script.py", tmp_path_factory.mktemp("ddp"))


def same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


EXACT = {"rtol": 0, "atol": 0}
ROUNDED = {"rtol": 1e-4, "atol": 2e-6}  # a mean of two means is rounded in another order
RUNS = [
    "plain", "accumulated", "manual", "toggled", "uneven", "statistics", "full fine-tuning", "synced norm", "peft_ddp",
    "packed",
]  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_ranks_end_bit_for_bit_equal(run: str, ranks: list[dict[str, Any]]) -> None:
    same(ranks[0][run], ranks[1][run], **EXACT)


@pytest.mark.parametrize("strategy", ["ddp", "peft_ddp"])
@pytest.mark.parametrize("method", ["corda", "eva", "loraga"])
def test_all_ranks_start_at_what_the_first_one_measured(
    method: str, strategy: str, ranks: list[dict[str, Any]]
) -> None:
    run = f"{method} under {strategy}"
    same(ranks[0][run], ranks[1][run], **EXACT)
    same(ranks[1][f"start of {run}"], ranks[0][f"{method} alone"], rtol=1e-5, atol=1e-6)
    own = ranks[1][f"{method} alone"]  # another, as the data of the second rank are
    factors = [(value, own[key]) for key, value in ranks[0][f"{method} alone"].items() if key.endswith("lora_A")]
    assert any(one.shape != other.shape or not torch.allclose(one, other, atol=0.1) for one, other in factors)


def test_ranks_share_packed_documents(ranks: list[dict[str, Any]]) -> None:
    tokens = [token for rank in ranks for token in rank["packed tokens"].flatten().tolist() if token]
    assert sorted(tokens) == [token for i in range(1, 23) for token in range(10 * i, 10 * i + 1 + i % 7)]
    assert all(rank["packed tokens"].shape[1] == 7 for rank in ranks)


REFERENCES: dict[str, dict[str, Any]] = {
    "plain": {"batch_size": 8, "clip": 0.5},
    "accumulated": {"batch_size": 8},
    "manual": {"batch_size": 8},
    "toggled": {"batch_size": 8, "epochs": 2, "adam": True, "before": let_train},
}


@pytest.mark.parametrize("run", REFERENCES)
def test_two_ranks_train_as_one_process_does_on_both_their_batches(run: str, ranks: list[dict[str, Any]]) -> None:
    expected = by_hand(**REFERENCES[run])
    start = inject(Net(), METHOD).state_dict()
    assert any(not torch.allclose(value, start[key], **ROUNDED) for key, value in expected.items())
    same(ranks[0][run], dict(expected), **ROUNDED)


@pytest.mark.parametrize("name", switching())
def test_methods_that_change_what_trains_do_as_on_one_device(
    name: str, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, method = Projections(), PEFT(switching()[name], summary=False)
    trainer(tmp_path, method, max_epochs=3, precision="64-true").fit(module, data(8))
    for facts in ranks:
        same(facts[f"switched by {name}"], module.state_dict(), rtol=1e-7, atol=1e-9)


def test_plain_ddp_refuses_them(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert "LISA changes what trains while training" in facts["switched under ddp"]


def test_the_same_adapter_as_under_plain_ddp(ranks: list[dict[str, Any]]) -> None:
    same(ranks[0]["peft_ddp"], ranks[0]["ddp"], **ROUNDED)


def test_one_message_a_step_with_the_gradients_of_what_trains_and_their_flags(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert facts["sent"] == 3 * [facts["trained bytes"] + 4 * (facts["parameters that train"] + 16)]
        assert facts["wrapped"] == "Net"


def test_what_is_frozen_at_a_step_is_not_sent(ranks: list[dict[str, Any]]) -> None:
    adapter = 2 * (2 * 6) * 4
    whole = 3 * adapter + 21 * 4
    assert ranks[0]["toggled sent"] == 6 * [whole - adapter + 4 * (6 + 16)]


@pytest.mark.parametrize("run", ["accumulated", "manual"])
def test_nothing_is_sent_before_the_last_batch_of_an_accumulation_window(run: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[0][f"{run} calls"] == 3  # of 6 batches


def test_hooks_see_the_mean_gradient_before_it_is_clipped(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    module = inject(Net(), METHOD)
    F.mse_loss(module(next(iter(data(8)))[0]), next(iter(data(8)))[1]).backward()
    expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert torch.stack([g.norm() for g in expected.values()]).norm() > 0.5
    for seen in (*ranks[0]["gradients"], *ranks[1]["gradients"]):
        same(seen, expected, **ROUNDED)


def test_a_gradient_that_one_rank_lacks_counts_as_zero_there(ranks: list[dict[str, Any]]) -> None:
    alone = [facts["uneven alone"] for facts in ranks]
    names = alone[0].keys() | alone[1].keys()
    assert len(names - alone[0].keys()) == len(names - alone[1].keys()) == 2
    zero = torch.zeros(())
    expected = {name: (alone[0].get(name, zero) + alone[1].get(name, zero)) / 2 for name in names}
    for facts in ranks:
        same(facts["uneven gradients"], expected, **ROUNDED)


def test_running_statistics_of_a_norm_that_trains_are_averaged(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    module = inject(Net(), LoRA(r=2))
    x = next(iter(data(8)))[0]
    halves = [module(x[rank::2]).detach() for rank in (0, 1)]
    mean = sum(0.1 * half.mean(0) for half in halves) / 2
    var = sum(0.9 + 0.1 * half.var(0) for half in halves) / 2
    torch.testing.assert_close(ranks[0]["statistics"]["running_mean"], mean, **ROUNDED)
    torch.testing.assert_close(ranks[0]["statistics"]["running_var"], var, **ROUNDED)


def test_a_run_resumes_tests_and_predicts(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert facts["resumed steps"] == 6
        assert facts["predicted"] == 3
    assert ranks[0]["tested"] == ranks[1]["tested"]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("other base", r"rank 1 differs from rank 0 in 1 of \d+ tensors: net.b.weight \(values\).*seed_everything"),
        ("other base in test", r"net.b.weight \(values\)"),
        ("other method", r"in 9 of \d+ tensors: net.a.adapters.default.lora_A \(shape\), .*, \.\.\."),
        ("other seed", r"in 3 of \d+ tensors: net.a.adapters.default.lora_A \(values\)"),
        ("other parameters", "other parameters train on rank . than on another rank"),
        ("nothing injected", r"nothing was injected into Net. .*PEFTDDPStrategy\(method=LoRA\(r=8\)\)"),
        ("adapted norm", "sync_batchnorm replaces 1 BatchNorm layers that have an adapter, among them 'norm'"),
    ],
)
def test_what_would_go_wrong_silently_is_an_error_on_all_ranks(
    case: str, text: str, ranks: list[dict[str, Any]]
) -> None:
    for facts in ranks:
        assert re.search(text, facts[case]), facts[case]


def test_an_error_changes_no_value_of_the_base(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["base is untouched"]


def test_sync_batchnorm_keeps_working_and_statistics_that_stand_still_are_not_sent(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["synced norm is a"] == "SyncBatchNorm"
    assert ranks[0]["synced norm sent"] == ranks[0]["sent"][:2]


def test_known_by_name_and_registered_twice_without_harm() -> None:
    importlib.reload(lightning_peft.strategies)
    for name, cls in (("peft_ddp", PEFTDDPStrategy), ("peft_federated", PEFTFederatedStrategy)):
        assert type(StrategyRegistry.get(name)) is cls


YAML = """
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  strategy:
    class_path: PEFTFederatedStrategy
    init_args:
      local_steps: 5
      sample_weights: [1.0]
      timeout: 0:01:00
      method: {class_path: LoRA, init_args: {r: 3, target_modules: [a, b]}}
"""


@pytest.mark.filterwarnings("ignore")  # what Lightning calls and jsonargparse has deprecated
def test_the_command_line_builds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "run.yaml").write_text(YAML)

    def strategy(*arguments: str) -> Any:
        monkeypatch.setattr("sys.argv", ["run.py", "--config", str(tmp_path / "run.yaml"), *arguments])
        return LightningCLI(Net, run=False, save_config_callback=None, seed_everything_default=False).trainer.strategy

    federated = strategy()
    assert type(federated) is PEFTFederatedStrategy
    assert federated.method == LoRA(r=3, target_modules=("a", "b"))
    assert (federated.local_steps, federated.sample_weights) == (5, (1.0,))
    assert type(strategy("--trainer.strategy=peft_ddp")) is PEFTDDPStrategy
    assert strategy("--trainer.strategy=PEFTDDPStrategy", "--trainer.strategy.method=LoRA").method == LoRA()


@pytest.mark.parametrize("argument", ["find_unused_parameters", "static_graph", "ddp_comm_hook", "bucket_cap_mb"])
def test_arguments_of_the_wrapper_are_refused(argument: str) -> None:
    with pytest.raises(AdapterError, match=f"PEFTDDPStrategy: there is no argument '{argument}'.*leave it out"):
        PEFTDDPStrategy(**{argument: True})


def test_messages_are_cut_by_dtype_and_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning_peft.strategies import ranks as here

    sent: list[Tensor] = []
    monkeypatch.setattr(here.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(here.dist, "all_reduce", lambda t: sent.append(t.clone()) or t.mul_(2))
    tensors = [torch.randn(3, 5).T, torch.randn(7), torch.randn(2, dtype=torch.bfloat16), torch.randn(11)]
    before = [t.clone() for t in tensors]
    here.average(tensors, cap_bytes=100)
    assert [(t.numel(), t.dtype) for t in sent] == [
        (15 + 7, torch.float32),
        (11, torch.float32),
        (2, torch.bfloat16),
    ]
    for one, other in zip(tensors, before, strict=True):
        assert torch.equal(one, other)
