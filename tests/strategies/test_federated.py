"""peft_federated on two processes, against two clients trained by hand in one."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_peft import AdapterError, LoRA, PEFTFederatedStrategy, inject
from lightning_peft.engine import adapters_of
from tests.strategies.launch import launched
from tests.strategies.nets import METHOD, Net, federated_by_hand

EXACT = {"rtol": 0, "atol": 0}
ROUNDED = {"rtol": 1e-4, "atol": 2e-6}  # a mean is rounded in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes write."""
    return tmp_path_factory.mktemp("federated")


@pytest.fixture(scope="module")
def clients(folder: Path) -> list[dict[str, Any]]:
    """What each of two clients saw: one launch for all tests."""
    return launched("federated_script.py", folder)


def same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


def mean(first: float, second: float) -> Callable[..., dict[str, Tensor]]:
    """A server that weighs the two clients so."""

    def server(trained: list[dict[str, Tensor]], number: int) -> dict[str, Tensor]:
        return {name: first * trained[0][name] + second * trained[1][name] for name in trained[0]}

    return server


def fair(trained: list[dict[str, Tensor]], number: int) -> dict[str, Tensor]:
    """LoRA-FAIR with dense matrices, weights 0.4 and 0.6."""
    result = mean(0.4, 0.6)(trained, number)
    for name in result:
        if name.endswith("lora_A"):
            other = name.removesuffix("A") + "B"
            a, b = result[name], result[other]
            missed = 0.4 * trained[0][other] @ trained[0][name] + 0.6 * trained[1][other] @ trained[1][name] - b @ a
            result[other] = b + missed @ a.T @ torch.linalg.inv(a @ a.T + 0.01 * torch.eye(len(a)))
    return result


RUNS: dict[str, dict[str, Any]] = {
    "fedavg": {"server": mean(0.4, 0.6), "local_steps": 2, "steps": 4},  # 8 and 12 samples
    "partial": {"server": mean(0.4, 0.6), "local_steps": 3, "steps": 4},
    "weighted": {"server": mean(0.75, 0.25), "local_steps": 2, "steps": 4},
    "reset": {"server": mean(0.4, 0.6), "local_steps": 2, "steps": 4, "adam": True},
    "kept": {"server": mean(0.4, 0.6), "local_steps": 2, "steps": 4, "adam": True, "keep": True},
    "lora-fair": {"server": fair, "local_steps": 2, "steps": 4},
    "ffa-lora": {"server": mean(0.4, 0.6), "local_steps": 2, "steps": 4, "freeze": "lora_A"},
}
by_run = pytest.mark.parametrize("run", RUNS)


@pytest.mark.parametrize("run", [*RUNS, "half", "saved", "statistics", "toggled"])
def test_clients_end_bit_for_bit_equal(run: str, clients: list[dict[str, Any]]) -> None:
    same(clients[0][run], clients[1][run], **EXACT)


@by_run
def test_the_same_result_as_two_clients_by_hand(run: str, clients: list[dict[str, Any]]) -> None:
    _, expected = federated_by_hand(**RUNS[run])
    same(clients[0][run], dict(expected), **ROUNDED)


def test_each_setting_of_these_runs_matters() -> None:
    results = [federated_by_hand(**RUNS[run])[1]["net.c.adapters.default.lora_B"] for run in RUNS]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert not torch.allclose(one, other, **ROUNDED)


def test_clients_differ_inside_a_round_and_agree_after_it(clients: list[dict[str, Any]]) -> None:
    for step, (one, other) in enumerate(zip(clients[0]["fedavg states"], clients[1]["fedavg states"], strict=True)):
        equal = all(torch.equal(value, other[key]) for key, value in one.items())
        assert equal == (step % 2 == 1)
    assert clients[0]["gradients reduced"] == 0


