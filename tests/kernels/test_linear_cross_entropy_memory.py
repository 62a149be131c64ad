"""What linear_cross_entropy holds, saves and multiplies, by budget, and that it waits for nothing."""

import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_peft.kernels import linear_cross_entropy
from tests.kernels.linear_cross_entropy import batch, compare, in_products, in_rows, module, plain, tiled, twin_only
from tests.kernels.rule import DEVICE

pytestmark = twin_only


def test_rows_of_a_tile_can_be_read_in_wide_words() -> None:
    tile = module._Tiles(torch.randn(3, 4).half(), torch.randn(37, 4).half(), 2, 0).make(slice(1, 3), slice(5, 30))
    assert tile.shape == (2, 25)
    assert tile.stride() == (48, 1)


def saved_bytes(loss_of: Any) -> int:
    """What autograd keeps for the backward, each storage once."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_of()
    return sum(storages.values())


def test_what_is_saved_for_backward() -> None:
    T, D, V = 64, 16, 500
    x, weight, bias, labels = batch((T, D), V)
    small = 64  # the denominator of the mean
    frozen = saved_bytes(lambda: linear_cross_entropy(x, weight, labels, bias))
    assert 4 * T * D <= frozen <= 4 * T * D + small
    weight.requires_grad_()
    trained = saved_bytes(lambda: linear_cross_entropy(x, weight, labels, bias))
    inputs = 4 * (T * D + V * D + V) + 8 * T
    assert inputs <= trained <= inputs + 8 * T + small
    weight.requires_grad_(False)
    assert saved_bytes(lambda: linear_cross_entropy(x, weight, labels, bias, budget=0)) == trained


def peak_bytes(function: Any) -> int:
    """The most that is allocated at a time, beyond what was there before."""
    with profile(acc_events=True, activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("mode", ["chunked", "cut"])
def test_logits_never_exist_as_a_whole(mode: str, head: str) -> None:
    T, D, V = 512, 8, 2000  # all logits: 4 MB
    x, weight, bias, labels = batch((T, D), V, head_trains=head == "trained")
    of_all = peak_bytes(lambda: plain(x, weight, bias, labels).mean().backward())
    assert of_all > 4 * T * V
    with tiled(mode, V):
        module.LOGITS_BUDGET = 128 * 1024
        ours = peak_bytes(lambda: linear_cross_entropy(x, weight, labels, bias).backward())
    inputs = 4 * (T * D + V * D + V)
    assert ours < 4 * 128 * 1024 + 3 * inputs < of_all / 4


class Allocated(TorchDispatchMode):
    """Counts the bytes of what is made under it; tensors need no data for that."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.alive: dict[int, Any] = {t.untyped_storage()._cdata: None for t in there}

    def add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name not in self.alive:

            def free(_: Any) -> None:
                self.held -= size
                del self.alive[name]

            self.alive[name] = weakref.ref(storage, free)
            self.held += size
            self.peak = max(self.peak, self.held)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.add(t)
        return result


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what would be allocated, without a GPU")
def test_a_cut_loss_needs_little_beside_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    T, D, V = 8192, 2304, 256000  # Gemma-2 2B
    options = (-100, 0.0, 30.0, 0.0, 0)

    def both(x: Tensor, weight: Tensor, labels: Tensor) -> None:
        losses, shift, log_sum, _ = module._forward._init_fn(x, weight, None, labels, *options, False)
        upstream = torch.ones_like(losses)
        trains = True, False, False
        module._backward._init_fn(upstream, x, weight, None, labels, shift, log_sum, *options, *trains)

    with tiled("cut", 50):  # what is counted is what is allocated
        small = torch.randn(12, 8), torch.randn(50, 8), torch.zeros(12, dtype=torch.long)
        with Allocated(*small) as counted:
            both(*small)
        assert counted.peak == peak_bytes(lambda: both(*small))

    # on an accelerator, all but the kernels and the product that adds to its sum
    launch = defaultdict(lambda: lambda *_, **__: None)
    for where, name in (
        (in_products, "_lce_measure_products"), (in_products, "_lce_differentiate_products"), (in_rows, "_lce_merge")
    ):  # fmt: skip
        monkeypatch.setattr(where, name, launch)
    for file in (module, in_rows):
        monkeypatch.setattr(file, "runs_triton", lambda x: True)
    monkeypatch.setattr(module, "_adds_in_float32", lambda x: True)
    monkeypatch.setattr(torch, "addmm", lambda *_, out, **__: out)
    x, weight = (torch.empty(n, D, dtype=torch.bfloat16, device="meta") for n in (T, V))
    labels = torch.zeros(T, dtype=torch.long, device="meta")
    with Allocated(x, weight, labels) as counted:
        both(x, weight, labels)
    dx, tile, total, per_row = 2 * T * D, 2 * 512 * 4096, 4 * 512 * D, 4 * 4 * T
    assert counted.peak == dx + tile + total + per_row <= 45 * 2**20


