"""Adapters on whole modules: blocks, attentions, containers, whatever is called."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import DoRA, LoRA, disabled, merge, unload
from lightning_peft.engine import Adapter, Kind, Layer, MergeError, Method, Target, adapters_of, inject
from lightning_peft.engine.targets import module_target
from tests.methods.backbones import assert_unchanged, snapshot, tiny


class Offset(Adapter):
    """Adds a vector to what a module answers, and remembers how it was called."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.offset = target.new_parameter(target.d_out)
        self.calls: list[Any] = []

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        self.offset.copy_(torch.randn(self.offset.shape, generator=generator))

    def forward(self, x: Any, layer: Layer) -> Any:
        self.calls.append((layer.keyword, layer.arguments()))
        self.below = layer.below
        assert layer.is_base == (not layer.below)
        return layer(x) + self.offset


@dataclass(frozen=True, kw_only=True)
class Offsets(Method):
    """A method of the tests alone, never registered."""

    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"module": Offset}
    mergeable: ClassVar[bool] = False

    names: tuple[str, ...]
    width: int = 3

    def targets(self, model: nn.Module) -> list[Target]:
        return [module_target(model, name, self.width) for name in self.names]

    def adapter(self, target: Target) -> Adapter:
        return Offset(target)

    @classmethod
    def examples(cls) -> tuple["Offsets", ...]:
        return ()


def offset_of(model: nn.Module, name: str = "default") -> Offset:
    (found,) = [adapter for _, _, adapter in adapters_of(model, name)]
    assert isinstance(found, Offset)
    return found


