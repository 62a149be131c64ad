"""The aggregations against their formulas, written out with dense matrices in double precision."""

import pytest
import torch
from torch import Tensor

from lightning_peft.strategies.aggregation import lora_fair, weighted_mean

K, R, D_IN, D_OUT = 3, 2, 7, 5
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def clients() -> tuple[Tensor, Tensor, Tensor]:
    """lora_A, lora_B and weights of three clients."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return torch.randn(K, R, D_IN, dtype=torch.float64), torch.randn(K, D_OUT, R, dtype=torch.float64), weights


def wanted(a: Tensor, b: Tensor, p: Tensor) -> Tensor:
    """sum_k p_k B_k A_k."""
    return sum(p[k] * b[k] @ a[k] for k in range(len(p)))


def test_the_weighted_mean_is_the_formula(clients: tuple[Tensor, Tensor, Tensor]) -> None:
    a, _, p = clients
    torch.testing.assert_close(weighted_mean(a, p), 0.5 * a[0] + 0.3 * a[1] + 0.2 * a[2], **EXACT)


def test_half_precision_is_averaged_in_single() -> None:
    many = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    assert weighted_mean(many, torch.full((1000,), 1e-3)).item() == 1.0
    assert weighted_mean(many, torch.full((1000,), 1e-3)).dtype == torch.bfloat16


@pytest.mark.parametrize("ridge", [0.01, 3.0])
def test_lora_fair_solves_its_objective(ridge: float, clients: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, p = clients
    mean_a = weighted_mean(a, p)
    # |R - delta A|^2 + ridge |delta|^2 is a least-squares problem with ridge^0.5 I appended
    missed = wanted(a, b, p) - weighted_mean(b, p) @ mean_a
    left = torch.cat([mean_a.T, ridge**0.5 * torch.eye(R, dtype=torch.float64)])
    right = torch.cat([missed.T, torch.zeros(R, D_OUT, dtype=torch.float64)])
    expected = weighted_mean(b, p) + torch.linalg.lstsq(left, right).solution.T
    found_a, found_b = lora_fair(a, b, p, ridge)
    torch.testing.assert_close(found_a, mean_a, **EXACT)
    torch.testing.assert_close(found_b, expected, rtol=1e-9, atol=1e-9)


def test_lora_fair_comes_nearer_to_what_was_wanted_than_the_means(clients: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, p = clients
    target, (fair_a, fair_b) = wanted(a, b, p), lora_fair(a, b, p)
    fair, plain = (target - fair_b @ fair_a).norm(), (target - weighted_mean(b, p) @ weighted_mean(a, p)).norm()
    assert fair < 0.99 * plain


def test_with_a_common_factor_the_mean_of_the_products_is_exact(clients: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, p = clients
    same = a[:1].expand(K, R, D_IN)
    torch.testing.assert_close(weighted_mean(b, p) @ a[0], wanted(same, b, p), **EXACT)


def test_clients_that_agree_and_a_client_that_is_alone_are_given_back(clients: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, p = clients
    for a_k, b_k, p_k in (
        (a[:1].expand(K, R, D_IN), b[:1].expand(K, D_OUT, R), p),
        (a[:1], b[:1], torch.ones(1, dtype=torch.float64)),
    ):
        found_a, found_b = lora_fair(a_k, b_k, p_k)
        torch.testing.assert_close(found_a, a[0], **EXACT)
        torch.testing.assert_close(found_b, b[0], **EXACT)
        torch.testing.assert_close(weighted_mean(b_k, p_k), b[0], **EXACT)


def test_a_convolution_is_the_matrix_that_its_kernel_flattens_to(clients: tuple[Tensor, Tensor, Tensor]) -> None:
    _, b, p = clients
    a = torch.randn(K, R, 3, 2, 2, dtype=torch.float64)
    flat_a, flat_b = lora_fair(a.flatten(2), b, p)
    found_a, found_b = lora_fair(a, b, p)
    torch.testing.assert_close(found_a.flatten(1), flat_a, **EXACT)
    torch.testing.assert_close(found_b, flat_b, **EXACT)
