"""SaRA against dense training whose gradients are masked."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import AdapterError, LinearProbe, LoRA, SaRA, inject, load_adapter, merge, save_adapter
from lightning_peft.engine import TargetError, adapters_of, notify
from lightning_peft.parts.magnitudes import below_smallest
from tests.kernels.counted import Count
from tests.methods.backbones import moved
from tests.papers.denoisers import denoise, denoise_text, dit, unet

pytest.importorskip("diffusers")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> weight of every linear layer and convolution."""
    kinds = (nn.Linear, nn.Conv2d)
    return {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, kinds)}


def theta_of(model: nn.Module, share: float) -> Tensor:
    everything = torch.cat([w.detach().flatten().abs().float() for w in weights(model).values()])
    return everything.kthvalue(round(share * len(everything))).values


def masks(model: nn.Module, share: float) -> dict[str, Tensor]:
    theta = theta_of(model, share)
    return {n: w.detach().abs().float() <= theta for n, w in weights(model).items()}


def run(model: Any, ask: Any, optimizer: torch.optim.Optimizer, steps: int, total: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        now = {"step": step, "total_steps": total}
        notify(model, "on_train_batch_start", optimizer, **now)
        (ask(model) - 0.3).square().mean().backward()
        notify(model, "on_before_optimizer_step", optimizer, **now)
        optimizer.step()
        notify(model, "on_after_optimizer_step", optimizer, **now)


@pytest.mark.parametrize(("build", "ask"), [(unet, denoise_text), (dit, denoise)])
def test_training_is_that_of_masked_dense_weights(build: Any, ask: Any) -> None:
    model, dense, chosen = inject(build(), SaRA(share=0.15, reselect=None)), build(), masks(build(), 0.15)
    run(model, ask, torch.optim.Adam(model.parameters(), lr=0.01), 4, 4)
    dense.requires_grad_(False)
    trained = [w.requires_grad_(True) for w in weights(dense).values()]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        (ask(dense) - 0.3).square().mean().backward()
        for name, weight in weights(dense).items():
            weight.grad *= chosen[name]  # type: ignore[operator]
        optimizer.step()
    expected = ask(dense)
    assert not torch.allclose(expected, ask(build()), atol=1e-3)
    torch.testing.assert_close(ask(model), expected, rtol=1e-5, atol=1e-7)
    merge(model)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, weights(dense)[name], rtol=1e-6, atol=1e-9)


def test_all_other_entries_stay_bit_for_bit() -> None:
    base, model = unet().float(), inject(unet().float(), SaRA(share=0.1))
    ask = lambda m: m(torch.ones(1, 3, 8, 8), torch.tensor([3]), torch.ones(1, 5, 6)).sample  # noqa: E731
    assert torch.equal(ask(model), ask(base))
    run(model, ask, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), 3, 6)
    chosen = masks(base, 0.1)
    after = merge(model).state_dict()
    for name, value in base.state_dict().items():
        moved_there = after[name] != value
        assert not (moved_there & ~chosen.get(name, torch.zeros_like(moved_there))).any()
    moved_at = sum(int((after[n] != w).sum()) for n, w in weights(base).items())
    assert moved_at > 0.9 * sum(int(mask.sum()) for mask in chosen.values())


def test_sliced_attention_computes_the_same() -> None:
    model = moved(inject(unet(), SaRA()))
    expected = denoise_text(model)
    model.set_attention_slice(1)
    torch.testing.assert_close(denoise_text(model), expected)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_theta_is_the_quantile_of_all_weights_together(share: float) -> None:
    tensors = [torch.randn(7, 11), 1e-3 * torch.randn(50), torch.randn(3, 2, 2).bfloat16(), 30 * torch.randn(40)]
    everything = torch.cat([t.flatten().float() for t in tensors]).abs()
    theta = below_smallest(tensors, share)
    k = round(share * len(everything))
    assert theta > everything.kthvalue(k).values
    assert (everything < theta).sum() == k
    assert theta.dtype == torch.float32


def test_weights_that_are_zero_are_among_the_smallest() -> None:
    assert 0 < below_smallest([torch.zeros(10), torch.ones(10)], 0.2) < 1e-30
    assert 1 < below_smallest([torch.tensor([2.0, -1.0])], 0.01) < 1.001  # one entry at least


def test_a_weight_without_small_entries_gets_no_adapter() -> None:
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    nn.init.constant_(net[1].weight, 5.0)
    method = SaRA(share=0.1)
    count = method.total_trainable(method.targets(net))
    assert [t.name for t in method.targets(net)] == ["0", "2"]
    assert count == 20  # of the 200 entries that are left
    inject(net, method)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count
    assert SaRA(threshold=0.1).total_trainable(SaRA(threshold=0.1).targets(net)) == sum(
        int((net[i].weight.abs() < 0.1).sum()) for i in (0, 2)
    )