def test_only_what_trains_moves(clients: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    start = inject(Net(), METHOD).state_dict()
    for key, value in clients[0]["fedavg"].items():
        assert torch.equal(value, start[key]) == (key.startswith("net") and "adapters" not in key and "head" not in key)


def test_the_clients_that_take_part_change_from_round_to_round(clients: list[dict[str, Any]]) -> None:
    def server(chosen: list[int]) -> Callable[..., dict[str, Tensor]]:
        return lambda trained, number: trained[chosen[number]]

    # one of two takes part in each of six rounds: the result tells which it was
    possible = [[number >> i & 1 for i in range(6)] for number in range(64)]
    found = []
    for chosen in possible:
        _, expected = federated_by_hand(server(chosen), local_steps=1, steps=6)
        if all(torch.allclose(value, expected[key], **ROUNDED) for key, value in clients[0]["half"].items()):
            found.append(chosen)
    assert len(found) == 1
    assert set(found[0]) == {0, 1}


def test_a_run_that_is_resumed_goes_on_with_the_same_draws(clients: list[dict[str, Any]]) -> None:
    for facts in clients:
        same(facts["resumed"], clients[0]["half"], **EXACT)


def test_with_one_factor_frozen_the_product_is_the_mean_of_the_products(clients: list[dict[str, Any]]) -> None:
    rounds, _ = federated_by_hand(**RUNS["ffa-lora"])
    torch.manual_seed(0)
    start = inject(Net(), METHOD).state_dict()
    for block in "abc":
        name = f"net.{block}.adapters.default.lora_"
        a = clients[0]["ffa-lora"][name + "A"]
        assert torch.equal(a, start[name + "A"])
        products = [trained[name + "B"] @ a for trained in rounds[-1]]
        found = clients[0]["ffa-lora"][name + "B"] @ a
        torch.testing.assert_close(found, 0.4 * products[0] + 0.6 * products[1], **ROUNDED)
    assert clients[0]["ffa-lora trains again"]


def test_of_an_embedding_the_factor_that_starts_at_random_is_frozen(clients: list[dict[str, Any]]) -> None:
    state = clients[0]["embedding"]
    torch.manual_seed(0)
    start = inject(torch.nn.ModuleDict({"words": torch.nn.Embedding(9, 6)}), LoRA(r=2, target_modules="words"))
    (_, _, adapter), *_ = adapters_of(start)
    assert state["adapters.default.lora_A"].any()
    assert torch.equal(state["adapters.default.lora_B"], adapter.lora_B)


def test_what_is_saved_when_training_ends_is_the_servers(clients: list[dict[str, Any]], folder: Path) -> None:
    _, expected = federated_by_hand(mean(0.4, 0.6), local_steps=10, steps=4)
    same(clients[0]["saved"], dict(expected), **ROUNDED)
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    key = next(key for key in stored if "c.lora_B" in key)
    assert torch.equal(stored[key], clients[0]["saved"]["net.c.adapters.default.lora_B"])


def test_a_client_sees_all_of_its_own_data(clients: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(clients):
        assert facts["seen"] == [100.0 * rank + i for i in range(8)]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("other number of batches", r"the clients have 2, 3 batches in an epoch.*limit_train_batches=2\)"),
        ("number of weights", r"there are 2 clients, .* sizes \(8, 12\) and sample_weights \(1.0, 2.0, 3.0\)"),
        ("not low-rank", r"'lora-fair' is for low-rank adapters.*found \w+ on 'net.a'. Use aggregation='fedavg'"),
        ("no adapter", r"'ffa-lora' is for low-rank adapters.*found no adapter at all"),
        ("other parameters", "the clients have trained different parameters in this round"),
        ("other base", r"rank 1 differs from rank 0 in 1 of \d+ tensors: net.b.weight \(values\)"),
    ],
)
def test_what_clients_cannot_do_together_is_an_error_on_all_ranks(
    case: str, text: str, clients: list[dict[str, Any]]
) -> None:
    for facts in clients:
        assert re.search(text, facts[case]), facts[case]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"local_steps": 0}, "local_steps must be an integer >= 1, got 0"),
        ({"participation": 0.0}, r"participation must be a number in \(0, 1\], got 0.0"),
        ({"participation": 1.5}, "participation must be"),
        ({"sample_weights": (1.0, 0.0)}, "sample_weights must be numbers > 0"),
        ({"aggregation": "lorafair"}, "aggregation must be one of 'fedavg', 'ffa-lora', 'lora-fair', got 'lorafair'"),
        ({"find_unused_parameters": True}, "PEFTFederatedStrategy: there is no argument 'find_unused_parameters'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(AdapterError, match=text):
        PEFTFederatedStrategy(**arguments)
