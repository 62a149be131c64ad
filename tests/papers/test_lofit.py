"""LoFiT: scales while it chooses, offsets of the chosen heads after, and the bias that they merge into."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import AdapterError, LoFiT, inject, merge
from lightning_peft.engine import TargetError, adapters_of, load_adapter_state, notify
from lightning_peft.engine.state import adapter_state
from tests.methods.backbones import backbone, call, moved, tiny


def heads(model: nn.Module) -> list[Any]:
    return [adapter for _, _, adapter in adapters_of(model)]


def choose(model: nn.Module, kept: list[list[int]]) -> nn.Module:
    """As if these heads of each layer had been chosen, with offsets away from zero."""
    for adapter, own in zip(heads(model), kept, strict=True):
        adapter.kept.copy_(torch.tensor([float(i in own) for i in range(len(adapter.kept))]))
        adapter.chosen.fill_(1)
    return moved(model, seed=7)


def by_hooks(model: nn.Module, adapted: nn.Module) -> nn.Module:
    """``model`` with z <- (1 + A) z, or z <- z + v in the chosen heads, in front of its output projections."""

    def before(adapter: Any) -> Any:
        def hook(module: Any, args: Any) -> Any:
            z = args[0].unflatten(-1, adapter.offset.shape)
            for h in range(len(adapter.offset)):
                changed = z[..., h, :] + adapter.offset[h] * (1 if adapter.chosen else z[..., h, :])
                if not adapter.chosen or adapter.kept[h]:
                    z = torch.cat([z[..., :h, :], changed[..., None, :], z[..., h + 1 :, :]], dim=-2)
            return z.flatten(-2)

        return hook

    for path, _, adapter in adapters_of(adapted):
        model.get_submodule(path).register_forward_pre_hook(before(adapter))
    return model


@pytest.mark.parametrize("name", ["vit", "llama", "bert", "gpt2", "dit"])
@pytest.mark.parametrize("chosen", [False, True])
def test_heads_are_scaled_and_then_shifted(name: str, chosen: bool) -> None:
    model = moved(inject(backbone(name), LoFiT()))
    if chosen:
        choose(model, [[2], [0, 1]])
    assert [tuple(a.offset.shape) for a in heads(model)] == [(3, 4), (3, 4)]
    expected = call(name, by_hooks(backbone(name), model))
    torch.testing.assert_close(call(name, model), expected, rtol=1e-5, atol=1e-6)
    if name != "gpt2":
        torch.testing.assert_close(call(name, merge(model)), expected, rtol=1e-5, atol=1e-6)


def test_the_offset_goes_into_the_bias_of_a_projection_that_had_none() -> None:
    model, base = choose(inject(backbone("llama"), LoFiT()), [[2], []]), backbone("llama")
    offset = heads(model)[0].offset.detach().clone()
    merge(model)
    for i, expected in ((0, offset[2]), (1, torch.zeros(4))):
        name = f"model.layers.{i}.self_attn.o_proj"
        weight = base.get_parameter(f"{name}.weight")
        assert torch.equal(model.get_parameter(f"{name}.weight"), weight)
        torch.testing.assert_close(model.get_parameter(f"{name}.bias"), weight[:, 8:12] @ expected.to(weight))


def test_the_attention_of_torch_reads_its_projection() -> None:
    model = inject(backbone("encoder"), LoFiT())
    assert [path for path, _, _ in adapters_of(model)] == ["layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj"]
    for chosen in (False, True):
        if chosen:
            choose(model, [[2], [0, 1]])
        reference = backbone("encoder")
        for path, _, a in adapters_of(moved(model)):
            weight, bias = (reference.get_parameter(f"{path}.{name}") for name in ("weight", "bias"))
            with torch.no_grad():
                vector = a.offset.flatten()
                if chosen:
                    bias += weight @ (a.kept.repeat_interleave(4) * vector)
                else:
                    weight *= 1 + vector
        torch.testing.assert_close(call("encoder", model), call("encoder", reference))
        with torch.no_grad():
            torch.testing.assert_close(call("encoder", model), call("encoder", reference))


def run(model: nn.Module, steps: range, optimizer: Any, total: int | None = 8, each: Any = None) -> None:
    x, goal = torch.linspace(-1, 1, 70).view(2, 5, 7), torch.linspace(0, 1, 30).view(2, 5, 3)
    for step in steps:
        notify(model, "on_train_batch_start", optimizer, step=step, total_steps=total)
        loss = (model(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if each:
            each(step)
        notify(model, "on_before_optimizer_step", optimizer, step=step, total_steps=total)
        optimizer.step()
        notify(model, "on_after_optimizer_step", optimizer, step=step, total_steps=total)


def stack(method: LoFiT, lr: float = 0.05) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = inject(tiny(method), method)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)


@pytest.mark.parametrize(("top_k", "kept"), [(None, 1), (2, 2), (5, 5), (99, 6)])
def test_the_heads_of_the_largest_scales_are_chosen(top_k: int | None, kept: int) -> None:
    model, optimizer = stack(LoFiT(n_heads=3, top_k=top_k))
    before: list[Tensor] = []

    def look(step: int) -> None:
        if step < 4:  # half of the run
            assert not any(a.chosen for a in heads(model))
        if step == 3:
            before.extend(a.offset.detach().clone() for a in heads(model))
        if step >= 4:
            assert all(a.chosen for a in heads(model))
            gradients = torch.cat([a.offset.grad for a in heads(model)])
            assert gradients.any(dim=1).sum() == kept, "exactly the chosen heads learn"

    run(model, range(4), optimizer, each=look)
    scores = torch.cat([a.offset.detach().norm(dim=1) for a in heads(model)])
    run(model, range(4, 7), optimizer, each=look)
    chosen = torch.cat([a.kept for a in heads(model)]).bool()
    assert set(scores.topk(kept).indices.tolist()) == set(chosen.nonzero().flatten().tolist())
    offsets = torch.cat([a.offset for a in heads(model)])
    assert not offsets[~chosen].any()
    assert offsets[chosen].all()


def test_the_scales_are_forgotten_with_their_moments() -> None:
    model, optimizer = stack(LoFiT(n_heads=3, top_k=6, init_std=1e-3))
    run(model, range(4), optimizer)
    assert min(a.offset.abs().max().item() for a in heads(model)) > 0.05
    notify(model, "on_train_batch_start", optimizer, step=4, total_steps=8)
    assert max(a.offset.abs().max().item() for a in heads(model)) < 6e-3
    assert not optimizer.state
    first, second = (a.offset for a in heads(model))
    assert not torch.equal(first, second)
    kept = [a.offset.detach().clone() for a in heads(model)]
    notify(model, "on_train_batch_start", optimizer, step=5, total_steps=8)  # once only
    assert all(torch.equal(a.offset, v) for a, v in zip(heads(model), kept, strict=True))


def test_the_penalty_acts_before_the_choice_alone() -> None:
    model, optimizer = stack(LoFiT(n_heads=3, l1=0.3, top_k=2))
    for step, factor in ((0, 0.3), (5, 0.0)):
        notify(model, "on_train_batch_start", optimizer, step=step, total_steps=8)
        optimizer.zero_grad()
        sums = sum(a.offset.detach().abs().sum() for a in heads(model))
        added = notify(model, "on_before_optimizer_step", optimizer, step=step, total_steps=8)
        if factor:
            torch.testing.assert_close(added["default/l1"], factor * sums)
            for a in heads(model):
                torch.testing.assert_close(a.offset.grad, factor * a.offset.sign())
        else:
            assert not added
    other, optimizer = stack(LoFiT(n_heads=3, l1=0.0))
    assert not notify(other, "on_before_optimizer_step", optimizer, step=0, total_steps=8)


def test_the_choice_is_resumed() -> None:
    through, optimizer = stack(LoFiT(n_heads=3, top_k=2, selection_steps=2))
    run(through, range(3), optimizer)
    resumed, other = stack(LoFiT(n_heads=3, top_k=2, selection_steps=2))
    load_adapter_state(resumed, adapter_state(through))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, its in ((through, optimizer), (resumed, other)):
        run(model, range(3, 6), its)
    assert all(torch.equal(a.offset, b.offset) for a, b in zip(heads(through), heads(resumed), strict=True))


@pytest.mark.parametrize(
    ("method", "total", "message"),
    [
        (LoFiT(n_heads=3), None, "length is not known"),
        (LoFiT(n_heads=3, selection_steps=8), 8, r"of 8 optimizer steps, selection_steps=8 leaves none .*\. Lower it"),
        (LoFiT(n_heads=3), 1, r"of 1 optimizer steps, selection_steps=1 leaves none"),
    ],
)
def test_a_choice_that_does_not_fit_into_the_run_is_refused(method: LoFiT, total: int | None, message: str) -> None:
    model, optimizer = stack(method)
    with pytest.raises(AdapterError, match=message):
        run(model, range(1), optimizer, total)


def test_heads_that_cannot_be_told_are_asked_for() -> None:
    with pytest.raises(TargetError, match=r"no module around .* 12 features that 'blocks.0.attn.proj' is given\. Give"):
        inject(tiny(LoFiT()), LoFiT())
    with pytest.raises(TargetError, match=r"LoFiT: n_heads=5 does not divide the 12 features .*\. Give the number"):
        inject(tiny(LoFiT()), LoFiT(n_heads=5))
    with pytest.raises(TargetError, match="LoFiT: none of 2 blocks of MlpMixer .* has an attention. Name"):
        inject(backbone("mixer"), LoFiT())


def test_grouped_queries_have_as_many_offsets_as_query_heads() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 31}
    config = transformers.Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    model = inject(transformers.Qwen3ForCausalLM(config), LoFiT())
    assert [tuple(a.offset.shape) for a in heads(model)] == [(4, 6), (4, 6)]


@pytest.mark.parametrize("arguments", [{"top_k": 0}, {"selection_steps": 0}, {"l1": -1.0}, {"n_heads": 0}])
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=f"LoFiT: {next(iter(arguments))} must be .*, got "):
        LoFiT(**arguments)
