"""Houlsby and Pfeiffer adapters against their formula, computed by hooks on the layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import AdapterError, HoulsbyAdapter, PfeifferAdapter, inject, unload
from lightning_peft.engine import adapters_of
from tests.methods.backbones import backbone, call, moved, tiny

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda h: h.clamp(min=0),
    "gelu": lambda h: h * torch.special.ndtr(h),
    "gelu_new": lambda h: 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))),
    "swish": lambda h: h * torch.sigmoid(h),
    "tanh": lambda h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp()),
}


def by_hooks(model: nn.Module, adapted: nn.Module, activation: str, scaling: float = 1.0, axis: int = -1) -> nn.Module:
    """``model``, in which hooks behind the same layers compute what the adapters of ``adapted`` should."""

    def behind(adapter: Any) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            y = (output[0] if isinstance(output, tuple) else output).movedim(axis, -1)
            hidden = ACTIVATIONS[activation](y @ adapter.down.T + adapter.down_bias)
            y = (y + scaling * (hidden @ adapter.up.T + adapter.up_bias)).movedim(-1, axis)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    for path, _, adapter in adapters_of(adapted):
        model.get_submodule(path).register_forward_hook(behind(adapter))
    return model


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama", "dit"])
def test_both_sublayers_of_each_block_follow_the_formula(name: str) -> None:
    model = moved(inject(backbone(name), HoulsbyAdapter(r=3, train_norms=False, scaling=0.7)))
    assert len(adapters_of(model)) == 4
    torch.testing.assert_close(call(name, model), call(name, by_hooks(backbone(name), model, "swish", 0.7)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activations(activation: Any) -> None:
    model = moved(inject(tiny(PfeifferAdapter()).double(), PfeifferAdapter(r=3, activation=activation)))
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    reference = by_hooks(tiny(PfeifferAdapter()).double(), model, activation)
    assert [path for path, _, _ in adapters_of(model)] == ["blocks.0.mlp.2", "blocks.1.mlp.2"]
    torch.testing.assert_close(model(x), reference(x))
    parameters = [p for _, _, adapter in adapters_of(model) for p in adapter.parameters()]
    ours = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.testing.assert_close(ours, torch.autograd.grad(reference(x).square().sum(), parameters))


@pytest.mark.parametrize(("name", "axis"), [("convnext", 1), ("resnet", 1)])
def test_channels_of_convolutions_are_on_the_second_axis(name: str, axis: int) -> None:
    method = PfeifferAdapter(r=3, target_modules=r".*(fc2|conv2)")
    model = moved(inject(backbone(name), method))
    torch.testing.assert_close(call(name, model), call(name, by_hooks(backbone(name), model, "relu", axis=axis)))
    one = moved(inject(nn.Sequential(nn.Conv1d(3, 4, 3)).double(), PfeifferAdapter(r=3, target_modules="0")))
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    adapter = adapters_of(one)[0][2]
    y = F.conv1d(x, one.get_parameter("0.weight"), one.get_parameter("0.bias")).mT
    hidden = (y @ adapter.down.T + adapter.down_bias).relu()
    torch.testing.assert_close(one(x), (y + hidden @ adapter.up.T + adapter.up_bias).mT)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_attention_that_answers_with_a_tuple(norm_first: bool, training: bool) -> None:
    """Also where evaluation would hand all weights to one fused operation."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().train(training)

    torch.manual_seed(1)
    base = build()
    model = build()
    model.load_state_dict(base.state_dict())
    moved(inject(model, HoulsbyAdapter(r=3, train_norms=False)))
    assert {path for path, _, _ in adapters_of(model)} >= {"layers.0.self_attn", "layers.1.linear2"}
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, by_hooks(base.train(), model, "swish")(x))  # hooks: not the fused one
    attention = model.get_submodule("layers.0.self_attn")
    whole, weights = attention(x, x, x, average_attn_weights=False)
    assert weights.shape == (2, 2, 5, 5)
    assert not torch.equal(whole, attention.get_submodule("out_proj")(whole))


def test_what_is_scaled_before_the_residual_is_adapted_behind_the_scale() -> None:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 3, "depth": 2}
    build = lambda: timm.create_model("vit_tiny_patch16_224", init_values=0.1, **sizes).double().eval()  # noqa: E731
    base, model = build(), build()
    model.load_state_dict(base.state_dict())
    moved(inject(model, PfeifferAdapter(r=3)))
    assert [path for path, _, _ in adapters_of(model)] == ["blocks.0.ls2", "blocks.1.ls2"]
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(image), by_hooks(base, model, "relu")(image))


