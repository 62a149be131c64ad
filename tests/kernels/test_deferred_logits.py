"""Logits that are computed when they are read: whatever is done with them, the answer is that of F.linear."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.kernels import deferred_linear
from lightning_peft.kernels.deferred_logits import DeferredLogits
from tests.kernels.rule import DEVICE, INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")

B, T, D, V = 2, 5, 8, 41
LABELS = torch.tensor([[3, 40, -100, 0, 7], [1, -100, 2, 39, 11]], device=DEVICE)


def made(**kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return tuple(torch.randn(*s, **kwargs).requires_grad_() for s in ((B, T, D), (V, D), (V,)))  # type: ignore[return-value]


def capped(logits: Tensor) -> Tensor:
    return torch.tanh(logits / 2.0) * 2.0


def shifted(logits: Tensor) -> Tensor:
    return logits[..., :-1, :].contiguous().float().view(-1, V)


# (what is done to the logits, the labels that go with it); no logits are computed for any of them
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "rows": (lambda logits: logits.view(-1, V), LABELS.view(-1)),
    "shifted as in transformers": (shifted, LABELS[:, 1:].reshape(-1)),
    "one sample": (lambda logits: logits[1], LABELS[1]),
    "one place": (lambda logits: logits[:, -1], LABELS[:, -1].clamp(min=0)),
    "classes in the second axis": (lambda logits: logits.transpose(1, 2), LABELS),
    "classes in the second axis by permute": (lambda logits: logits[:, 1:].permute(0, 2, 1), LABELS[:, 1:]),
    "where there are labels": (lambda logits: logits[LABELS >= 0], LABELS[LABELS >= 0]),
    "flattened": (lambda logits: logits.flatten(0, 1).to(dtype=torch.float32), LABELS.flatten()),
    "capped": (lambda logits: capped(logits).flatten(0, 1), LABELS.flatten()),
}
OPTIONS: list[dict[str, Any]] = [{}, {"reduction": "sum"}, {"reduction": "none", "label_smoothing": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_cross_entropy_needs_no_logits(name: str, options: dict[str, Any]) -> None:
    prepare, labels = LOSSES[name]
    inputs = made()
    logits = prepare(deferred_linear(*inputs))
    assert isinstance(logits, DeferredLogits)
    expected_logits = prepare(F.linear(*inputs))
    assert (logits.shape, logits.dtype) == (expected_logits.shape, expected_logits.dtype)
    loss, expected = (F.cross_entropy(each, labels, **options) for each in (logits, expected_logits))
    assert logits.known() is None
    assert type(loss) is Tensor
    torch.testing.assert_close(loss, expected)  # dtypes too
    upstream = torch.randn(loss.shape, dtype=loss.dtype)
    for ours, theirs in zip(*(torch.autograd.grad(v, inputs, upstream) for v in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(logits + 0, expected_logits)


# what reads the logits
USES: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda logits: logits.log_softmax(-1),
    "some of the vocabulary": lambda logits: logits[..., : V - 2],
    "a permuted vocabulary": lambda logits: logits[..., torch.arange(V).flip(0)],
    "turned twice": lambda logits: logits.transpose(1, 2).transpose(1, 2),
    "axes joined with the vocabulary": lambda logits: logits.flatten(1),
    "the axis of a turned vocabulary": lambda logits: logits.transpose(1, 2)[:, 3],
    "a cap that is none": lambda logits: F.cross_entropy((torch.tanh(logits / 2.0) * 3.0)[0], LABELS[0]),
    "a factor": lambda logits: F.cross_entropy((logits * 0.5)[0], LABELS[0]),
    "double precision": lambda logits: F.cross_entropy(logits.double().flatten(0, 1), LABELS.flatten()),
    "bits": lambda logits: logits.detach().view(torch.int32),
    "soft labels": lambda logits: F.cross_entropy(logits[0], torch.full((T, V), 1 / V)),
    "weights of classes": lambda logits: F.cross_entropy(logits[0], LABELS[0], weight=torch.arange(1.0, V + 1)),
    "classes in the wrong axis": lambda logits: F.cross_entropy(logits, LABELS.new_zeros(B, V)),
    "keywords": lambda logits: torch.reshape(input=logits, shape=(-1, V)),
    "indices as tensors": lambda logits: logits[torch.tensor([1, 0]), torch.tensor([2, 2])],
    "a new axis behind": lambda logits: logits[:, 0, :, None],
    "an axis in the middle": lambda logits: logits[:, None, ..., 3],
    "a module": lambda logits: nn.CrossEntropyLoss()(torch.stack([logits[0], logits[1]]).view(-1, V), LABELS.view(-1)),
}


@pytest.mark.parametrize("name", USES)
def test_whoever_reads_them_gets_the_logits(name: str) -> None:
    inputs, use = made(), USES[name]
    answer, expected = use(deferred_linear(*inputs)), use(F.linear(*inputs))
    torch.testing.assert_close(answer.read() if isinstance(answer, DeferredLogits) else answer, expected)
    if expected.is_floating_point():
        grads = [torch.autograd.grad((each * each).sum(), inputs) for each in (answer, expected)]
        torch.testing.assert_close(*grads)


def test_axes_of_equal_length_are_not_mistaken() -> None:
    x, w = torch.randn(2, 7, 3), torch.randn(7, 3)
    logits, plain = deferred_linear(x, w), F.linear(x, w)
    assert torch.equal(logits.transpose(1, 2).reshape(-1, 7) + 0, plain.transpose(1, 2).reshape(-1, 7))
    assert torch.equal(logits.transpose(1, 2)[:, 1] + 0, plain.transpose(1, 2)[:, 1])
    with pytest.raises(RuntimeError, match="Expected target size"):
        F.cross_entropy(deferred_linear(*made()), LABELS)


def test_they_are_computed_once_and_the_loss_then_takes_them() -> None:
    logits = deferred_linear(*made())
    rows = logits.view(-1, V)
    with torch.no_grad():
        logits.argmax(-1)
    assert rows.known() is not None
    assert rows.known().data_ptr() == logits.known().data_ptr()
    loss = F.cross_entropy(rows, LABELS.view(-1))
    assert "NllLoss" in loss.grad_fn.name()


def test_a_change_in_place_is_seen_by_views_and_not_by_copies() -> None:
    x, w, b = made()
    logits, plain = deferred_linear(x, w, b), F.linear(x, w, b)
    for each in (logits, plain):
        view, copy = each.view(-1, V), each.double()
        each[..., 5] = 1e4
        assert view[0, 5].item() == 1e4
        assert copy[0, 0, 5].item() < 1e3
    torch.testing.assert_close(logits.read(), plain)


class Squares(torch.autograd.Function):
    """Takes what it is given as it is: no operation of torch is told of it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.square().sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * upstream


