"""VeRA against its dense formula and HF PEFT."""

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import VeRA, inject, load_adapter, merge, save_adapter
from lightning_peft.parts.bank import bank


def matrices(r: int, d_in: int, d_out: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) in double precision, with the bounds of Kaiming's rule."""
    like = torch.zeros((), dtype=torch.float64)
    A, B = bank("vera_A", seed, r).rows(d_in, like).T, bank("vera_B", seed, r).rows(d_out, like)
    return A * (6 / d_in) ** 0.5, B * (6 / r) ** 0.5


def moved(model: nn.Module, method: VeRA) -> nn.Module:
    """``model`` in double precision, its adapters away from the start."""
    inject(model.double(), method)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "vera" in name:
            nn.init.normal_(parameter, generator=generator)
    return model


def test_layers_of_all_shapes_follow_the_formula() -> None:
    layers = nn.ModuleList([nn.Linear(9, 7), nn.Linear(3, 20), nn.Linear(12, 4)])
    for layer in moved(layers, VeRA(r=5, seed=3)):
        adapter, x = layer.adapters["default"], torch.randn(2, 6, layer.in_features, dtype=torch.float64)
        A, B = matrices(5, layer.in_features, layer.out_features, seed=3)
        delta = torch.diag(adapter.vera_lambda_b) @ B @ torch.diag(adapter.vera_lambda_d) @ A
        torch.testing.assert_close(layer(x), x @ (layer.weight + delta).T + layer.bias)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_follows_the_formula(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    model = moved(nn.Sequential(conv), VeRA(r=3, target_modules="0"))
    adapter, x = conv.adapters["default"], torch.randn(2, 4, 5, 5, dtype=torch.float64)
    A, B = matrices(3, 4 // groups * 9, 6)
    delta = (adapter.vera_lambda_b[:, None] * B) @ (adapter.vera_lambda_d[:, None] * A)
    weight = conv.weight + delta.view_as(conv.weight)
    expected = nn.functional.conv2d(x, weight, conv.bias, stride=2, padding=1, groups=groups)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(merge(model)(x), expected)


def test_only_lambda_b_has_a_gradient_at_the_start() -> None:
    model = inject(nn.Sequential(nn.Linear(9, 7)), VeRA(r=4, d_initial=0.3))
    model(torch.randn(3, 9)).square().sum().backward()
    adapter = model[0].adapters["default"]
    assert {name for name, p in adapter.named_parameters() if p.grad.any()} == {"vera_lambda_b"}
    assert adapter.vera_lambda_d.tolist() == pytest.approx([0.3] * 4)


def test_the_backward_pass_keeps_no_matrix_of_the_layer() -> None:
    model, kept = inject(nn.Sequential(nn.Linear(50, 70)), VeRA(r=20)), []
    shared = {numbers.untyped_storage().data_ptr() for numbers in model[0].adapters["default"].numbers()}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in shared and t is not model[0].weight:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(torch.randn(3, 50))
    assert max(kept) <= 3 * 70


def test_a_layer_that_is_added_later_changes_no_other(tmp_path) -> None:  # noqa: ANN001
    method = VeRA(r=5)
    model = moved(nn.Sequential(nn.Linear(4, 4)), method)
    x = torch.randn(3, 4, dtype=torch.float64)
    y = model(x)
    folder = save_adapter(model, tmp_path)
    model.append(nn.Linear(4, 400, dtype=torch.float64))
    inject(model, method)
    assert torch.equal(model[0](x), y)
    alone = nn.Sequential(nn.Linear(4, 4)).double()
    alone[0].load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
    assert torch.equal(load_adapter(alone, folder)(x), y)


def test_the_same_output_as_hf_peft_over_the_same_numbers() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 12), nn.Linear(12, 2))
    config = peft.VeraConfig(r=5, target_modules=["0", "1"], d_initial=0.5, init_weights=False)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 12), nn.Linear(12, 2)), config)
    A, B = matrices(5, 9, 12)  # of the largest layer in each direction, from which theirs cuts all
    theirs.base_model.vera_A["default"].copy_(A)
    theirs.base_model.vera_B["default"].copy_(B)
    inject(base, VeRA(r=5, target_modules=("0", "1")))
    with torch.no_grad():
        for ours, other in zip(base, theirs.base_model.model, strict=True):
            other = getattr(other, "base_layer", other)
            ours.weight.copy_(other.weight)
            ours.bias.copy_(other.bias)
        for ours, other in zip(base[:2], theirs.base_model.model[:2], strict=True):
            adapter = ours.adapters["default"]
            adapter.vera_lambda_b.copy_(nn.init.normal_(other.vera_lambda_b["default"]))
            d = nn.init.normal_(other.vera_lambda_d["default"])
            adapter.vera_lambda_d.copy_(d * (ours.in_features / 9) ** 0.5)  # theirs scales by the largest d_in
    x = torch.randn(4, 9)
    torch.testing.assert_close(base(x), theirs(x))
    with theirs.disable_adapter():
        assert not torch.allclose(base(x), theirs(x))
