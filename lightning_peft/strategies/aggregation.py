"""How a server makes one adapter of those of its clients; pure functions of tensors stacked over the K clients.

The update that the clients ask for together is ``sum_k p_k B_k A_k``. Averaging the factors apart misses it by the
products across clients: ``sum_k p_k B_k A_k - B_mean A_mean = sum_k p_k (B_k - B_mean)(A_k - A_mean)``.
"""

import torch
from torch import Tensor


def weighted_mean(clients: Tensor, weights: Tensor) -> Tensor:
    """FedAvg (McMahan et al., 2017, arXiv:1602.05629): ``sum_k p_k x_k``, computed in single precision at least.

    With both factors of a low-rank product averaged so, their product is not the mean of the products. With one of
    them frozen and common to all clients it is: FFA-LoRA (Sun et al., 2024, arXiv:2403.12313).

    Args:
        clients: (K, ...).
        weights: p, (K,), with sum 1.

    Returns:
        (...), in the dtype of ``clients``.

    >>> weighted_mean(torch.tensor([[1.0, 2.0], [5.0, 6.0]]), torch.tensor([0.75, 0.25]))
    tensor([2., 3.])
    """
    exact = torch.promote_types(clients.dtype, torch.float32)
    return torch.tensordot(weights.to(clients.device, exact), clients.to(exact), dims=1).to(clients.dtype)


def lora_fair(lora_A: Tensor, lora_B: Tensor, weights: Tensor, ridge: float = 0.01) -> tuple[Tensor, Tensor]:
    """LoRA-FAIR (Bian et al., 2024, arXiv:2411.14961): the mean of A, and a B that makes up for having averaged apart.

    ``B = B_mean + delta``, where ``delta`` minimises ``|sum_k p_k B_k A_k - (B_mean + delta) A_mean|^2 +
    ridge |delta|^2``. That is the least-squares form of the paper's objective, which asks for a large cosine instead
    and takes a few gradient steps. It has the solution ``delta = R A_mean' (A_mean A_mean' + ridge I)^-1``, with R the
    update that the means miss: the same numbers on every rank, and no matrix of the size of a weight.

    Args:
        lora_A: (K, r, d_in, ...).
        lora_B: (K, d_out, r).
        weights: p, (K,), with sum 1.
        ridge: what keeps ``delta`` small, lambda in the paper.

    Returns:
        lora_A (r, d_in, ...) and lora_B (d_out, r).

    >>> a, b = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[2.0]], [[4.0]]])
    >>> half = torch.tensor([0.5, 0.5])
    >>> lora_fair(a, b, half, ridge=0.0)  # asked for: [1, 2]; in reach of the mean of A: [1.5, 1.5]
    (tensor([[0.5000, 0.5000]]), tensor([[3.]]))
    """
    mean_A, mean_B = weighted_mean(lora_A, weights), weighted_mean(lora_B, weights)
    exact = torch.promote_types(lora_A.dtype, torch.float32)
    a, b, p = lora_A.flatten(2).to(exact), lora_B.to(exact), weights.to(lora_A.device, exact)
    mean = torch.tensordot(p, a, dims=1)  # (r, d_in)
    missed = torch.einsum("k,kor,krs->os", p, b, (a - mean) @ mean.T)  # R A_mean', (d_out, r)
    gram = mean @ mean.T + ridge * torch.eye(len(mean), dtype=exact, device=mean.device)
    delta = torch.linalg.solve(gram, missed, left=False)
    return mean_A, mean_B + delta.to(mean_B.dtype)
