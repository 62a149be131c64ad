"""A weight in 4 bits takes part in everything as the weight that it stands for, and stays in 4 bits."""

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.kernels.nf4 import nf4_pack, nf4_unpack
from lightning_peft.parts.nf4 import NF4Tensor


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(11, 7)


def plain(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the packed weight stands for."""
    return nf4_unpack(nf4_pack(weight), weight.shape, dtype)


def layer(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(NF4Tensor.pack(weight), requires_grad=False)
    return linear


def test_it_answers_as_the_parameter_that_it_replaces(weight: Tensor) -> None:
    packed = layer(weight.bfloat16()).weight
    assert isinstance(packed, nn.Parameter)
    assert (packed.shape, packed.dtype, packed.device, packed.dim()) == ((11, 7), torch.bfloat16, weight.device, 2)
    assert packed.is_floating_point()
    assert packed.is_contiguous()
    assert not packed.T.is_contiguous()
    assert packed.numel() == 77
    assert packed.nbytes < 77
    assert "NF4Tensor((11, 7), torch.bfloat16, 64 a block, on cpu)" in repr(packed)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda w: w[2:5, 1],
    "flatten": lambda w: w.flatten(),
    "add": lambda w: w + 1,
    "reverse": lambda w: 2.0 - w,
    "matmul": lambda w: w.T @ w,
    "norm": lambda w: w.norm(dim=1),
    "transpose": lambda w: w.transpose(-1, 0) @ torch.ones(11),
    "permute": lambda w: w.permute(1, 0)[3],
    "mT": lambda w: w.mT.T.mT.contiguous(),
    "chunk": lambda w: w.chunk(2)[1],
    "cat": lambda w: torch.cat([w, torch.zeros(1, 7)]),
    "integers": lambda w: (10 * w).to(torch.int32),
    "double": lambda w: w.double() @ torch.ones(7, dtype=torch.float64),
    "max": lambda w: w.max(dim=0).values,
    "embedding": lambda w: F.embedding(torch.tensor([3, 0]), w),
    "where": lambda w: torch.where(w > 0, w, torch.zeros(())),
    "self": lambda w: w.transpose(0, 0) * w.permute(0, 1),
    "addmm with a factor": lambda w: torch.addmm(torch.ones(7), torch.ones(3, 11), w, alpha=3),
    "addmm with another": lambda w: torch.addmm(torch.ones(7), torch.ones(3, 11), w, beta=2),
    "addmm with a matrix": lambda w: torch.addmm(torch.ones(3, 1), torch.ones(3, 11), w),
    "addmm on the left": lambda w: torch.addmm(torch.ones(2), w, torch.ones(7, 2)),
    "mm on the left": lambda w: w @ torch.ones(7, 2),
    "a batch": lambda w: torch.ones(2, 3, 11).transpose(0, 1) @ w,
    "cast": lambda w: w.half() + 1,
}
modes = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])


@modes
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_any_operation_sees_the_unpacked_weight(
    operation: Callable[[Tensor], Tensor], mode: Callable[[], Any], weight: Tensor
) -> None:
    with mode():
        found = operation(NF4Tensor.pack(weight))
        assert type(found) is Tensor
        assert torch.equal(found, operation(plain(weight)))


def products() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]]:
    bias = torch.randn(11)
    return {
        "linear": (lambda x, w: F.linear(x, w), (3, 7), (11, 7)),
        "linear with a bias": (lambda x, w: F.linear(x, w, bias), (2, 3, 7), (11, 7)),
        "linear of a vector": (lambda x, w: F.linear(x, w, bias), (7,), (11, 7)),
        "matmul": (lambda x, w: x @ w.T, (2, 3, 7), (11, 7)),
        "addmm": (lambda x, w: torch.addmm(bias, x, w), (3, 7), (7, 11)),
        "conv2d": (lambda x, w: F.conv2d(x, w, bias, padding=1), (2, 5, 6, 6), (11, 5, 3, 3)),
    }


@pytest.mark.parametrize("name", products())
def test_a_product_and_its_gradient_are_those_of_the_unpacked_weight(name: str) -> None:
    product, given, shape = products()[name]
    weight, x = torch.randn(shape), torch.randn(given)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = product(one, NF4Tensor.pack(weight)), product(other, plain(weight))
    assert torch.equal(found, expected)
    gradient = torch.randn(found.shape)
    found.backward(gradient), expected.backward(gradient)
    assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", products())
def test_no_product_keeps_the_unpacked_weight_for_its_backward(name: str) -> None:
    product, given, shape = products()[name]
    packed, x, saved = NF4Tensor.pack(torch.randn(shape)), torch.randn(given, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        product(x, packed)
    large = [t for t in saved if t.numel() == packed.numel()]
    assert large, "the backward needs the weight"
    assert all(isinstance(t, NF4Tensor) for t in large)


@modes
@pytest.mark.parametrize("name", ["linear", "linear with a bias", "linear of a vector", "matmul", "addmm"])
def test_a_product_reads_the_codes(name: str, mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    product, given, shape = products()[name]
    weight, x = torch.randn(shape), torch.randn(given, requires_grad=True)
    packed = NF4Tensor.pack(weight)
    monkeypatch.delattr(NF4Tensor, "unpacked")  # which any other operation calls
    with mode():
        found = product(x, packed)
        assert torch.equal(found, product(x, plain(weight)))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(product(x, packed), product(x, plain(weight)))
    if found.requires_grad:
        found.sum().backward()


@modes
def test_a_product_that_does_not_fit_is_refused_as_ever(
    mode: Callable[[], Any], weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = NF4Tensor.pack(weight)
    monkeypatch.delattr(
        importlib.import_module("lightning_peft.kernels.nf4_linear"), "nf4_product"
    )  # which checks nothing
    with mode():
        with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(3x5 and 7x11\)"):
            F.linear(torch.randn(3, 5), packed)
        with pytest.raises(RuntimeError, match="the same dtype"):
            F.linear(torch.randn(3, 7).double(), packed)
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(torch.randn(3, 7), packed, torch.randn(11).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_changes_what_it_answers_with_and_not_what_is_kept(weight: Tensor, dtype: torch.dtype) -> None:
    linear = layer(weight).to(dtype)
    assert isinstance(linear.weight, NF4Tensor)
    assert isinstance(linear.weight, nn.Parameter)
    assert torch.equal(linear.weight, plain(weight, dtype))
    assert torch.equal(
        linear(torch.ones(1, 7, dtype=dtype)),
        F.linear(torch.ones(1, 7, dtype=dtype), plain(weight, dtype), linear.bias),
    )
    assert torch.equal(linear.float().weight, plain(weight))


def test_autocast_computes_in_its_own_precision(weight: Tensor) -> None:
    linear, x = layer(weight), torch.randn(3, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert torch.equal(y, F.linear(x.bfloat16(), plain(weight, torch.bfloat16), linear.bias.bfloat16()))
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def assert_apart(one: Any, other: Any, expected: Tensor) -> None:
    assert isinstance(other, NF4Tensor)
    assert torch.equal(other, expected)
    with torch.no_grad():
        one.zero_()
    assert torch.equal(other, expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_copies_stay_packed_and_are_apart(weight: Tensor, double_quant: bool) -> None:
    expected = NF4Tensor.pack(weight, 32, double_quant).unpacked()
    for copied in (
        torch.clone,
        copy.deepcopy,
        lambda t: pickle.loads(pickle.dumps(t)),
        lambda t: t.to(copy=True, device="cpu"),
    ):
        packed = nn.Parameter(NF4Tensor.pack(weight, 32, double_quant), requires_grad=False)
        assert_apart(packed, copied(packed), expected)
    packed = NF4Tensor.pack(weight)
    assert packed.detach().codes.data_ptr() == packed.codes.data_ptr()
    assert isinstance(copy.deepcopy(layer(weight)).weight, nn.Parameter)


def test_moving_keeps_it_packed(weight: Tensor) -> None:
    moved = layer(weight).to("meta").weight
    assert isinstance(moved, NF4Tensor)
    assert {moved.device.type, moved.codes.device.type, moved.absmax.device.type} == {"meta"}


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_written_into_it_is_packed_anew(weight: Tensor, transposed: bool) -> None:
    packed, new = NF4Tensor.pack(weight), torch.randn(11, 7)
    seen, value = (packed.T, new.T) if transposed else (packed, new)
    assert seen.copy_(value) is seen
    assert torch.equal(packed, plain(new))
    assert seen.mul_(2) is seen
    assert torch.equal(packed, plain(2 * plain(new)))
    torch._foreach_zero_([seen])
    assert not packed.any()
    nn.init.constant_(seen, 3.0)
    assert packed.eq(3.0).all()
    seen.copy_(torch.tensor(2.0))
    assert packed.eq(2.0).all()
    torch.add(value, 1.0, out=seen)
    assert torch.equal(packed, plain(new + 1.0))
    with pytest.raises(ValueError, match="NaN or infinite"):
        seen.copy_(value * torch.nan)


def test_one_is_copied_into_another_bit_for_bit(weight: Tensor) -> None:
    source = NF4Tensor.pack(weight).bfloat16()  # whose values in bfloat16 would be packed a little differently
    for goal in (NF4Tensor.pack(torch.randn(11, 7)), NF4Tensor.pack(torch.randn(11, 7)).bfloat16()):
        goal.copy_(source)
        assert all(torch.equal(a, b) for a, b in zip(goal.packed, source.packed, strict=True))
    other = NF4Tensor.pack(torch.randn(7, 11))
    other.copy_(source.T)
    assert torch.equal(other, plain(source.T.unpacked()))
    coarse = NF4Tensor.pack(torch.randn(11, 7), 128, double_quant=False)
    coarse.copy_(source)
    assert torch.equal(coarse, NF4Tensor.pack(source.unpacked().float(), 128, double_quant=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_writing_what_it_stands_for_changes_nothing(weight: Tensor, dtype: torch.dtype) -> None:
    packed = NF4Tensor.pack(weight).to(dtype)
    before = copy.deepcopy(packed.packed)
    for seen in (packed, packed.T):
        seen.copy_(seen.unpacked())
        seen.lerp_(seen.unpacked(), 0.5)
        assert all(torch.equal(a, b) for a, b in zip(packed.packed, before, strict=True))


def test_a_checkpoint_of_the_whole_weight_loads_into_it_and_out_of_it(weight: Tensor) -> None:
    linear, other = layer(torch.zeros(11, 7)), nn.Linear(7, 11)
    whole = {"weight": weight, "bias": torch.ones(11)}
    linear.load_state_dict(whole)
    assert isinstance(linear.weight, NF4Tensor)
    assert torch.equal(linear.weight, plain(weight))
    other.load_state_dict(linear.state_dict())
    assert type(other.weight) is nn.Parameter
    assert torch.equal(other.weight, plain(weight))
    linear.load_state_dict(other.state_dict())  # what was rounded before is not rounded again
    assert torch.equal(linear.weight, plain(weight))


def test_a_file_keeps_it_packed_and_loads_where_only_weights_may(weight: Tensor) -> None:
    file = io.BytesIO()
    linear = layer(weight)
    other = NF4Tensor.pack(weight, 16, double_quant=False).T
    torch.save({"state": linear.state_dict(), "live": linear.weight, "other": other}, file)
    for place in (None, "cpu", lambda storage, location: storage):
        file.seek(0)
        loaded = torch.load(file, map_location=place, weights_only=True)
        assert all(isinstance(t, NF4Tensor) for t in (loaded["state"]["weight"], loaded["live"], loaded["other"]))
        assert torch.equal(loaded["state"]["weight"], plain(weight))
        assert [isinstance(t, nn.Parameter) for t in (loaded["state"]["weight"], loaded["live"])] == [False, True]
        assert torch.equal(loaded["other"], other)


def test_a_compiled_layer_computes_the_same(weight: Tensor) -> None:
    torch._dynamo.reset()
    linear, x = layer(weight), torch.randn(3, 7, requires_grad=True)
    found = torch.compile(linear, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, F.linear(x, plain(weight), linear.bias))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, plain(weight).sum(0).expand(3, 7))