def test_a_sum_in_float32_is_what_a_product_adds_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_cublas_does(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert out is total
        assert out_dtype == total.dtype == torch.float32
        return out.add_(a.float() @ b.float())

    monkeypatch.setattr(module, "_adds_in_float32", lambda x: True)
    monkeypatch.setattr(torch, "addmm", as_cublas_does)
    with tiled("cut", 127, 2):
        compare(batch((13, 17), 127, torch.bfloat16), torch.randn(13))


def operations(function: Any) -> int:
    """Multiplications and additions in matrix products."""
    with profile(acc_events=True, activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        function()
    count = 0
    for event in profiled.events():  # type: ignore[union-attr]
        if event.name in ("aten::mm", "aten::addmm_"):
            (rows, inner), (_, columns) = event.input_shapes[event.name == "aten::addmm_" :][:2]
            count += 2 * rows * inner * columns
    return count


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the products of the twin, which kernels do in part")
def test_what_a_budget_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    T, D, V = 11, 3, 61
    monkeypatch.setattr(module, "LEAST_TILE", 17 * T)  # four slices of the vocabulary
    x, weight, bias, labels = batch((T, D), V)
    enough = module.FEWEST_ROWS * V * 4
    of_frozen = {None: 4, enough: 4, enough - 1: 6, 0: 6}
    for head_trains in (False, True):
        weight.requires_grad_(head_trains)
        for budget, times in of_frozen.items():
            made = operations(lambda: linear_cross_entropy(x, weight, labels, bias, budget=budget).backward())  # noqa: B023
            assert made == (8 if head_trains else times) * T * V * D


@pytest.mark.parametrize(("trained", "forward", "backward"), [("x", 2, 0), ("x weight", 1, 3), ("weight", 1, 2)])
def test_products_for_what_is_frozen_are_left_out(trained: str, forward: int, backward: int) -> None:
    x, weight, _, labels = batch((4, 3), 9)
    x, weight = x.detach().requires_grad_("x" in trained), weight.requires_grad_("weight" in trained)

    def products(function: Any) -> tuple[int, Any]:
        with profile(acc_events=True, activities=[ProfilerActivity.CPU]) as profiled:
            result = function()
        names = [event.name for event in profiled.events()]  # type: ignore[union-attr]
        return names.count("aten::mm") + names.count("aten::addmm_"), result

    made, loss = products(lambda: linear_cross_entropy(x, weight, labels))
    assert made == forward
    assert products(loss.backward)[0] == backward
    with torch.no_grad():
        assert products(lambda: linear_cross_entropy(x, weight, labels))[0] == 1
        torch.testing.assert_close(linear_cross_entropy(x, weight, labels), loss.detach())
    assert products(lambda: linear_cross_entropy(x.detach(), weight.detach(), labels))[0] == 1


@pytest.mark.parametrize("head_trains", [False, True])
def test_nothing_waits_for_the_accelerator(head_trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for file in (module, in_rows):
        monkeypatch.setattr(file, "runs_triton", lambda x: False)
    with FakeTensorMode():  # reading a number from one of its tensors is an error
        x, labels = torch.randn(6, 4, device="cuda"), torch.randint(9, (6,), device="cuda")
        weight, bias = torch.randn(9, 4, device="cuda"), torch.randn(9, device="cuda")
        with tiled("chunked", 9):
            options = (-100, 0.1, 4.0, 0.1, module.LOGITS_BUDGET)
            rows = module._forward._init_fn(x, weight, bias, labels, *options, not head_trains)
            module._backward._init_fn(
                rows[0], x, weight, bias, labels, *rows[1:3], *options, True, head_trains, head_trains
            )
        assert linear_cross_entropy(x, weight, labels, num_items=torch.ones((), device="cuda")).shape == ()
