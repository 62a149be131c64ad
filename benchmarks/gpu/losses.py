"""Points 2 and 3: cross-entropy of a linear head.

Labels are random, and then a row's largest probability is small (it is *flat*); or inputs lie near the row of the head
that belongs to their label, so that its mean probability is one half (*peaked*), as in a model that has learnt: those
who skip small gradients skip most of them there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.case import Case, Machine, Peer, Work, compiled, missing, plain
from lightning_peft.kernels import linear_cross_entropy


def points(machine: Machine) -> dict[int, list[Callable[[], Case]]]:
    """Gemma-2 2B in all ways; Llama-3 8B and Qwen2.5 0.5B with a frozen head."""
    gemma = partial(case, machine, "Gemma-2 2B", 8192, 2304, 256000)
    return {
        2: [
            gemma,
            partial(gemma, softcap=30.0),
            partial(gemma, peaked=True),
            partial(gemma, frozen=False),
        ],
        3: [
            partial(case, machine, "Llama-3 8B", 16384, 4096, 128256),
            partial(case, machine, "Qwen2.5 0.5B", 8192, 896, 151936),
        ],
    }


def case(
    machine: Machine, model: str, T: int, D: int, V: int, softcap: float | None = None, frozen: bool = True,
    peaked: bool = False,
) -> Case:  # fmt: skip
    """T rows of width D, V labels."""
    T, D, V = machine.size(T, 19), machine.size(D, 16), machine.size(V, 101)
    weight, labels, x = machine.randn(V, D, scale=D**-0.5), machine.randint(V, T), machine.randn(T, D)
    kind = "flat"
    if peaked:
        alpha = _peak(x, weight, labels)
        x, kind = x + alpha * weight[labels], f"peaked, alpha {alpha:.1f}"
    inputs = {"x": x.requires_grad_(), "weight": weight.requires_grad_(not frozen), "labels": labels}
    torch_loss = partial(plain_loss, softcap=softcap)
    no_cap = "has no soft cap" if softcap else ""
    peers = [
        Peer("torch", plain(torch_loss)),
        Peer("torch.compile", compiled(torch_loss)),
        Peer("F.linear_cross_entropy", plain(native_loss), skipped=no_cap or _native_is_missing()),
        Peer("Liger", plain(partial(liger_loss, softcap=softcap)), skipped=missing("liger_kernel")),
        *(
            Peer(name, plain(partial(cut_loss, softcap=softcap, **options)), skipped=missing("cut_cross_entropy"))
            for name, options in (
                ("cut_cross_entropy", {}),
                ("cut_cross_entropy, no filter", {"filter_eps": None}),
                ("cut_cross_entropy, torch_compile", {"impl": "torch_compile"}),
            )
        ),
        Peer("ours", plain(partial(linear_cross_entropy, softcap=softcap))),
        # with so little room for logits that no rows are computed as a whole
        Peer("ours, cut", plain(partial(linear_cross_entropy, softcap=softcap, budget=machine.size(2**23, 2**14)))),
    ]
    cap = f", softcap {softcap:g}" if softcap else ""
    return Case(
        name=f"linear cross-entropy, {model} ({T}, {D}, {V}), head {'frozen' if frozen else 'trained'}{cap}, {kind}",
        inputs=inputs,
        truth=plain(torch_loss),
        peers=peers,
        forward=Work((T + V) * D * machine.dtype.itemsize, 2 * T * V * D),
        both=Work((2 * T + V * (1 if frozen else 2)) * D * machine.dtype.itemsize, (4 if frozen else 6) * T * V * D),
    )


def plain_loss(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """As models compute it: logits in the precision of the head, the loss in float32 at least."""
    logits = F.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels)


def native_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """That of PyTorch, in chunks."""
    return F.linear_cross_entropy(x, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def liger_loss(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(softcap=softcap)(weight, x, labels)


def cut_loss(x: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Apple's cut cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy as theirs

    return theirs(x, weight, labels, **options)


def _native_is_missing() -> str:
    return "" if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} does not have it"


@torch.no_grad()
def _peak(noise: Tensor, weight: Tensor, labels: Tensor) -> float:
    """How far along the row of its label an input must lie for a mean probability of one half."""
    low, high = 0.0, 100.0
    head, rows, own = weight.float(), noise[:256].float(), weight[labels[:256]].float()
    for _ in range(16):
        alpha = (low + high) / 2
        logits = (rows + alpha * own) @ head.T
        mean = logits.softmax(1).gather(1, labels[:256, None]).mean()
        low, high = (alpha, high) if mean < 0.5 else (low, alpha)
    return alpha