class Sized(nn.Module):
    """Takes more than one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float, *, shift: float = 0.0) -> Tensor:
        return scale * self.inner(x) + shift


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sized = Sized()

    def forward(self, x: Tensor, how: Callable[..., Tensor]) -> Tensor:
        return how(self.sized, x)


BY_POSITION: Any = lambda module, x: module(x, 2.0, shift=1.0)  # noqa: E731
BY_NAME: Any = lambda module, x: module(x=x, scale=2.0, shift=1.0)  # noqa: E731


def test_an_argument_that_comes_first_by_name_keeps_its_name() -> None:
    model, x = Around(), torch.randn(2, 3)
    how: Any = lambda module, x: module(scale=2.0, x=x)  # noqa: E731
    expected = model(x, how)
    inject(model, Offsets(names=("sized",)))
    torch.testing.assert_close(model(x, how), expected + offset_of(model).offset)


@pytest.mark.parametrize(("how", "keyword"), [(BY_POSITION, None), (BY_NAME, "x")])
def test_an_adapter_sees_all_arguments_however_they_were_given(how: Any, keyword: str | None) -> None:
    model, x = Around(), torch.randn(2, 3)
    expected = model(x, how)
    inject(model, Offsets(names=("sized",)))
    inject(model, Offsets(names=("sized",)), name="above")
    below, above = (offset_of(model, name) for name in ("default", "above"))
    torch.testing.assert_close(model(x, how), expected + below.offset + above.offset)
    assert above.calls == below.calls == [(keyword, {"scale": 2.0, "shift": 1.0})]
    assert (above.below, below.below) == ((below,), ())


class Doubled(Offset):
    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        arguments = layer.arguments()
        return layer(x, **(arguments | {"scale": 2 * arguments["scale"]}))


@pytest.mark.parametrize("how", [BY_POSITION, BY_NAME])
@pytest.mark.parametrize("stacked", [False, True])
def test_an_adapter_changes_the_other_arguments(how: Any, stacked: bool, monkeypatch: Any) -> None:
    model, x = Around(), torch.randn(2, 3)
    expected = 4.0 * model.sized.inner(x) + 1.0
    if stacked:
        inject(model, Offsets(names=("sized",)), name="below")
        nn.init.zeros_(offset_of(model, "below").offset)
    monkeypatch.setattr(Offsets, "adapter", lambda self, target: Doubled(target))
    inject(model, Offsets(names=("sized",)))
    torch.testing.assert_close(model(x, how), expected)


@pytest.mark.parametrize("name", ["", "v_proj", "norm"])
def test_a_module_of_any_type_is_adapted_and_given_back(name: str) -> None:
    model, x = tiny(), torch.randn(2, 7)
    before, seen = snapshot(model), model(x)
    inject(model, Offsets(names=(name,), width=5 if name else 3))
    offset = offset_of(model)
    assert not torch.allclose(model(x), seen)
    if not name:
        torch.testing.assert_close(model(x), seen + offset.offset)
    with disabled(model):
        assert torch.equal(model(x), seen)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
    with pytest.raises(MergeError, match="not a change of weights"):
        merge(model)
    assert_unchanged(unload(model), before)


def test_a_sequence_does_not_run_its_adapters_as_layers() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 3))), torch.randn(2, 3)
    expected = model(x)
    inject(model, Offsets(names=("1",)))
    torch.testing.assert_close(model(x), expected + offset_of(model).offset)
    assert len(model[1]) == 2
    assert [type(m) for m in model[1]] == [nn.ReLU, nn.Linear]


def test_weights_below_a_module_adapter_are_those_of_the_base() -> None:
    """DoRA takes its norms from what lies below; what is around the module is no change of them."""
    model = tiny()
    inject(model, Offsets(names=("v_proj",), width=5), name="around")
    inject(model, DoRA(r=2, target_modules="v_proj"), name="dora")
    ((_, _, dora),) = adapters_of(model, "dora")
    torch.testing.assert_close(dora.magnitude.flatten(), model.get_parameter("v_proj.weight").norm(dim=1))


@pytest.mark.parametrize("order", [("around", "dora"), ("dora", "around")])
def test_a_layer_and_the_module_that_it_is_are_adapted_together(order: tuple[str, str]) -> None:
    base, x = tiny(), torch.randn(2, 11)
    methods = {"around": Offsets(names=("v_proj",), width=5), "dora": DoRA(r=2, target_modules="v_proj")}
    alone = inject(tiny(), methods["dora"], name="dora")
    for name in order:
        inject(base, methods[name], name=name)
    for model in (alone, base):
        ((_, _, dora),) = adapters_of(model, "dora")
        nn.init.ones_(dora.lora_B)
        nn.init.constant_(dora.magnitude, 2.0)
    offset = offset_of(base, "around").offset
    above = base.v_proj(x) - offset if order[0] == "dora" else None
    layer = base.v_proj.adapters
    assert list(layer) == list(order)
    if above is not None:
        torch.testing.assert_close(above, alone.v_proj(x))
    else:  # DoRA rescales what lies below, the offset with it
        rescaled = 2.0 / (base.v_proj.weight + dora.scaling * dora.lora_B @ dora.lora_A).norm(dim=1)
        difference = base.v_proj(x) - alone.v_proj(x)
        torch.testing.assert_close(difference, (rescaled * offset).expand_as(difference))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("enable_nested_tensor", [False, True])
@pytest.mark.parametrize("name", ["layers.1.linear2", "layers.0.self_attn", "layers.1"])
def test_a_fused_encoder_calls_its_adapted_layers(name: str, enable_nested_tensor: bool) -> None:
    """In evaluation it would hand all weights to one operation that calls nothing."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor).eval()
    x = torch.randn(2, 4, 6)
    padding = torch.tensor([[False] * 4, [False] * 3 + [True]])
    before = snapshot(model)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)

    class First(Offset):
        def forward(self, x: Any, layer: Layer) -> Any:
            y = layer(x)
            assert not x.is_nested
            return (y[0] + self.offset, *y[1:]) if isinstance(y, tuple) else y + self.offset

    class Method(Offsets):
        def adapter(self, target: Target) -> Adapter:
            return First(target)

    inject(model, Method(names=(name,), width=6))
    with torch.no_grad():
        fused = model(x, src_key_padding_mask=padding)
    called = model.train()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fused[~padding], called[~padding])
    with torch.no_grad(), disabled(model.eval()):  # and fuses them again
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)
    assert_unchanged(unload(model.eval()), before)


def test_an_adapter_in_calls_alone_acts_under_a_fused_encoder() -> None:
    class Gate(Offset):
        def forward(self, x: Tensor, layer: Layer) -> Tensor:
            return layer(x) * self.offset

    class Gates(LoRA):
        adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {"linear": Gate}

        def adapter(self, target: Target) -> Adapter:
            return Gate(target)

    model, x = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).eval(), torch.randn(2, 4, 6)
    before = model(x)
    inject(model, Gates(target_modules="linear1"))
    with torch.no_grad():
        seen = model(x)
    assert not torch.allclose(seen, before)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), seen)
    torch.testing.assert_close(model.train()(x), seen)