def test_the_starts() -> None:
    method = PfeifferAdapter(r=400, target_modules="0")
    base = nn.Sequential(nn.Linear(5, 300))
    adapter = adapters_of(inject(base, method))[0][2]
    for matrix in (adapter.down, adapter.up):
        assert matrix.std().item() == pytest.approx(0.02, rel=0.02)
    assert not adapter.down_bias.any()
    assert not adapter.up_bias.any()
    unload(base)
    adapter = adapters_of(inject(base, PfeifferAdapter(r=400, target_modules="0", init="identity")))[0][2]
    assert adapter.down.abs().max().item() == pytest.approx(300**-0.5, rel=0.01)
    assert adapter.down.std().item() == pytest.approx((3 * 300) ** -0.5, rel=0.02)
    assert not adapter.up.any()


def test_both_matrices_learn_from_the_second_step_on() -> None:
    method = HoulsbyAdapter(r=3, init="identity", train_norms=False)
    model, x = inject(tiny(method), method), torch.randn(2, 5, 7)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_a_learnt_scaling_is_trained() -> None:
    method = PfeifferAdapter(r=3, scaling="learned")
    model, x = inject(tiny(method).double(), method), torch.randn(2, 5, 7, dtype=torch.float64)
    fixed = inject(tiny(method).double(), PfeifferAdapter(r=3))
    assert torch.equal(model(x), fixed(x))
    adapter = adapters_of(moved(model))[0][2]
    assert adapter.scaling.shape == (1,)
    reference = by_hooks(tiny(method).double(), model, "relu")
    with torch.no_grad():
        scaled = model(x)
        for _, _, adapter in adapters_of(model):
            adapter.up *= adapter.scaling
            adapter.up_bias *= adapter.scaling
    torch.testing.assert_close(scaled, reference(x))


def test_dropout_falls_on_the_bottleneck_in_training_alone() -> None:
    model = moved(inject(nn.Sequential(nn.Linear(4, 4)), PfeifferAdapter(r=3, target_modules="0", dropout=0.4)))
    adapter, x = adapters_of(model)[0][2], torch.randn(6, 4)
    model.eval()
    assert torch.equal(model(x), model(x))
    y = F.linear(x, model.get_parameter("0.weight"), model.get_parameter("0.bias"))
    model.train()
    torch.manual_seed(3)
    hidden = F.dropout((y @ adapter.down.T + adapter.down_bias).relu(), 0.4)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), y + hidden @ adapter.up.T + adapter.up_bias)


def test_norm_layers_train_beside_the_adapters() -> None:
    model = inject(backbone("bert"), HoulsbyAdapter(r=3))
    names = {n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n}
    assert {"bert.encoder.layer.1.output.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"} <= names
    assert all("LayerNorm" in name for name in names)
    model = inject(backbone("bert"), PfeifferAdapter(r=3))
    assert all(".adapters." in n for n, p in model.named_parameters() if p.requires_grad)


def test_the_number_of_trained_numbers_is_that_of_the_paper() -> None:
    """Of a model of BERT's size: 2 d r + d + r for each adapter, and 2 d for each norm layer."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
    method = HoulsbyAdapter(r=64)
    assert method.total_trainable(method.targets(bert)) == 24 * (2 * 768 * 64 + 64 + 768)
    pfeiffer = PfeifferAdapter()
    assert pfeiffer.total_trainable(pfeiffer.targets(bert)) == 12 * (2 * 768 * 48 + 48 + 768)


@pytest.mark.parametrize("arguments", [{"r": 0}, {"r": -1}, {"scaling": 0.0}, {"scaling": "learnt"}, {"dropout": 1.0}])
@pytest.mark.parametrize("cls", [HoulsbyAdapter, PfeifferAdapter])
def test_an_argument_out_of_range_is_refused(cls: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=f"{cls.__name__}: {next(iter(arguments))} must be .*, got "):
        cls(**arguments)


def test_an_unknown_activation_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        AdapterError, match="activation must be one of 'relu', 'gelu', 'gelu_new', 'swish', 'tanh', got 'mish'"
    ):
        HoulsbyAdapter(activation="mish")  # type: ignore[arg-type]
