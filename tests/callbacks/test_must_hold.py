"""What people take for granted: nothing of theirs is touched, nothing is left out in silence."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader

from lightning_peft import PEFT, VPT, LoRA, inject, unload
from lightning_peft.engine import TargetError, adapters_of
from tests.callbacks.nets import Lit, LitBlocks, loader, trainer


def with_everything(calls: list[str]) -> nn.ModuleDict:
    """The net of `Lit` with all that can hang on a module, each of which notes that it was used."""
    net = Lit().net
    net["q_proj"].register_forward_pre_hook(lambda module, args: calls.append("before"))
    net["q_proj"].register_forward_hook(lambda module, args, output: calls.append("after") or 2 * output)
    net["q_proj"].register_full_backward_hook(lambda module, grads, outputs: calls.append("backward"))
    net["v_proj"].register_state_dict_pre_hook(lambda *args: calls.append("state"))
    weight_norm(net["head"])
    original = net["v_proj"].forward

    def patched(x: Tensor) -> Tensor:
        calls.append("patched")
        return 3 * original(x)

    net["v_proj"].forward = patched  # type: ignore[method-assign]
    net["norm"].weight.requires_grad_(False)
    net["dropout"].eval()
    return net


def run(net: nn.ModuleDict, calls: list[str]) -> tuple[Tensor, list[str]]:
    calls.clear()
    y = net["head"](net["v_proj"](net["q_proj"](torch.ones(2, 7, requires_grad=True))))
    y.sum().backward()
    net.zero_grad()
    net["v_proj"].state_dict()
    return y.detach(), list(calls)


def facts(net: nn.ModuleDict) -> dict[str, Any]:
    modules = {
        name: (type(m), m.training, sorted(set(vars(m)) - {"_buffers"}), len(m._forward_hooks), len(m._backward_hooks))
        for name, m in net.named_modules()
    }
    return modules | {name: (id(p), p.requires_grad, p._version) for name, p in net.named_parameters()}


def test_what_hangs_on_a_module_acts_while_it_is_adapted_and_is_there_when_it_is_unloaded() -> None:
    calls: list[str] = []
    net = with_everything(calls)
    before, keys = facts(net), list(net.state_dict())
    base, used = run(net, calls)
    assert used == ["before", "after", "patched", "backward", "state"]
    inject(net, LoRA(r=2, target_modules=("q_proj", "v_proj")))
    start, still_used = run(net, calls)
    torch.testing.assert_close(start, base)
    assert still_used == used
    for _, _, adapter in adapters_of(net):
        nn.init.ones_(adapter.lora_B)
    moved, still_used = run(net, calls)
    assert not torch.allclose(moved, base)
    assert still_used == used
    unload(net)
    assert facts(net) == before
    assert list(net.state_dict()) == keys
    again, used_again = run(net, calls)
    assert torch.equal(again, base)
    assert used_again == used


class Watch(L.Callback):
    """Keeps the data and the dropout mask of each step."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.masks: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        note = lambda module, args, output: self.masks.append(output == 0) if module.training else None  # noqa: E731
        pl_module.net["dropout"].register_forward_hook(note)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0])


def test_the_order_of_the_data_and_dropout_are_those_of_a_run_without_adapters(tmp_path: Path) -> None:
    def watched(*callbacks: L.Callback) -> Watch:
        watch, module = Watch(), Lit()
        data = DataLoader(loader().dataset, batch_size=8, shuffle=True)
        torch.manual_seed(5)
        trainer(tmp_path, *callbacks, watch).fit(module, data, loader())
        return watch

    without, adapted = watched(), watched(PEFT(LoRA(r=2), summary=False))
    assert len(without.batches) == len(without.masks) == 2 * len(loader())
    assert any(mask.any() for mask in without.masks)
    for one, other in zip(without.batches + without.masks, adapted.batches + adapted.masks, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("error:.*got no gradient")
def test_a_warning_of_missing_gradients_can_be_made_an_error(tmp_path: Path) -> None:
    class Unused(Lit):
        def forward(self, x: Tensor) -> Tensor:
            return self.net["head"](self.net["v_proj"](x.new_ones(len(x), 11)))

    with pytest.raises(UserWarning, match=r"1 adapters got no gradient.*net\.q_proj"):
        trainer(tmp_path, PEFT(LoRA(r=2), summary=False)).fit(Unused(), loader(), loader())


class Mixed(Lit):
    """Layers of kinds that LoRA cannot adapt beside those that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.net["norm_proj"] = weight_norm(nn.Linear(5, 5))
        self.net["both_proj"] = nn.Bilinear(5, 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        h = net["norm_proj"](net["v_proj"](torch.tanh(net["q_proj"](x))))
        return net["head"](net["both_proj"](h, h))


@pytest.mark.parametrize(
    ("target_modules", "left_out"),
    [
        (r".*_proj", {"norm_proj": "ParametrizedLinear", "both_proj": "Bilinear"}),
        ("all-linear", {"norm_proj": "ParametrizedLinear"}),
        (("q_proj", "v_proj"), {}),
        ("all-layers", {}),
    ],
    ids=str,
)
def test_layers_that_a_wildcard_selects_but_no_adapter_fits_are_in_the_table(
    target_modules: Any, left_out: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Mixed()
    trainer(tmp_path, PEFT(LoRA(r=2, target_modules=target_modules)), max_steps=1).fit(module, loader(), loader())
    rows = [line for line in capsys.readouterr().out.splitlines() if "none fits" in line]
    assert len(rows) == len(left_out)
    for name, kind in left_out.items():
        assert any(f"net.{name} " in row and f" 1 │ {kind} " in row for row in rows), (name, rows)
    assert {name for name, _, _ in adapters_of(module)} == {"net.q_proj", "net.v_proj"}


def test_like_blocks_share_a_row_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = VPT(num_virtual_tokens=3)
    trainer(tmp_path, PEFT(method), max_steps=1).fit(LitBlocks(), loader(), loader())
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "net.blocks" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["net.blocks.*", "2", "TinyBlock 12", "BlockTokens", "72"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
@pytest.mark.parametrize("name", ["both_proj", "norm_proj", "dropout", "scripted"])
def test_a_layer_that_no_adapter_fits_is_refused_when_it_is_named(name: str) -> None:
    module = Mixed()
    module.net["scripted"] = torch.jit.script(nn.Linear(5, 5))
    with pytest.raises(TargetError, match=rf"target_modules '{name}' matched 'net\.{name}', a .*; but LoRA adapts"):
        inject(module, LoRA(r=2, target_modules=("q_proj", name)))
    assert not adapters_of(module)
