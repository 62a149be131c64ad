"""Compacter against Kronecker products that are written out."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import AdapterError, Compacter, inject, load_adapter, save_adapter
from lightning_peft.adapters.hypercomplex import kronecker_sum
from lightning_peft.engine import TargetError, adapters_of
from tests.methods.backbones import moved, tiny


def matrix(C: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """(d_in, d_out), as the hypercomplex layer of the paper multiplies rows with it."""
    return sum((torch.kron(C[k], A[k] @ B[k]) for k in range(len(C))), torch.zeros(()))


def adapters(model: nn.Module) -> list[Any]:
    return [adapter for _, _, adapter in adapters_of(model)]


def stack(**arguments: Any) -> nn.Module:
    method = Compacter(**{"n": 2, "reduction_factor": 3, "phm_rank": 1} | arguments)
    return inject(tiny(method).double(), method)


@pytest.mark.parametrize(("n", "i", "j", "rank"), [(1, 3, 2, 1), (2, 3, 5, 1), (3, 2, 4, 2)])
def test_the_sum_of_kronecker_products(n: int, i: int, j: int, rank: int) -> None:
    C, A, B = (torch.randn(s).double() for s in ((n, n, n), (n, i, rank), (n, rank, j)))
    torch.testing.assert_close(kronecker_sum(C, A, B), matrix(C, A, B))


@pytest.mark.parametrize("phm_rank", [1, 2])
def test_all_adapters_follow_the_formula_with_one_common_factor(phm_rank: int) -> None:
    model, base = moved(stack(phm_rank=phm_rank, train_norms=False)), tiny(Compacter()).double()
    C = adapters(model)[0].phm_C
    assert [("phm_C" in dict(a.named_parameters())) for a in adapters(model)] == [True, False, False, False]
    widths = {
        (tuple(a.down_A.shape), tuple(a.down_B.shape), tuple(a.up_A.shape), tuple(a.up_B.shape))
        for a in adapters(model)
    }
    assert widths == {((2, 6, phm_rank), (2, phm_rank, 2), (2, 2, phm_rank), (2, phm_rank, 6))}

    def behind(a: Any) -> Any:
        def hook(module: Any, args: Any, y: Tensor) -> Tensor:
            h = y @ matrix(C, a.down_A, a.down_B) + a.down_bias
            h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
            return y + h @ matrix(C, a.up_A, a.up_B) + a.up_bias

        return hook

    for path, _, adapter in adapters_of(model):
        base.get_submodule(path).register_forward_hook(behind(adapter))
    x = torch.randn(2, 5, 7).double()
    torch.testing.assert_close(model(x), base(x))
    parameters = [p for p in model.parameters() if p.requires_grad]  # C once, with the gradient of all
    ours = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.testing.assert_close(ours, torch.autograd.grad(base(x).square().sum(), parameters))
    assert sum(p is C for p in parameters) == 1


def test_matrix_units_make_any_matrix_of_rank_one_blocks() -> None:
    units = torch.stack([torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.0, 1], [0, 0]])])
    A, B = torch.randn(2, 3, 1), torch.randn(2, 1, 4)
    whole = kronecker_sum(units, A, B)
    torch.testing.assert_close(whole[:3], torch.cat([A[0] @ B[0], A[1] @ B[1]], dim=1))
    assert not whole[3:].any()


def test_the_start() -> None:
    model, x = stack(n=3, reduction_factor=1), torch.randn(2, 5, 7).double()
    first = adapters(model)[0]
    assert 0 < first.phm_C.std() < 2e-4
    assert (model(x) - tiny(Compacter()).double()(x)).abs().max() < 1e-6
    for name, (i, j) in (("down_A", (4, 1)), ("down_B", (1, 4)), ("up_A", (4, 1)), ("up_B", (1, 4))):
        bound = 2**0.5 * (6 / (i + j)) ** 0.5  # Glorot's, for each of the n matrices by itself
        assert 0.8 * bound < max(getattr(a, name).abs().max().item() for a in adapters(model)) <= bound
    assert not first.up_bias.any()
    assert adapters(stack(n=2, init_std=0.5))[0].phm_C.std() > 0.05


def test_the_common_factor_is_saved_and_trained_once(tmp_path: Path) -> None:
    model = moved(stack(train_norms=False))
    keys = [key for key in model.state_dict() if "phm_C" in key]
    assert keys == ["blocks.0.attn.proj.adapters.default.phm_C"]
    x = torch.randn(2, 5, 7).double()
    loaded = load_adapter(tiny(Compacter()).double(), save_adapter(model, tmp_path))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(x), model(x))
        first, *others = adapters(other)
        assert all(a.first[0] is first for a in others)
        assert first is not adapters(model)[0]
        nn.init.zeros_(first.phm_C)  # in all of them then
        assert not any(matrix.any() for a in adapters(other) for matrix in a.matrices())
    assert adapters(model)[0].phm_C.any()


def test_two_sets_of_adapters_have_a_factor_each() -> None:
    model = stack(train_norms=False)
    inject(model, Compacter(n=3, reduction_factor=2, train_norms=False), name="second")
    one, two = ([a for _, _, a in adapters_of(model, name)] for name in ("default", "second"))
    assert one[0].phm_C.shape == (2, 2, 2)
    assert two[0].phm_C.shape == (3, 3, 3)
    assert all(a.first[0] is two[0] for a in two[1:])


def test_what_is_adapted_and_what_trains() -> None:
    paths = lambda **arguments: [path for path, _, _ in adapters_of(stack(**arguments))]  # noqa: E731
    assert paths() == [f"blocks.{i}.{path}" for i in (0, 1) for path in ("attn.proj", "mlp.2")]
    assert paths(after_attention=False) == ["blocks.0.mlp.2", "blocks.1.mlp.2"]
    in_place = {n for n, p in stack().named_parameters() if p.requires_grad and ".adapters." not in n}
    norms = [f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)] + ["norm"]
    assert in_place == {f"{norm}.{parameter}" for norm in norms for parameter in ("weight", "bias")}


@pytest.mark.parametrize(("after_attention", "percent"), [(True, 0.073), (False, 0.047)])
def test_the_count_is_that_of_the_paper(after_attention: bool, percent: float) -> None:
    """Of T5-base, with a bottleneck of 24 and all norm layers; there is none behind cross-attentions."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, feed_forward_proj="relu")
    with torch.device("meta"):
        t5 = transformers.T5ForConditionalGeneration(config)
    method = Compacter(after_attention=after_attention)
    targets = method.targets(t5)
    assert {method.width(t) for t in targets} == {24}
    assert len(targets) == 24 * (1 + after_attention)
    assert not any("EncDecAttention" in target.name for target in targets)
    adapters = 4**3 + len(targets) * (2 * (768 + 24) + 768 + 24)
    assert method.total_trainable(targets) == adapters
    norms = sum(t5.get_parameter(name).numel() for name in method.trained_in_place(t5))
    assert norms == (2 * 12 + 1 + 3 * 12 + 1) * 768
    assert round(100 * (adapters + norms) / sum(p.numel() for p in t5.parameters()), 3) == percent