@pytest.mark.parametrize("prepare", [lambda logits: logits, lambda logits: capped(logits[:, 1:]).transpose(1, 2)])
def test_a_function_with_a_backward_of_its_own_gets_logits_and_gives_gradients(
    prepare: Callable[[Tensor], Tensor],
) -> None:
    inputs = made()
    values = [Squares.apply(prepare(each(*inputs))) for each in (deferred_linear, F.linear)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, inputs) for value in values))


def test_under_autocast_they_have_its_precision() -> None:
    x, w, b = made()
    with torch.autocast(DEVICE, torch.bfloat16):
        logits, plain = deferred_linear(x, w, b), F.linear(x, w, b)
        assert logits.dtype == plain.dtype == torch.bfloat16
        losses = [F.cross_entropy(each.view(-1, V), LABELS.view(-1)) for each in (logits, plain)]
    assert losses[0].dtype == losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)  # logits of bfloat16 are summed in another order
    assert torch.equal(logits.read(), plain)


def test_compiled_code_and_transforms_get_plain_logits() -> None:
    x, w, b = made()
    seen: list[type] = []

    def loss(x: Tensor) -> Tensor:
        logits = deferred_linear(x, w, b)
        seen.append(type(logits))
        return logits.square().sum()

    compiled = torch.compile(lambda x: deferred_linear(x, w, b).square().sum(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), loss(x))
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])
    assert seen == [DeferredLogits, Tensor, DeferredLogits]