def test_theta_is_that_of_the_weights_that_are_left() -> None:
    net = nn.Sequential(nn.Linear(50, 20), nn.Linear(20, 1), nn.Linear(1, 100))
    for layer, magnitude in zip(net, (5.0, 1.0, 0.1), strict=True):
        layer.weight.data.uniform_(magnitude, 1.1 * magnitude)
    # of 1120 entries 112 are in the last two, of the 120 in these 12 are in the last, and of its 100 there are 10
    assert [t.name for t in SaRA(share=0.1).targets(net)] == ["2"]
    assert SaRA(share=0.1).total_trainable(SaRA(share=0.1).targets(net)) == 10


def entries(model: nn.Module) -> list[Any]:
    return [adapter for _, _, adapter in adapters_of(model)]


def narrow() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 11), nn.Tanh(), nn.Conv1d(5, 4, 3), nn.Linear(9, 6)).double()


def ask_narrow(model: nn.Module) -> Tensor:
    return model(torch.linspace(-2, 2, 2 * 5 * 9, dtype=torch.float64).view(2, 5, 9))


def test_entries_that_have_grown_are_held_at_half_of_the_run() -> None:
    model = inject(narrow(), SaRA(share=0.3))
    base = {n: w.detach().flatten() for n, w in weights_of(model).items()}
    theta = below_smallest(list(base.values()), 0.3).item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    run(model, ask_narrow, optimizer, 5, 10)
    assert not any(a.held.any() for a in entries(model))
    before = [(a.places(), a.values.detach().clone()) for a in entries(model)]
    run(model, ask_narrow, optimizer, 1, 10, first=5)
    held = [a.held.clone() for a in entries(model)]
    for (places, values), mask, start in zip(before, held, base.values(), strict=True):
        assert torch.equal(mask, (start[places] + values).abs() >= theta)
    assert 0 < sum(int(mask.sum()) for mask in held) < sum(map(len, held))
    run(model, ask_narrow, optimizer, 4, 10, first=6)
    for adapter, (places, values), mask in zip(entries(model), before, held, strict=True):
        assert torch.equal(adapter.held, mask)  # there is one new choice
        assert torch.equal(adapter.places(), places)
        assert torch.equal(adapter.values[mask], values[mask])
        assert (adapter.values[~mask] != values[~mask]).all()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d)}


def test_survivors_go_on_as_if_the_others_had_been_held_from_outside() -> None:
    model, other = inject(narrow(), SaRA(share=0.3)), inject(narrow(), SaRA(share=0.3, reselect=None))
    one, two = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, other))
    run(model, ask_narrow, one, 5, 10)
    run(other, ask_narrow, two, 5, 10)
    run(model, ask_narrow, one, 2, 10, first=5)
    kept = [a.values.detach().clone() for a in entries(other)]
    for step in (5, 6):
        run(other, ask_narrow, two, 1, 10, first=step)
        for adapter, values, held in zip(entries(other), kept, (a.held for a in entries(model)), strict=True):
            adapter.values.data = torch.where(held, values, adapter.values)
    assert any(a.held.any() for a in entries(model))
    for a, b in zip(entries(model), entries(other), strict=True):
        torch.testing.assert_close(a.values, b.values)


