"""lora_linear against the formula, and what it saves for its backward pass."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_peft.kernels import lora_linear, lora_product, rms_norm
from tests.kernels.rule import DEVICE, check, every_dtype, upstreams


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, A), B)


def made(shape: tuple[int, ...], d_out: int, r: int, dtype: torch.dtype, **trains: bool) -> tuple[Any, ...]:
    wanted = {"x": True, "weight": False, "A": True, "B": True} | trains
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(d_out, shape[-1], dtype=dtype)
    A, B = torch.randn(r, shape[-1], dtype=dtype), torch.randn(d_out, r, dtype=dtype)
    for tensor, name in ((x, "x"), (weight, "weight"), (A, "A"), (B, "B")):
        tensor.requires_grad_(wanted[name])
    return x, weight, torch.randn(d_out, dtype=dtype), A, B, 0.5


@every_dtype
@pytest.mark.parametrize(("shape", "d_out", "r"), [((1, 1), 1, 1), ((2, 17, 63), 40, 3), ((129, 100), 17, 24)], ids=str)
def test_output_and_gradients(shape: tuple[int, ...], d_out: int, r: int, dtype: torch.dtype) -> None:
    for upstream in upstreams((*shape[:-1], d_out)):
        check(lora_linear, plain, made(shape, d_out, r, dtype), upstream)


@pytest.mark.parametrize("frozen", ["x", "A", "B"])
def test_nothing_is_computed_for_what_is_frozen(frozen: str) -> None:
    check(lora_linear, plain, made((5, 6), 7, 2, torch.float32, **{frozen: False}), torch.randn(5, 7))
    check(lora_linear, plain, made((5, 6), 7, 2, torch.float32, weight=True), torch.randn(5, 7))


def test_without_rows_and_with_wrong_shapes() -> None:
    x, weight, bias, A, B, s = made((0, 6), 7, 2, torch.float32)
    lora_linear(x, weight, bias, A, B, s).sum().backward()
    assert A.grad.abs().sum() == 0
    with pytest.raises(ValueError, match=r"for a weight \(7, 6\) lora_A must be \(r, 6\) and lora_B \(7, r\)"):
        lora_linear(x, weight, bias, A[:, :3], B, s)


def test_at_zero_it_is_the_layer() -> None:
    x, weight, bias, A, B, s = made((5, 6), 7, 2, torch.float32)
    assert torch.equal(lora_linear(x, weight, bias, A, 0 * B, s), F.linear(x, weight, bias))


def test_dropout_drops_the_same_in_both_directions() -> None:
    x = torch.ones(40, 50).double().requires_grad_()
    down, up = torch.eye(50).double().requires_grad_(), torch.eye(50).double().requires_grad_()
    y = lora_product(x, down, up, dropout=0.25)
    assert set(y.detach().unique().tolist()) == {0.0, 1 / 0.75}
    assert (y == 0).double().mean().item() == pytest.approx(0.25, abs=0.05)
    dx, ddown = torch.autograd.grad(y.sum(), (x, down))
    assert torch.equal(dx, y.detach())
    torch.testing.assert_close(ddown, y.detach().sum(0).expand(50, 50))
    torch.manual_seed(3)
    one = lora_product(x, down, up, dropout=0.25)
    torch.manual_seed(3)
    assert torch.equal(lora_product(x, down, up, dropout=0.25), one)
    assert not torch.equal(lora_product(x, down, up, dropout=0.25), one)
    torch.manual_seed(3)
    with torch.device("meta"):  # the default device has no say in what is drawn
        assert torch.equal(lora_product(x, down, up, dropout=0.25), one)


def saved_by(function: Callable[[], Tensor]) -> dict[int, int]:
    """Storage -> bytes of what is saved for the backward pass."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep_alive = function()
    assert keep_alive.requires_grad
    return found


def test_behind_a_norm_the_input_is_not_saved_and_is_made_once_for_all() -> None:
    x, w = torch.randn(64, 32).requires_grad_(), torch.randn(32)
    factors = [(torch.randn(2, 32).requires_grad_(), torch.randn(8, 2).requires_grad_()) for _ in range(3)]
    outputs: list[Tensor] = []

    def forward() -> Tensor:
        h = rms_norm(x, w, 1e-6)
        outputs.append(h)
        return sum(lora_product(h, A, B) for A, B in factors)  # type: ignore[return-value]

    saved = saved_by(forward)
    assert outputs[0].untyped_storage().data_ptr() not in saved
    own = {t.data_ptr() for pair in factors for t in pair} | {x.data_ptr(), w.data_ptr()}
    assert sum(n for storage, n in saved.items() if storage not in own) == 64 * 4 + 3 * 64 * 2 * 4  # rho, and x A^T
    y = forward()
    recipe = outputs[-1].recipe  # type: ignore[attr-defined]
    calls: list[int] = []
    make = recipe.make
    recipe.make = lambda *inputs: (calls.append(1), make(*inputs))[1]
    y.sum().backward()
    assert calls == [1]
    assert recipe.made is None
    expected = torch.autograd.grad(
        sum(
            F.linear(F.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w, A), B) for A, B in factors
        ),
        [x, *(t for pair in factors for t in pair)],
        torch.ones(64, 8),
    )
    for mine, theirs in zip([x.grad, *(t.grad for pair in factors for t in pair)], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_an_output_that_was_changed_in_place_is_saved_as_it_is() -> None:
    x, A, B = torch.randn(6, 4).requires_grad_(), torch.randn(2, 4).requires_grad_(), torch.randn(3, 2)
    h = rms_norm(x, None, 1e-6)
    with torch.no_grad():
        h.mul_(2)
    gradient = torch.autograd.grad(lora_product(h, A, B).sum(), A)[0]
    torch.testing.assert_close(gradient, torch.outer(B.sum(0), h.detach().sum(0)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + lora_product(rms_norm(x, None, 1e-6), self.A, self.B, dropout=0.3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_of_activation_checkpoints(reentrant: bool) -> None:
    block, x = Block(), torch.randn(5, 8).requires_grad_()
    twin = copy.deepcopy(block)
    torch.manual_seed(0)
    block(x).square().sum().backward()
    torch.manual_seed(0)
    checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(twin.A.grad, block.A.grad)
    assert torch.equal(twin.B.grad, block.B.grad)


def test_under_autocast_the_product_runs_in_low_precision_and_gradients_are_those_of_the_factors() -> None:
    x, A, B = torch.randn(6, 8).requires_grad_(), torch.randn(2, 8).requires_grad_(), torch.randn(4, 2).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, expected = lora_product(x, A, B), F.linear(F.linear(x, A), B)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    mine, theirs = (torch.autograd.grad(out.float().sum(), (x, A, B)) for out in (y, expected))
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_compiled_and_under_functional_transforms() -> None:
    torch._dynamo.reset()
    x, A, B = torch.randn(6, 8).requires_grad_(), torch.randn(2, 8).requires_grad_(), torch.randn(4, 2).requires_grad_()

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_product(rms_norm(x, None, 1e-6), A, B).square().sum()

    gradients = torch.autograd.grad(function(x, A, B), (x, A, B))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(x, A, B), (x, A, B)), gradients, strict=True):
        torch.testing.assert_close(one, other)
    h = rms_norm(x, None, 1e-6).detach()
    per_sample = torch.func.vmap(torch.func.grad(lambda A, h: lora_product(h, A, B.detach()).sum()), (None, 0))(
        A.detach(), h
    )
    torch.testing.assert_close(per_sample.sum(0), torch.autograd.grad(lora_product(h, A, B).sum(), A)[0])
