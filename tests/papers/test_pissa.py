"""PiSSA and SoMA against their papers: which part of a weight is trained, and that nothing else changes."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_peft import AdapterError, PiSSA, SoMA, disabled, inject, unload
from lightning_peft.engine import adapters_of
from tests.papers.stack import batch, loss, stack, steps

METHODS = [PiSSA(r=2), PiSSA(r=2, alpha=6.0), SoMA(r=2), SoMA(r=2, alpha=1.0)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_what_is_left_of_the_weight_lacks_the_chosen_triplets(method: PiSSA) -> None:
    model = inject(stack().double(), method)
    for _, module, adapter in adapters_of(model):
        values = torch.linalg.svdvals(module.weight)
        scaled = adapter.scaling * adapter.lora_B @ adapter.lora_A
        left = torch.linalg.svdvals(module.weight - scaled)
        chosen = values[:2] if type(method) is PiSSA else values[-2:]
        others = values[2:] if type(method) is PiSSA else values[:-2]
        torch.testing.assert_close(left[: len(others)], others, rtol=1e-9, atol=1e-10)
        assert left[len(others) :].abs().max() < 1e-9
        # both factors carry the root of the spectrum
        torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.T, torch.diag(chosen / adapter.scaling))
        torch.testing.assert_close(adapter.lora_B.T @ adapter.lora_B, torch.diag(chosen / adapter.scaling))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_it_trains_as_if_the_product_had_been_taken_out_of_the_weight(method: PiSSA) -> None:
    model = inject(stack().double(), method)
    taken_out = {}
    for path, module, adapter in adapters_of(model):
        rest = module.weight.detach() - adapter.scaling * (adapter.lora_B @ adapter.lora_A).detach()
        factors = [nn.Parameter(p.detach().clone()) for p in (adapter.lora_A, adapter.lora_B)]
        taken_out[path] = (rest, float(adapter.scaling), *factors)
    plain = stack().double()

    def absorbed(step: int) -> torch.Tensor:
        weights = {f"{path}.weight": rest + s * B @ A for path, (rest, s, A, B) in taken_out.items()}
        x, y = batch(step)
        return (torch.func.functional_call(plain, weights, (x.double(),)) - y.double()).square().mean()

    theirs = SGD([p for _, _, A, B in taken_out.values() for p in (A, B)], lr=0.01)
    for step in range(4):
        theirs.zero_grad()
        absorbed(step).backward()
        theirs.step()
    steps(model, SGD(model.parameters(), lr=0.01), 0, 4)
    for path, _, adapter in adapters_of(model):
        torch.testing.assert_close(adapter.lora_A, taken_out[path][2], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(adapter.lora_B, taken_out[path][3], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_start_and_the_base_are_exact_in_any_precision(dtype: torch.dtype) -> None:
    base = stack().to(dtype)
    x = batch(0)[0].to(dtype)
    model = inject(copy.deepcopy(base), PiSSA(r=2, alpha=6.0))
    assert torch.equal(model(x), base(x))
    for _, _, adapter in adapters_of(model):
        nn.init.normal_(adapter.lora_B)
    assert not torch.equal(model(x), base(x))
    with disabled(model):
        assert torch.equal(model(x), base(x))
    for (name, p), q in zip(unload(model).named_parameters(), base.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_randomised_start_is_nearly_the_exact_one() -> None:
    weight = torch.randn(60, 80) @ torch.diag(0.8 ** torch.arange(80.0)) @ torch.randn(80, 90)
    layers = []
    for niter in (None, 4):
        model = nn.Sequential(nn.Linear(90, 60))
        model[0].weight.data = weight.clone()
        layers.append(inject(model, PiSSA(r=5, niter=niter))[0].adapters["default"])
    exact, random = (adapter.lora_B @ adapter.lora_A for adapter in layers)
    # the same part of the weight, up to what the fifth and sixth value leave undecided
    assert (exact - random).norm() < 1e-3 * exact.norm()


def test_it_starts_where_hf_peft_starts() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights="pissa", target_modules=["attn", "up"])
    theirs = peft.get_peft_model(stack(), config).base_model.model
    ours = inject(stack(), PiSSA(r=2, alpha=6.0, target_modules=("attn", "up")))
    for path, _, adapter in adapters_of(ours):
        layer = theirs.get_submodule(path)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, product, rtol=1e-4, atol=1e-6)
    x = batch(0)[0]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_the_last_triplets_need_an_exact_decomposition() -> None:
    with pytest.raises(AdapterError, match="only an exact decomposition finds the last, got 4"):
        SoMA(niter=4)
    assert loss(inject(stack(), SoMA(r=1)), 0).isfinite()
