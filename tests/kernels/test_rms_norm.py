"""rms_norm against the formula; as its twin here, and as its kernel where LIGHTNING_PEFT_KERNELS=interpret."""

import pytest
import torch
from torch import Tensor

from lightning_peft.kernels import rms_norm
from lightning_peft.kernels.rms_norm import _eager, _forward
from tests.kernels.rule import INTERPRETED, check, every_dtype, upstreams


def plain(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * (offset + weight.to(y.dtype))).to(x.dtype)


def ours(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    return rms_norm(x, weight, eps, offset=offset)


SHAPES = [(4, 1), (3, 17), (2, 5, 63), (33, 127), (7, 257), *([] if INTERPRETED else [(2, 5000)])]


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight", ["none", "frozen", "trained"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_output_and_gradients(shape: tuple[int, ...], weight: str, offset: float, dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    w = None if weight == "none" else torch.randn(shape[-1], dtype=dtype).requires_grad_(weight == "trained")
    eps = 1e-6 if shape[-1] > 1 else 0.5  # a row of one element is a constant but for eps
    for upstream in upstreams(shape):
        check(ours, plain, (x, w, eps, offset), upstream)


def test_rows_longer_than_a_block() -> None:
    x = torch.randn(2, 4100).requires_grad_()
    check(ours, plain, (x, torch.randn(4100).requires_grad_(), 1e-6, 0.0), torch.randn(2, 4100))


def test_an_input_with_gaps_and_an_empty_one() -> None:
    x = torch.randn(5, 40)[:, ::2].requires_grad_()
    check(ours, plain, (x, torch.randn(20), 1e-6, 0.0), torch.randn(5, 20))
    empty = torch.randn(0, 8).requires_grad_()
    rms_norm(empty, torch.ones(8), 1e-6).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 8)


def test_properties() -> None:
    x, w = torch.randn(6, 32).requires_grad_(), torch.randn(32)
    torch.testing.assert_close(rms_norm(5 * x, w, 0.0), rms_norm(x, w, 0.0))
    dx = torch.autograd.grad(rms_norm(x, w, 0.0), x, torch.randn(6, 32))[0]
    assert (dx * x).sum(-1).abs().max() < 1e-4  # rescaling a row changes nothing


@pytest.mark.skipif(INTERPRETED, reason="the kernel rounds in another order")
def test_the_twin_called_by_itself_is_the_operation() -> None:
    x, weight, upstream = (torch.randn(shape, device="cpu") for shape in ((3, 8), (8,), (3, 8)))
    inputs = (x.requires_grad_(), weight.requires_grad_(), 1e-6, 0.5)
    ours, registered = (f(*inputs)[0] for f in (_eager, _forward))
    assert torch.equal(ours, registered)
    for one, other in zip(*(torch.autograd.grad(y, inputs[:2], upstream) for y in (ours, registered)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
def test_the_operation_is_well_behaved() -> None:
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(_forward, (x, w, 1e-6, 0.0))
    torch.library.opcheck(_forward, (torch.randn(8, 3).T.detach().requires_grad_(), None, 1e-6, 0.0))
    x, w = torch.randn(3, 8).double().requires_grad_(), torch.randn(8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6, offset=0.5), (x, w))
    with pytest.raises(ValueError, match=r"weight must be \(8,\)"):
        rms_norm(x, w[:3], 1e-6)
