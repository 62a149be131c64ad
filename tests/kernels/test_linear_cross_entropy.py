"""linear_cross_entropy against F.cross_entropy of all logits: whole, in tiles of rows, in tiles of the vocabulary."""

import contextlib
import importlib
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_peft.kernels import linear_cross_entropy
from tests.kernels.rule import INTERPRETED, check, every_dtype, upstreams

module, in_rows, in_products = (
    importlib.import_module(f"lightning_peft.kernels.linear_cross_entropy{part}") for part in ("", "_rows", "_cut")
)
if INTERPRETED:  # several programs on each axis, several blocks in each, and none that divides a size
    in_rows.BLOCK, in_rows.N_BLOCKS = 8, 2
    in_products.PROGRAMS = 6
    in_products._blocks = lambda dtype: ({"BLOCK_T": 4, "BLOCK_V": 8, "BLOCK_D": 8}, {})
twin_only = pytest.mark.skipif(INTERPRETED, reason="of the twin, or of what both share")


@contextlib.contextmanager
def tiled(mode: str, V: int, size: int = 4) -> Iterator[None]:
    """As if memory were short: five rows of logits at a time, or five rows of a third of the vocabulary."""
    set_to = {
        "whole": {},
        "chunked": {"FEWEST_ROWS": 1, "LEAST_TILE": 1, "LOGITS_BUDGET": 5 * V * size},
        "cut": {"FEWEST_ROWS": 10**9, "CUT_ROWS": 5, "LEAST_TILE": 1, "LOGITS_BUDGET": 5 * (V // 3 + 1) * size},
    }[mode]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in set_to.items():
            patch.setattr(module, name, value)
        yield


MODES = ["chunked", "cut"] if INTERPRETED else ["whole", "chunked", "cut"]
every_mode = pytest.mark.parametrize("mode", MODES)


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, softcap: float | None = None, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """The losses of all rows, from all logits."""
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction="none",
    )  # fmt: skip
    return losses.view(labels.shape) + z_loss * logits.logsumexp(-1).square() * (labels != ignore_index)


def batch(
    shape: tuple[int, ...], V: int, dtype: torch.dtype = torch.float32, *, head_trains: bool = False, bias: bool = True
) -> tuple[Any, ...]:
    """x, weight, bias and labels, every fourth of which is to be ignored."""
    *rows, D = shape
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype).requires_grad_(head_trains)
    b = torch.randn(V, dtype=dtype).requires_grad_(head_trains) if bias else None
    labels = torch.randint(V, rows)
    labels.view(-1)[1::4] = -100
    return x, weight, b, labels