def test_held_entries_have_no_gradient_that_could_be_clipped() -> None:
    model = inject(narrow(), SaRA(share=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    run(model, ask_narrow, optimizer, 6, 10)
    for adapter in entries(model):
        assert not adapter.values.grad[adapter.held].any()
        assert adapter.values.grad[~adapter.held].all()
        assert adapter._kept is None


def test_what_is_held_stays_held() -> None:
    adapter = entries(inject(narrow(), SaRA(share=0.3)))[0]
    first, second = (torch.arange(len(adapter.values)) % n == 0 for n in (2, 3))
    places = adapter.places()
    adapter.hold(first)
    adapter.hold(second)
    assert torch.equal(adapter.held, first | second)
    assert torch.equal(adapter.places(), places)


def test_a_run_of_unknown_length_is_refused_when_it_starts() -> None:
    model = inject(narrow(), SaRA())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AdapterError, match="SaRA has a schedule over the whole run"):
        notify(model, "on_train_batch_start", optimizer, step=0)
    notify(inject(narrow(), SaRA(reselect=None)), "on_train_batch_start", optimizer, step=0)


def test_the_penalty_is_the_nuclear_norm_of_the_trained_entries() -> None:
    net = nn.Sequential(nn.Linear(70, 66), nn.Linear(66, 64), nn.Linear(64, 70)).double()
    base = net[0].weight.detach().clone()
    model = inject(net, SaRA(share=0.1, lowrank_weight=0.25))
    nn.init.normal_(entries(model)[0].values, std=0.1)
    entries(model)[0].hold(torch.arange(len(entries(model)[0].values)) % 7 == 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):  # of three matrices, the first alone is large enough
        optimizer.zero_grad()
        added = notify(model, "on_before_optimizer_step", optimizer, step=step, total_steps=10)
        a = entries(model)[0]
        places = a.indices[a.indices >= 0].long()
        dense = torch.zeros(66 * 70, dtype=torch.float64)
        dense[places] = base.flatten()[places] + a.values.detach()[a.indices >= 0]
        U, S, Vh = torch.linalg.svd(dense.view(66, 70), full_matrices=False)
        torch.testing.assert_close(added["default/lowrank"], 0.25 * S.sum())
        expected = torch.zeros_like(a.values)
        expected[a.indices >= 0] = 0.25 * (U @ Vh).flatten()[places]
        torch.testing.assert_close(a.values.grad, expected)
        assert all(other.values.grad is None for other in entries(model)[1:])


@pytest.mark.parametrize("method", [SaRA(), SaRA(lowrank_weight=1.0, share=0.01)])
def test_there_is_no_penalty_unless_asked_for_and_of_few_entries(method: SaRA) -> None:
    model = inject(nn.Sequential(nn.Linear(70, 66)), method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert notify(model, "on_before_optimizer_step", optimizer, step=0, total_steps=10) == {}


def test_matrices_take_turns_in_the_penalty() -> None:
    model = inject(nn.Sequential(*[nn.Linear(66, 66) for _ in range(3)]), SaRA(lowrank_weight=1.0))
    for i, adapter in enumerate(entries(model)):
        nn.init.constant_(adapter.values, 0.1 * i)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drawn = [
        notify(model, "on_before_optimizer_step", optimizer, step=s, total_steps=99)["default/lowrank"].item()
        for s in [*range(12), *range(12)]
    ]
    assert drawn[:12] == drawn[12:]  # by the step alone
    assert len(set(drawn)) == 3


def test_files_hold_places_and_values_and_decide_how_many(tmp_path: Path) -> None:
    model = inject(unet().float(), SaRA(share=0.1))
    for adapter in entries(model):
        nn.init.normal_(adapter.values)
        adapter.hold(torch.arange(len(adapter.values)) % 3 == 0)
    folder = save_adapter(model, tmp_path)
    tensors = load_file(next(folder.glob("*.safetensors")))
    assert {key.rpartition(".")[2]: value.dtype for key, value in tensors.items() if "adapters" in key} == {
        "values": torch.float32,
        "indices": torch.int32,
    }
    other = load_adapter(unet().bfloat16(), folder)  # where other entries are below theta
    for mine, theirs in zip(entries(model), entries(other), strict=True):
        assert torch.equal(mine.indices, theirs.indices)
        assert torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(40, 30), (3, 40)), (nn.Conv2d(8, 30, (5, 1), padding=(2, 0)), (1, 8, 4, 2))]
)
def test_no_gradient_of_a_whole_weight_is_built(
    layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["lightning_peft.kernels.sparse_grad"], "PIECE", 0)
    model = moved(inject(nn.Sequential(layer), SaRA()))
    x = torch.randn(shape, requires_grad=True)
    own = {t.data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(x).sum()
    assert {t.data_ptr() for t in kept} <= own
    with Count() as count:
        loss.backward()
    assert max(count.most) < 4 * 1200
    assert count.most[4 * 240] == 3  # the gradient; the places, or a piece, and between them what decodes the first
    assert entries(model)[0].values.grad.all()


CONVS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
    (nn.Conv2d(4, 6, (2, 3), padding=(1, 2), padding_mode="reflect", bias=False), (2, 4, 5, 7)),
    (nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate"), (2, 4, 5, 7)),
    (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2), groups=2), (2, 4, 5, 7)),
    (nn.Conv2d(4, 8, 3, padding="valid", groups=4), (2, 4, 5, 7)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 5, 7)),
    (nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), dilation=(1, 1, 2)), (2, 4, 3, 5, 6)),
]


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")  # of torch, for the reference
@pytest.mark.parametrize("below", [(), (LoRA(r=2, target_modules="all-layers"),)], ids=["base", "over another"])
@pytest.mark.parametrize(("layer", "shape"), CONVS, ids=[str(layer) for layer, _ in CONVS])
def test_every_convolution_is_that_with_a_dense_change(
    layer: nn.Module, shape: tuple[int, ...], below: tuple[LoRA, ...]
) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    for i, method in enumerate(below):
        moved(inject(model, method, name=f"below{i}"))
    dense = nn.Sequential(merge(copy.deepcopy(model))[0] if below else copy.deepcopy(model[0])).requires_grad_(True)
    inject(model, SaRA(share=0.3))
    adapter = model[0].adapters["default"]
    with torch.no_grad():
        adapter.values.normal_()
        dense[0].weight.view(-1)[adapter.places()] += adapter.values
    x = torch.randn(shape, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    (model(inputs[0]) ** 3).sum().backward()
    (dense(inputs[1]) ** 3).sum().backward()
    torch.testing.assert_close(model(x), dense(x))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(adapter.values.grad, dense[0].weight.grad.flatten()[adapter.places()])


class Doubled(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(2 * x, weight, bias)


def test_what_a_layer_does_beside_its_product_is_not_lost() -> None:
    base = nn.Sequential(nn.Linear(9, 9), nn.Conv1d(5, 5, 3), Doubled(5, 4, 3)).double()
    model = copy.deepcopy(base)
    for net in (base, model):
        for layer in net[:2]:
            layer.forward = lambda x, forward=layer.forward: forward(x) + 1
    moved(inject(model, SaRA(share=0.3)))
    x, changes = torch.randn(2, 5, 9, dtype=torch.float64), []
    for adapter, layer in zip(entries(model), model, strict=True):
        flat = torch.zeros(layer.weight.numel(), dtype=torch.float64)
        changes.append(flat.index_copy(0, adapter.places(), adapter.values.detach()).view_as(layer.weight))
    h = base[0](x) + nn.functional.linear(x, changes[0])
    h = base[1](h) + nn.functional.conv1d(h, changes[1])
    torch.testing.assert_close(model(x), base[2](h) + nn.functional.conv1d(h, changes[2]))


def test_over_another_adapter_the_change_is_added() -> None:
    net = nn.Sequential(nn.Linear(9, 7), nn.Conv1d(4, 3, 3)).double()
    model = moved(inject(net, LoRA(r=2, target_modules="0")))
    inject(model, SaRA(share=0.3), name="second")
    moved(model)
    low, sparse, conv = entries(model)
    dense = torch.zeros(63, dtype=torch.float64)
    dense[sparse.indices.long()] = sparse.values.detach()
    h = torch.randn(2, 4, 9).double()
    weight = model[0].weight + low.scaling * low.lora_B @ low.lora_A + dense.view(7, 9)
    kernel = torch.zeros(36, dtype=torch.float64)
    kernel[conv.indices.long()] = conv.values.detach()
    y = nn.functional.linear(h, weight, model[0].bias)
    y = nn.functional.conv1d(y, model[1].weight + kernel.view(3, 4, 3), model[1].bias)
    torch.testing.assert_close(model(h), y)


def test_a_weight_that_another_adapter_trains_whole_gets_its_gradient() -> None:
    model = moved(inject(nn.Sequential(nn.Linear(9, 7)).double(), SaRA(share=0.3)))
    inject(model, LinearProbe(modules_to_save="0"), name="second")
    (adapter,) = entries(model)
    x = torch.randn(4, 9).double()
    model(x).square().sum().backward()
    dense = torch.zeros(63, dtype=torch.float64).index_copy(0, adapter.indices.long(), adapter.values.detach())
    whole = (model[0].weight.detach() + dense.view(7, 9)).requires_grad_(True)
    nn.functional.linear(x, whole, model[0].bias.detach()).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, whole.grad)
    torch.testing.assert_close(adapter.values.grad, whole.grad.flatten()[adapter.indices.long()])


def test_a_weight_in_half_precision_is_rounded_once() -> None:
    model = inject(nn.Sequential(nn.Linear(90, 70)).bfloat16(), SaRA(share=0.3))
    (adapter,), weight = entries(model), model[0].weight.detach()
    nn.init.normal_(adapter.values)
    expected = weight.float().flatten()
    expected[adapter.indices.long()] += adapter.values.detach()
    assert torch.equal(adapter.merged(weight, None)[0].flatten(), expected)
    assert torch.equal(merge(model)[0].weight.flatten(), expected.bfloat16())


def test_what_cannot_be_chosen_from_is_refused() -> None:
    with pytest.raises(TargetError, match=r"SaRA: no entry is below threshold=1e-30\. Raise it"):
        inject(narrow(), SaRA(threshold=1e-30))
    with torch.device("meta"):
        empty = narrow()
    with pytest.raises(TargetError, match=r"SaRA on '0': it has no values yet to choose from\. Load the weights"):
        inject(empty, SaRA())
    in_codes = narrow()
    in_codes[0].weight = nn.Parameter(torch.ones(11, 9, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        TargetError, match=r"SaRA on '0': Linear keeps its weight in torch.int8 codes .*\. Use a method"
    ):
        inject(in_codes, SaRA())
