"""EVA against HF PEFT and plain principal components, and ranks that a file decides."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import initialize_lora_eva_weights
from torch import Tensor, nn

from lightning_peft import EVA, AdapterError, inject, load_adapter, merge, save_adapter
from lightning_peft.engine import adapter_state, adapters_of, calibrate, load_adapter_state
from lightning_peft.engine.errors import AdapterFileError
from lightning_peft.methods.lora.eva import allocated
from lightning_peft.parts.spectrum import PrincipalComponents, leading_svd
from tests.papers.stack import Stack, batch, loss, stack

TARGETS = r"layers\.\d\.(attn|up|down)"


def losses(model: nn.Module, n: int = 5) -> list[Callable[[], Tensor]]:
    return [lambda step=step: loss(model, step) for step in range(n)]  # type: ignore[misc]


def calibrated(**arguments: object) -> Stack:
    model = inject(stack(), EVA(target_modules=TARGETS, **arguments))  # type: ignore[arg-type]
    calibrate(model, losses(model))
    return model


def inputs_of(model: Stack) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args, path=path: seen.setdefault(path, []).append(args[0]))
    for step in range(5):
        model(batch(step)[0])
    return {path: torch.cat([x.detach().reshape(-1, x.shape[-1]) for x in found]) for path, found in seen.items()}


def test_the_rows_of_a_are_the_principal_components_of_all_inputs() -> None:
    inputs = inputs_of(stack())
    model = calibrated(r=2)
    for path, _, adapter in adapters_of(model):
        x = inputs[path].double()
        _, _, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        A = adapter.lora_A.double()
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)).double(), rtol=0, atol=1e-5)
        cosines = (A * Vh[: len(A)]).sum(1).abs()  # up to their sign
        # what is lost with each batch turns them a little: up to a few degrees for the last one
        assert (cosines > 0.98).all(), (path, cosines)
    x, _ = batch(9)
    assert torch.equal(model(x), stack()(x))


def test_components_of_one_batch_are_exact_and_do_not_depend_on_how_rows_are_cut() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, 7)
    _, values, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    for cuts in ([40], [7, 13, 20], [1] * 40):
        found = PrincipalComponents(6)
        for piece in rows.split(cuts):
            found.add(piece)
        torch.testing.assert_close(found.values[-6:], values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close((found.components @ Vh.T).abs(), torch.eye(6).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.shares, values**2 / values.square().sum(), rtol=1e-6, atol=1e-6)


def test_a_decomposition_under_autocast_is_that_without_it() -> None:
    weight = torch.randn(7, 9)
    expected = leading_svd(weight, 2, 4, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = leading_svd(weight, 2, 4, torch.Generator().manual_seed(0))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_ranks_go_where_the_variance_is_and_their_sum_stays() -> None:
    shares = [torch.tensor([0.9, 0.05, 0.01]), torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.25, 0.1])]
    assert allocated(shares, 6) == [1, 3, 2]
    ranks = [len(a.lora_A) for _, _, a in adapters_of(calibrated(r=2))]
    assert sum(ranks) == 2 * len(ranks)
    assert max(ranks) <= 4
    assert len(set(ranks)) > 1
    assert {len(a.lora_A) for _, _, a in adapters_of(calibrated(r=2, rho=1.0))} == {2}


def test_hf_peft_gives_the_same_ranks_and_components_for_one_batch() -> None:
    class Inputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack()

        def forward(self, x: Tensor) -> Tensor:
            return self.stack(x)

    x = torch.cat([batch(step)[0] for step in range(5)])
    eva = EvaConfig(rho=2.0, tau=0.99, adjust_scaling_factors=False)
    config = LoraConfig(r=2, target_modules=f".*{TARGETS}", init_lora_weights="eva", eva_config=eva)
    theirs = get_peft_model(Inputs(), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        theirs,
        dataloader=[{"x": x}] * 3,
        forward_fn=lambda model, inputs: model(inputs["x"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda layer_input, *_: layer_input[0].flatten(0, -2),
        show_progress_bar=False,
    )
    model = inject(stack(), EVA(r=2, target_modules=TARGETS))
    calibrate(model, [lambda: model(x).square().mean()])
    for path, _, adapter in adapters_of(model):
        A = theirs.get_submodule(f"base_model.model.stack.{path}").lora_A["default"].weight
        assert A.shape == adapter.lora_A.shape
        torch.testing.assert_close((A * adapter.lora_A).sum(1).abs(), torch.ones(len(A)), rtol=0, atol=1e-3)


def test_a_file_decides_the_ranks(tmp_path: Path) -> None:
    model = calibrated(r=2)
    with torch.no_grad():
        for _, _, adapter in adapters_of(model):
            adapter.lora_B.normal_()
    save_adapter(model, tmp_path)
    again = load_adapter(stack(), tmp_path)
    x, _ = batch(9)
    assert torch.equal(again(x), model(x))
    assert torch.allclose(merge(again)(x), model(x), atol=1e-5)
    save_adapter(model, tmp_path / "lora", as_lora=True)
    torch.testing.assert_close(load_adapter(stack(), tmp_path / "lora")(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_file_whose_ranks_disagree_changes_nothing() -> None:
    tensors = {key: value.clone() for key, value in adapter_state(calibrated(r=2)).items()}
    torn = next(key for key in tensors if key.endswith("lora_B"))
    tensors[torn] = tensors[torn][:, :-1]
    model = inject(stack(), EVA(r=2, target_modules=TARGETS))
    before = {key: value.clone() for key, value in adapter_state(model).items()}
    with pytest.raises(AdapterFileError, match=f"1 tensors are of the wrong shape: {torn}"):
        load_adapter_state(model, tensors)
    after = adapter_state(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_parameters_stay_the_same_objects() -> None:
    model = inject(stack(), EVA(r=2, target_modules=TARGETS))
    before = [id(p) for p in model.parameters()]
    calibrate(model, losses(model))
    assert [id(p) for p in model.parameters()] == before


def test_whitening_divides_by_the_root_of_the_singular_value() -> None:
    plain, white = calibrated(r=2), calibrated(r=2, whiten=True)
    inputs = inputs_of(stack())
    for (path, _, one), (_, _, other) in zip(adapters_of(plain), adapters_of(white), strict=True):
        values = torch.linalg.svdvals(inputs[path] - inputs[path].mean(0))
        scale = (one.lora_A.norm(dim=1) / other.lora_A.norm(dim=1)).square()
        torch.testing.assert_close(scale, values[: len(scale)], rtol=0.1, atol=0)  # the values lose what batches lose


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Masked()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.model(x, attention_mask=mask)


def test_padding_is_left_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    padded = torch.where(mask.bool()[..., None], x, 100 * torch.randn(2, 5, 4))
    base = Outer()
    found = []
    for inputs, given in ((padded, mask), (x[mask.bool()][None], None)):
        model = inject(copy.deepcopy(base), EVA(r=2, target_modules="inner.0"))
        calibrate(model, [lambda m=model, i=inputs, g=given: m(i, g).sum()])  # type: ignore[misc]
        found.append(model.model.inner[0].adapters["default"].lora_A)
    torch.testing.assert_close(found[0].abs(), found[1].abs())


def test_inputs_that_do_not_vary_are_an_error() -> None:
    model = inject(stack(), EVA(r=2, target_modules=TARGETS))
    with pytest.raises(AdapterError, match="EVA: the input of .* is not finite"):
        calibrate(model, [lambda: model(torch.full_like(batch(0)[0], float("nan"))).sum()])
    with pytest.raises(AdapterError, match="EVA: the variance of the input of .* is not finite"):
        calibrate(model, [lambda: model(torch.zeros(1, 3)).sum()])
    with pytest.raises(AdapterError, match="EVA: rho must be a number >= 1, got 0.5"):
        EVA(rho=0.5)