def compare(inputs: tuple[Any, ...], upstream: Tensor, **options: Any) -> None:
    """Losses and gradients by the rule, for the losses as for the logits that they come from."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, bias, reduction="none", **options).to(x.dtype)

    check(ours, lambda x, *rest: plain(x, *rest, **options).to(x.dtype), inputs, upstream)


OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 5.0},
    "z": {"z_loss": 1e-2},
    "all": {"label_smoothing": 0.2, "softcap": 8.0, "z_loss": 1e-3, "ignore_index": 3},
}


@every_dtype
@every_mode
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_and_gradients(options: dict[str, Any], head: str, mode: str, dtype: torch.dtype) -> None:
    T, V = (6, 29) if INTERPRETED else (13, 127)
    inputs = batch((T, 17), V, dtype, head_trains=head == "trained", bias="softcap" in options)
    if "ignore_index" in options:
        inputs[3][inputs[3] < 0] = 3
    with tiled(mode, V, dtype.itemsize):
        compare(inputs, torch.randn(T), **options)


SHAPES = [((1, 1), 1), ((2, 2, 3), 17)]
SHAPES += [] if INTERPRETED else [((2, 5, 3), 63), ((17, 63), 127), ((63, 1), 257), ((3, 127, 2), 5), ((4, 64), 5000)]


@every_mode
@pytest.mark.parametrize(("shape", "V"), SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], V: int, mode: str) -> None:
    smoothing = 0.1 if V > 1 else 0.0  # a gradient that is zero but for rounding has no relative error
    for upstream in upstreams(shape[:-1]):
        for head_trains in (False, True):
            with tiled(mode, V):
                compare(batch(shape, V, head_trains=head_trains), upstream, label_smoothing=smoothing)


@pytest.mark.parametrize("mode", ["chunked", "cut"])
@pytest.mark.parametrize("trained", ["x", "w", "b", "wb"])
def test_only_what_trains_gets_a_gradient(trained: str, mode: str) -> None:
    x, weight, bias, labels = batch((6, 4), 19)
    inputs = [t.detach().requires_grad_(n in trained) for n, t in zip("xwb", (x, weight, bias), strict=True)]
    with tiled(mode, 19):
        compare((*inputs, labels), torch.randn(6))


@every_mode
def test_inputs_with_gaps(mode: str) -> None:
    x, weight, bias = torch.randn(6, 10)[:, ::2].requires_grad_(), torch.randn(5, 7).T, torch.randn(14)[::2]
    with tiled(mode, 7):
        compare((x, weight, bias, torch.randint(7, (2, 6))[1]), torch.randn(6))
    labels = torch.randint(7, (12,), dtype=torch.uint8)[::2]
    with tiled("cut", 7):
        losses = linear_cross_entropy(x, weight, labels, reduction="none")
    torch.testing.assert_close(losses, plain(x, weight, None, labels.long()))


def test_reductions() -> None:
    x, weight, bias, labels = batch((3, 4, 5), 11)
    losses, valid = plain(x, weight, bias, labels), int((labels >= 0).sum())
    expected = {"mean": F.cross_entropy(F.linear(x, weight, bias).view(12, 11), labels.view(12)), "sum": losses.sum()}
    for reduction, value in expected.items():
        loss = linear_cross_entropy(x, weight, labels, bias, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, value)
        ours, theirs = torch.autograd.grad(loss, x)[0], torch.autograd.grad(value, x, retain_graph=True)[0]
        torch.testing.assert_close(ours, theirs)
    for num_items in (7, 2.5, torch.tensor(7), torch.tensor([2.5])):
        loss = linear_cross_entropy(x, weight, labels, bias, num_items=num_items)
        torch.testing.assert_close(loss, losses.sum() / float(num_items))
    assert valid not in (7, 12)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("head_trains", [False, True])
def test_nothing_but_ignored_rows_is_zero(head_trains: bool, num_items: Any) -> None:
    x, weight, bias, labels = batch((5, 4), 9, head_trains=head_trains)
    for rows in (slice(None), slice(0, 0)):
        loss = linear_cross_entropy(
            x[rows], weight, torch.full_like(labels, -100)[rows], bias, z_loss=0.1, num_items=num_items
        )
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, [t for t in (x, weight, bias) if t.requires_grad]):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@every_mode
def test_ignored_rows_get_nothing(mode: str) -> None:
    x, weight, bias, labels = batch((9, 4), 23)
    with tiled(mode, 23):
        losses = linear_cross_entropy(
            x, weight, labels, bias, reduction="none", label_smoothing=0.1, z_loss=0.1, softcap=4.0
        )
        (dx,) = torch.autograd.grad(losses, x, torch.full((9,), 1e30))
    assert (losses[labels < 0] == 0).all()
    assert (dx[labels < 0] == 0).all()
    assert (dx[labels >= 0] != 0).all()


@every_mode
def test_labels_at_the_borders_of_blocks_and_rows_that_nobody_asks_for(mode: str) -> None:
    V = 29  # blocks of 8 in the kernels: the last is narrower, and so is the last tile
    x, weight, bias, labels = batch((13, 5), V)
    labels[:] = torch.tensor([0, 7, 8, 15, -100, -100, -100, -100, 16, 23, 24, 27, 28])  # rows 4 to 7 are one block
    with tiled(mode, V):
        compare((x, weight, bias, labels), torch.randn(13), label_smoothing=0.1, z_loss=1e-2)


@twin_only
def test_rows_of_a_tile_can_be_read_in_wide_words() -> None:
    tile = module._Tiles(torch.randn(3, 4).half(), torch.randn(37, 4).half(), 2, 0).make(slice(1, 3), slice(5, 30))
    assert tile.shape == (2, 25)
    assert tile.stride() == (48, 1)


@twin_only
def test_micro_batches_add_up_to_the_batch() -> None:
    x, weight, _, labels = batch((8, 4), 23)
    labels[:3] = -100
    items = (labels >= 0).sum()
    (whole,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels), x)
    parts = [linear_cross_entropy(x[i : i + 2], weight, labels[i : i + 2], num_items=items) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), x)[0], whole)  # type: ignore[arg-type]


@every_mode
def test_labels_that_are_nearly_certain(mode: str) -> None:
    # P_y - 1 is about -1e-7: nothing is left of it where P_y is rounded first, or where max + log sum is one number
    x, weight, labels = torch.eye(6, 12).mul(20).requires_grad_(), torch.eye(12), torch.arange(6)
    with tiled(mode, 12):
        compare((x, weight, None, labels), torch.ones(6))


def test_logits_that_are_far_from_zero_or_infinite() -> None:
    x, weight, labels = torch.ones(3, 1).requires_grad_(), torch.zeros(40, 1), torch.tensor([0, 7, 39])
    bias = torch.linspace(500, 620, 40)  # exp of the difference is more than float32 can hold
    bias[8:30] = -torch.inf  # entries of the vocabulary that are switched off; some tiles have no others
    for b in (bias, bias.flip(0)):
        with tiled("cut", 24):
            compare((x, weight, b, labels), torch.ones(3), z_loss=1e-4)


@twin_only
def test_small_entries_survive_float16() -> None:
    # label smoothing adds s / V = 5e-7 everywhere, while float16 counts in steps of 6e-8
    V, labels = 40000, torch.zeros(2, dtype=torch.long)
    x, weight = torch.full((2, 4), 2.0).half().requires_grad_(), (torch.randn(V, 4) / 8 + 1).half()
    weight[0] = 6
    losses = linear_cross_entropy(x, weight, labels, label_smoothing=0.02, reduction="none")
    (dx,) = torch.autograd.grad(losses.sum(), x)
    exact = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(plain(exact, weight.double(), None, labels, label_smoothing=0.02).sum(), exact)
    assert (dx - truth).norm() / truth.norm() < 1e-3


@every_mode
def test_labels_out_of_range(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, labels = batch((4, 3), 11)
    for wrong in (11, -1):
        labels[2] = wrong
        if not INTERPRETED:
            with pytest.raises(ValueError, match=rf"labels must be 0 to 10 or ignore_index=-100, got {wrong} "):
                linear_cross_entropy(x, weight, labels, bias)
    monkeypatch.setattr(module, "_check_range", lambda *_: None)  # on an accelerator it would have to wait
    for wrong in (11, -1, 2**32 + 3):
        labels[2] = wrong
        with tiled(mode, 11):
            losses = linear_cross_entropy(x, weight, labels, bias, reduction="none")
            (dx,) = torch.autograd.grad(losses.sum(), x)
        assert losses.isnan().tolist() == dx.isnan().all(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_of_gradients_are_refused(reduction: Any) -> None:
    for head_trains in (False, True):
        x, weight, bias, labels = batch((4, 3), 9, head_trains=head_trains)
        loss = linear_cross_entropy(x, weight, labels, bias, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="gradients of gradients are not there"):
            torch.autograd.grad(loss, x, create_graph=True)


@twin_only
def test_autocast_chooses_the_dtype_of_the_product() -> None:
    x, weight, bias, labels = batch((5, 8), 30, head_trains=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels, bias)
    assert loss.dtype == torch.float32
    inputs = [t.detach().bfloat16().requires_grad_() for t in (x, weight, bias)]
    low = linear_cross_entropy(*inputs[:2], labels, inputs[2])
    assert torch.equal(loss, low)
    for wide, narrow in zip(
        torch.autograd.grad(loss, (x, weight, bias)), torch.autograd.grad(low, inputs), strict=True
    ):
        assert wide.dtype == torch.float32
        assert torch.equal(wide, narrow.float())


def saved_bytes(loss_of: Any) -> int:
    """What autograd keeps for the backward, each storage once."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_of()
    return sum(storages.values())


