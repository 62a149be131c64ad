"""linear_cross_entropy against F.cross_entropy of all logits: whole, in tiles of rows, in tiles of the vocabulary."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_peft.kernels import linear_cross_entropy
from tests.kernels.linear_cross_entropy import (
    MODES,
    batch,
    compare,
    every_mode,
    in_products,
    in_rows,
    kernels_only,
    module,
    plain,
    tiled,
    twin_only,
)
from tests.kernels.rule import DEVICE, INTERPRETED, every_dtype, upstreams

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
    x, weight, bias = torch.randn(6, 22)[:, ::2].requires_grad_(), torch.randn(11, 7).T, torch.randn(14)[::2]
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
    labels[:] = -100
    for rows in (slice(None), slice(0, 0)):
        for budget in (None, 0):
            loss = linear_cross_entropy(
                x[rows], weight, labels[rows], bias, z_loss=0.1, num_items=num_items, budget=budget
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


@kernels_only
def test_kernels_of_cut_mode_need_no_product_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Tiles, "make", None)
    with tiled("cut", 19):
        compare(batch((6, 4), 19), torch.randn(6))


@kernels_only
def test_a_kernel_writes_into_its_tile_and_nowhere_else() -> None:
    memory = torch.full((7, 24), 7.0)
    tile, per_row = memory[1:6, 2:13], (torch.zeros(5), torch.full((5,), 11.0).log(), torch.ones(5))
    x, weight, labels = torch.zeros(5, 3), torch.zeros(11, 3), torch.arange(5)
    in_products.differentiate(tile, x, weight, None, 0, labels, *per_row, 11, in_rows.Loss(-100, 0.0, None, 0.0))
    expected = torch.full((7, 24), 7.0)
    expected[1:6, 2:13] = 1 / 11 - torch.eye(5, 11)
    torch.testing.assert_close(memory, expected)


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
        if not INTERPRETED and DEVICE == "cpu":
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
    with torch.autocast(DEVICE, torch.bfloat16):
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
        ((x, weight, labels), {"label_smoothing": 1.5}, "label_smoothing must be a number in \\[0, 1\\], got 1.5"),
        ((x, weight, labels), {"softcap": 0.0}, "softcap must be a number > 0, got 0.0"),
        ((x, weight, labels), {"z_loss": -1.0}, "z_loss must be a number >= 0"),
        ((x, weight, labels), {"reduction": "avg"}, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
        ((x, weight, labels), {"reduction": "sum", "num_items": 3}, "num_items is what reduction='mean' divides by"),
        ((x, weight, labels), {"num_items": torch.ones(2)}, "num_items must be one number"),
        ((x, weight, labels), {"num_items": -1}, "num_items must be a number >= 0"),
        ((x, weight, labels), {"budget": -1}, "budget must be a number of bytes >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, **options)
    sharded = weight.clone()
    sharded.full_tensor = lambda: weight  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="weight is sharded"):
        linear_cross_entropy(x, sharded, labels)
