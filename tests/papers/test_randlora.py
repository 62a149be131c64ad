"""RandLoRA against its formula."""

import pytest
import torch
from torch import nn

from lightning_peft import RandLoRA, inject


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("r", [2, 4, 10])
def test_the_update_is_the_sum_of_random_products_and_of_full_rank(d_in: int, d_out: int, r: int) -> None:
    base = nn.Sequential(nn.Linear(d_in, d_out)).double()
    weight = base[0].weight.detach().clone()
    adapter = inject(base, RandLoRA(r=r, alpha=5.0))[0].adapters["default"]
    torch.nn.init.normal_(adapter.rand_lambda), torch.nn.init.normal_(adapter.rand_gamma)
    A, B = adapter.numbers()
    delta = torch.zeros(max(d_in, d_out), min(d_in, d_out)).double()
    for k in range(len(adapter.rand_gamma)):
        for i in range(r):
            column, row = B[k, :, i], A[i] * adapter.rand_gamma[k]
            delta += 3 * 5.0 / r * adapter.rand_lambda[k, i] * torch.outer(column, row)
    delta = delta if d_in <= d_out else delta.T
    x = torch.randn(4, d_in).double()
    torch.testing.assert_close(base(x), x @ (weight + delta).T + base[0].bias)
    assert torch.linalg.matrix_rank(adapter.delta()) == min(d_in, d_out)


def test_numbers_have_the_deviation_of_the_paper_and_are_shared() -> None:
    base = inject(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)), RandLoRA(r=8))
    first, second = (layer.adapters["default"].numbers() for layer in base)
    for numbers in first:
        assert (3**0.5 * numbers).std().item() == pytest.approx(1, rel=0.05)
    assert first[0].data_ptr() == second[0].data_ptr()
    assert first[1].data_ptr() == second[1].data_ptr()
    assert sum(v.numel() for k, v in base.state_dict().items() if "adapters" in k) == 2 * 8 * (8 + 64)