@twin_only
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@twin_only
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
        self.alive: dict[int, Any] = {}
        for t in there:
            self.add(t)
        self.held = self.peak = 0

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


@twin_only
def test_a_cut_loss_needs_little_beside_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    T, D, V = 8192, 2304, 256000  # Gemma-2 2B
    options = (-100, 0.0, 30.0, 0.0, 0)

    def both(x: Tensor, weight: Tensor, labels: Tensor) -> None:
        losses, shift, log_sum, _ = module._forward._init_fn(x, weight, None, labels, *options, False)
        upstream = torch.ones_like(losses)
        module._backward._init_fn(
            upstream, x, weight, None, labels, shift, log_sum, *options, True, False, False
        )  # fmt: skip

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
    monkeypatch.setattr(in_rows, "runs_triton", lambda x: True)
    monkeypatch.setattr(module, "_adds_in_float32", lambda x: True)
    monkeypatch.setattr(torch, "addmm", lambda *_, out, **__: out)
    x, weight = (torch.empty(n, D, dtype=torch.bfloat16, device="meta") for n in (T, V))
    labels = torch.zeros(T, dtype=torch.long, device="meta")
    with Allocated(x, weight, labels) as counted:
        both(x, weight, labels)
    dx, tile, total, per_row = 2 * T * D, 2 * 512 * 4096, 4 * 512 * D, 4 * 4 * T
    assert counted.peak == dx + tile + total + per_row <= 45 * 2**20


