"""rope against the formula; as its twin here, as its kernel where interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_peft.kernels import rope
from lightning_peft.kernels.rope import _rotate
from tests.kernels.rule import INTERPRETED, check, every_dtype, upstreams


def angles(positions: Tensor, d_rot: int) -> tuple[Tensor, Tensor]:
    """cos and sin (..., T, d_rot) with both halves filled, as transformers makes them."""
    frequencies = 100.0 ** (-torch.arange(0, d_rot, 2) / d_rot)
    angle = positions[..., None] * frequencies
    return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (each.to(x.dtype).reshape(-1, 1, *each.shape[-2:]) for each in (cos, sin))
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    x1, x2 = rotated.chunk(2, -1)
    return torch.cat([rotated * cos + torch.cat([-x2, x1], -1) * sin, rest], -1)


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([turned(q, cos, sin), turned(k, cos, sin)], 1)


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat(rope(q, k, cos, sin), 1)


CASES = {  # (B, H, H_k, T, d, d_rot)
    "one": (1, 1, 1, 1, 2, 2),
    "shared keys": (2, 6, 2, 3, 8, 8),
    "odd half": (1, 3, 3, 5, 34, 34),
    "partial": (2, 3, 1, 3, 21, 6),
    "partial, even": (1, 2, 2, 3, 16, 8),
    "many heads": (1, 37, 5, 2, 128, 128),
}


@every_dtype
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients(case: tuple[int, ...], batched: bool, dtype: torch.dtype) -> None:
    B, H, H_k, T, d, d_rot = case
    q, k = (torch.randn(B, heads, T, d, dtype=dtype).requires_grad_() for heads in (H, H_k))
    cos, sin = angles(torch.randint(50, (B, T)) if batched else torch.arange(T), d_rot)
    for upstream in upstreams((B, H + H_k, T, d))[: 1 if INTERPRETED and H != 6 else 4]:
        check(ours, plain, (q, k, cos.to(dtype), sin.to(dtype)), upstream)


def test_angles_of_one_batch_serve_all_and_may_be_finer_than_the_heads() -> None:
    q, k = (torch.randn(3, 2, 4, 8, dtype=torch.float16).requires_grad_() for _ in range(2))
    cos, sin = angles(torch.arange(4)[None], 8)
    check(ours, plain, (q, k, cos, sin), torch.randn(3, 4, 4, 8))


def test_halves_that_differ_are_transposed_rightly() -> None:
    q, k = (torch.randn(2, 3, 4, 10).requires_grad_() for _ in range(2))
    check(ours, plain, (q, k, torch.randn(4, 6), torch.randn(4, 6)), torch.randn(2, 6, 4, 10))


@pytest.mark.parametrize("frozen", ["q", "k"])
def test_one_side_may_be_frozen(frozen: str) -> None:
    q, k = (torch.randn(2, 3, 4, 8).requires_grad_(frozen != name) for name in ("q", "k"))
    check(ours, plain, (q, k, *angles(torch.arange(4), 8)), torch.randn(2, 6, 4, 8))


def test_one_output_may_be_unused() -> None:
    q, k = (torch.randn(2, 3, 4, 8, requires_grad=True) for _ in range(2))
    cos, sin = angles(torch.arange(4), 8)
    dq, dk = torch.autograd.grad(rope(q, k, cos, sin)[0].square().sum(), (q, k), materialize_grads=True)
    torch.testing.assert_close(dq, 2 * q)  # a rotation keeps the square
    assert not dk.any()


def test_positions_before_heads_and_other_layouts() -> None:
    q = torch.randn(2, 5, 3, 8).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 5, 3, 16)[..., ::2].transpose(1, 2).requires_grad_()
    cos, sin = (each.T.contiguous().T for each in angles(torch.arange(5), 8))
    check(ours, plain, (q, k, cos, sin), torch.randn(2, 5, 6, 8).transpose(1, 2))
    for x in rope(q, k, cos, sin):
        assert x.is_contiguous()


def test_empty_inputs_and_no_rotation() -> None:
    q = torch.randn(2, 3, 0, 8).requires_grad_()
    ours(q, q, torch.randn(0, 8), torch.randn(0, 8)).sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape
    q, k = (torch.randn(2, 3, 4, 8) for _ in range(2))
    for before, after in zip((q, k), rope(q, k, torch.randn(4, 0), torch.randn(4, 0)), strict=True):
        assert torch.equal(before, after)


@settings(max_examples=5 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(at=st.integers(0, 40), further=st.integers(0, 40), half=st.integers(1, 20))
def test_lengths_stay_and_products_depend_on_the_distance(at: int, further: int, half: int) -> None:
    q, k = (torch.randn(1, 2, 1, 2 * half).expand(1, 2, 2, 2 * half) for _ in range(2))
    cos, sin = angles(torch.tensor([at, at + further]), 2 * half)
    q_turned, k_turned = rope(q, k, cos, sin)
    torch.testing.assert_close(q_turned.norm(dim=-1), q.norm(dim=-1))
    from_start = rope(q, k, *angles(torch.tensor([0, further]), 2 * half))
    products = [(a[:, :, 1] * b[:, :, 0]).sum(-1) for a, b in ((q_turned, k_turned), from_start)]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)
    back = rope(q_turned, k_turned, cos, -sin)
    torch.testing.assert_close(torch.stack(back), torch.stack([q, k]))


def test_what_is_kept_for_backward() -> None:
    q, k = (torch.randn(2, 3, 4, 8, requires_grad=True) for _ in range(2))
    cos, sin = angles(torch.arange(4)[None], 8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rope(q, k, cos, sin)
    assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


def test_a_gradient_has_a_gradient() -> None:
    q, k = (torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if not INTERPRETED:
        cos, sin = torch.randn(2, 2, 4, dtype=torch.float64)
        assert torch.autograd.gradgradcheck(lambda *each: rope(*each, cos, sin), (q, k))


def test_wrong_arguments_are_named() -> None:
    q, cos = torch.randn(2, 3, 4, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"q must be \(B, H, T, d\) .* got \(2, 3, 4, 8\) and \(2, 3, 5, 8\)"):
        rope(q, torch.randn(2, 3, 5, 8), cos, cos)
    for wrong in (torch.randn(5, 8), torch.randn(4, 7), torch.randn(4, 10), torch.randn(3, 4, 8), torch.randn(8)):
        with pytest.raises(ValueError, match=r"cos and sin must be \(4, d_rot\) or \(2, 4, d_rot\) with an even d_rot"):
            rope(q, q, wrong, wrong)
    with pytest.raises(ValueError, match="cos and sin must be"):
        rope(q, q, cos, torch.randn(4, 6))
    with pytest.raises(ValueError, match="get no gradient"):
        rope(q, q, cos, torch.randn(4, 8, requires_grad=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.skipif(INTERPRETED, reason="opcheck compares with other devices' rules")
def test_the_operation_is_well_behaved() -> None:
    q = torch.randn(2, 4, 3, 8).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 2, 4, 8, requires_grad=True)
    cos, sin = torch.randn(2, 2, 4, 6)
    torch.library.opcheck(_rotate, (q, k, cos, sin, False, True, True))
    torch.library.opcheck(_rotate, (q, k.detach(), cos[:1], sin[:1], True, True, True))
    torch.library.opcheck(_rotate, (q.detach(), k, cos, sin, False, True, False))
    q, k, cos, sin = (each.detach().double() for each in (q, k, cos, sin))
    assert torch.autograd.gradcheck(lambda *each: rope(*each, cos, sin), (q.requires_grad_(), k.requires_grad_()))


@pytest.mark.skipif(INTERPRETED, reason="the same graph")
def test_it_compiles_whole() -> None:
    q, k = (torch.randn(2, 3, 4, 8, requires_grad=True) for _ in range(2))
    cos, sin = angles(torch.arange(4), 8)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, cos, sin), ours(q, k, cos, sin))
    grads = [torch.autograd.grad(f(q, k, cos, sin).pow(3).sum(), (q, k)) for f in (compiled, ours)]
    torch.testing.assert_close(*grads)
