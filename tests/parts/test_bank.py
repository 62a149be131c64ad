"""Banks: the same numbers everywhere, once in memory, and in no file."""

import copy
import gc
import pickle
import weakref
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from lightning_peft import VeRA, inject
from lightning_peft.parts.bank import bank


def held(model: nn.Module) -> list[int]:
    """Where in memory the numbers lie that each adapter of ``model`` reads."""
    return [numbers.data_ptr() for layer in model for numbers in layer.adapters["default"].numbers()]


def net() -> nn.Sequential:
    return inject(nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 30), nn.Linear(30, 2)), VeRA(r=5))


def test_the_numbers_are_those_of_the_mersenne_twister() -> None:
    """With others, an adapter that was saved elsewhere, or with another version of torch, would be another one."""
    twister = np.random.RandomState(zlib.crc32(b"vera_A/0/3"))._bit_generator
    expected = [2 * (int(number) % 2**24) / 2**24 - 1 for number in twister.random_raw(600)]
    assert bank("vera_A", 0, 3).rows(200, torch.zeros(())).flatten().tolist() == expected


def test_the_numbers_are_uniform() -> None:
    numbers = bank("A", 0, 100).rows(1000, torch.zeros(())).double()
    assert numbers.abs().max() <= 1
    # 100,000 draws: five standard errors of the mean and of the variance, which is 1/3
    assert abs(numbers.mean()) < 5 * (1 / 3 / 1e5) ** 0.5
    assert abs(numbers.var() - 1 / 3) < 5 * (4 / 45 / 1e5) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_a_bank_that_grows_keeps_its_first_rows(n: int) -> None:
    like = torch.zeros(())
    small = bank("A", 3, 11).rows(n, like).clone()
    gc.collect()
    assert torch.equal(bank("A", 3, 11).rows(1000, like)[:n], small)
    assert torch.equal(bank("A", 3, 11).rows(n, like), small)


def test_names_seeds_and_widths_have_numbers_of_their_own() -> None:
    like = torch.zeros(())
    banks = [bank("A", 0, 8), bank("B", 0, 8), bank("A", 1, 8), bank("A", 0, 9)]
    assert len({tuple(b.rows(1, like)[0, :8].tolist()) for b in banks}) == 4


def test_all_layers_read_one_bank_also_after_casts_and_copies() -> None:
    model = net()
    a, b = held(model)[:2]
    assert a != b
    assert held(model) == [a, b] * 3
    assert held(copy.deepcopy(model)) == [a, b] * 3
    assert held(pickle.loads(pickle.dumps(model))) == [a, b] * 3
    assert len(set(held(model.double()))) == 2
    rounded = model[0].adapters["default"].numbers()[0]
    assert rounded.dtype == torch.float64
    assert torch.equal(rounded.float(), bank("vera_A", 0, 5).rows(9, torch.zeros(()))), "drawn in single precision"


def test_nothing_of_a_bank_is_saved_or_sent() -> None:
    model = inject(nn.Sequential(nn.Linear(100, 100)), VeRA(r=500))
    numbers = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    assert numbers == 100 * 100 + 100 + 500 + 100 + 1, "weight, bias, two vectors, the scaling"
    assert len(pickle.dumps(model)) < 4 * numbers + 10_000


def test_a_bank_goes_with_the_last_adapter() -> None:
    model = inject(nn.Sequential(nn.Linear(4, 4)), VeRA(r=77))
    seen = weakref.ref(model[0].adapters["default"].banks[0])
    assert seen() is not None
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bank_that_was_first_read_in_inference_mode_can_be_trained_with(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        rows = bank("A", 4, 6).rows(3, torch.zeros((), dtype=dtype))
    weight = torch.ones(6, 1, dtype=dtype, requires_grad=True)
    (rows @ weight).sum().backward()
    torch.testing.assert_close(weight.grad[:, 0], rows.sum(0))


def test_a_loaded_model_compiles_whole() -> None:
    torch._dynamo.reset()
    pickled, x = pickle.dumps(net()), torch.ones(2, 9)
    gc.collect()
    model = pickle.loads(pickled)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_a_model_that_was_cast_compiles_whole() -> None:
    torch._dynamo.reset()
    model, x = net().double(), torch.ones(2, 9, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