@twin_only
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
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        function()
    count = 0
    for event in profiled.events():  # type: ignore[union-attr]
        if event.name in ("aten::mm", "aten::addmm_"):
            (rows, inner), (_, columns) = event.input_shapes[event.name == "aten::addmm_" :][:2]
            count += 2 * rows * inner * columns
    return count


@twin_only
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


@twin_only
@pytest.mark.parametrize(("trained", "forward", "backward"), [("x", 2, 0), ("x weight", 1, 3), ("weight", 1, 2)])
def test_products_for_what_is_frozen_are_left_out(trained: str, forward: int, backward: int) -> None:
    x, weight, _, labels = batch((4, 3), 9)
    x, weight = x.detach().requires_grad_("x" in trained), weight.requires_grad_("weight" in trained)

    def products(function: Any) -> tuple[int, Any]:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
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


@twin_only
@pytest.mark.parametrize("head_trains", [False, True])
def test_nothing_waits_for_the_accelerator(head_trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(in_rows, "runs_triton", lambda x: False)
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


@twin_only
def test_recomputed_activations_give_the_same() -> None:
    x, weight, bias, labels = batch((4, 3), 9)
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, labels, bias), x)[0]
    loss = checkpoint(linear_cross_entropy, x, weight, labels, bias, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@twin_only
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("ignored", [0.25, 1.0])
def test_compiled_is_the_same(ignored: float, head_trains: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for T in (8, 12, 16):
        x, weight, bias, labels = batch((T, 3), 9, head_trains=head_trains)
        labels[: int(ignored * T)] = -100
        wanted = [t for t in (x, weight, bias) if t.requires_grad]
        once, again = (
            [loss, *torch.autograd.grad(loss, wanted)]
            for loss in (f(x, weight, labels, bias, label_smoothing=0.1) for f in (linear_cross_entropy, compiled))
        )
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@twin_only
def test_the_operation_is_well_behaved() -> None:
    for head_trains in (False, True):
        x, weight, bias, labels = batch((5, 3), 7, head_trains=head_trains)
        rest = (-100, 0.1, 5.0, 0.1, module.LOGITS_BUDGET, not head_trains)
        torch.library.opcheck(module._forward, (x, weight, bias, labels, *rest))
        torch.library.opcheck(
            module._forward,
            (x.detach()[:, :1].T, weight.detach()[:, :1].expand(7, 5), None, labels[:1], *rest[:5], False),
        )
        inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, bias)]
        for mode in MODES:
            with tiled(mode, 7, 8):
                assert torch.autograd.gradcheck(
                    lambda x, weight, bias: linear_cross_entropy(
                        x, weight, labels, bias, reduction="none", label_smoothing=0.1, softcap=3.0, z_loss=0.1  # noqa: B023
                    ),
                    inputs,
                )  # fmt: skip