def test_widths_are_multiples_of_n() -> None:
    for d, factor, n, r in ((768, 32, 4, 24), (12, 32, 4, 4), (1000, 32, 4, 32), (64, 4, 8, 16), (12, 3, 2, 4)):
        (target,) = Compacter(n=n, target_modules="0").targets(nn.Sequential(nn.Linear(3, d)))
        assert Compacter(n=n, reduction_factor=factor).width(target) == r


def test_n_has_to_divide_the_width() -> None:
    model = tiny(Compacter())
    with pytest.raises(TargetError, match=r"n=5 does not divide the 12 features of 'blocks.0.attn.proj'\. Those"):
        inject(model, Compacter(n=5))
    with pytest.raises(TargetError, match=r"divide all widths here are 1, 2, 5, 10; or leave the layer out"):
        inject(nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 10)), Compacter(n=4, target_modules=("0", "1")))
    assert not any(type(m).__name__.startswith("Adapted") for m in model.modules())


@pytest.mark.parametrize("arguments", [{"n": 0}, {"reduction_factor": 0}, {"phm_rank": 0}, {"init_std": 0.0}])
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=f"Compacter: {next(iter(arguments))} must be .*, got "):
        Compacter(**arguments)


def test_adapters_of_the_reference_library_compute_the_same() -> None:
    """Its layer, as published: a batch of Kronecker products by einsum, summed, and applied to rows."""
    model = moved(stack(phm_rank=2, train_norms=False))
    adapter, C = adapters(model)[2], adapters(model)[0].phm_C
    W = torch.bmm(adapter.down_A, adapter.down_B)
    products = torch.einsum("bac,bkp->bakcp", C, W)
    H = products.reshape(2, C.shape[1] * W.shape[1], C.shape[2] * W.shape[2]).sum(0)
    torch.testing.assert_close(adapter.matrices()[0], H.T)