sizes = st.integers(1, 9)
property_test = settings(max_examples=20, deadline=None, derandomize=True)


@twin_only
@property_test
@given(
    sizes, sizes, st.integers(2, 40), st.floats(-5, 5), st.floats(0, 1), st.sampled_from(["whole", "chunked", "cut"])
)
def test_moving_all_logits_changes_nothing(T: int, D: int, V: int, c: float, s: float, mode: str) -> None:
    x, weight, bias, labels = batch((T, D), V, torch.float64)
    bias.requires_grad_()
    with tiled(mode, V, 8):
        losses, moved = (
            linear_cross_entropy(x, weight, labels, b, reduction="none", label_smoothing=s) for b in (bias, bias + c)
        )
        torch.testing.assert_close(moved, losses)
        db = torch.autograd.grad(losses.sum(), bias)[0]
    assert abs(db.sum()) < 1e-10  # so the gradients of all logits of a row add up to zero


@twin_only
@property_test
@given(sizes, sizes, st.integers(2, 40), st.randoms(use_true_random=False))
def test_order_of_the_vocabulary_and_tiles_change_nothing(T: int, D: int, V: int, random: Any) -> None:
    x, weight, bias, labels = batch((T, D), V, torch.float64)
    order = torch.tensor(random.sample(range(V), V))
    place = order.argsort()
    results = []
    for mode, w, b, y in (
        ("whole", weight, bias, labels),
        ("chunked", weight, bias, labels),
        ("cut", weight, bias, labels),
        ("cut", weight[order], bias[order], torch.where(labels < 0, labels, place[labels.clamp(min=0)])),
    ):
        with tiled(mode, V, 8):
            loss = linear_cross_entropy(x, w, y, b, softcap=4.0, label_smoothing=0.1, reduction="sum")
            results.append((loss, torch.autograd.grad(loss, x)[0]))
    for loss, dx in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(dx, results[0][1])


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, labels = batch((2, 4, 3), 9)
    for arguments, options, message in (
        ((x, weight[:, :2], labels), {}, r"weight must be \(V, D\) for x \(\.\.\., D\), got \(9, 2\) for \(2, 4, 3\)"),
        ((x, weight, labels[:1]), {}, r"labels must be integers of shape \(2, 4\).* pass x\[:, :-1\]"),
        ((x, weight, labels.float()), {}, "labels must be integers"),
        ((x, weight, labels, bias[:4]), {}, r"bias must be \(9,\)"),
        ((x, weight.half(), labels), {}, r"one floating dtype, got torch\.float32, torch\.float16"),
        ((x, weight, labels), {"label_smoothing": 1.5}, "label_smoothing must be 0 to 1, got 1.5"),
        ((x, weight, labels), {"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ((x, weight, labels), {"z_loss": -1.0}, "z_loss must be >= 0"),
        ((x, weight, labels), {"reduction": "avg"}, "reduction must be one of none, mean, sum, got 'avg'"),
        ((x, weight, labels), {"reduction": "sum", "num_items": 3}, "num_items is what reduction='mean' divides by"),
        ((x, weight, labels), {"num_items": torch.ones(2)}, "num_items must be one number"),
        ((x, weight, labels), {"num_items": -1}, "num_items must be >= 0"),
        ((x, weight, labels), {"budget": -1}, "budget must be a number of bytes, 0 or more, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, **options)
    sharded = weight.clone()
    sharded.full_tensor = lambda: weight  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="weight is sharded"):
        linear_cross_entropy(x, sharded, labels)
