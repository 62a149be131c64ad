"""Adapted modules compute what a plain module with changed weights does, however they are used."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_peft import DoRA, LoRA, inject, merge, set_active, unload
from lightning_peft.engine import Adapter, adapters_of
from lightning_peft.engine.slots import base_buffers, base_modules, base_parameters
from tests.engine.by_hand import assert_same, lora
from tests.methods.backbones import assert_unchanged, moved, snapshot


@pytest.fixture(autouse=True)
def in_float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_class_and_names_of_an_adapted_module_stay() -> None:
    base = nn.Sequential(nn.Linear(3, 5))
    layer, keys = base[0], list(base.state_dict())
    inject(base, LoRA(r=2))
    assert base[0] is layer
    assert isinstance(layer, nn.Linear)
    assert [key for key in base.state_dict() if "adapters" not in key] == keys


def test_checkpoint_of_the_base_loads_after_injection() -> None:
    other = nn.Sequential(nn.Linear(3, 5))
    model = inject(nn.Sequential(nn.Linear(3, 5)), LoRA(r=2))
    left = model.load_state_dict(other.state_dict(), strict=False)
    assert left.unexpected_keys == []
    assert all("adapters" in key for key in left.missing_keys)
    x = torch.randn(4, 3)
    assert torch.equal(model(x), other(x))


def test_raw_weight_is_what_everybody_else_sees() -> None:
    model = moved(inject(nn.Sequential(nn.Linear(3, 5)), LoRA(r=2)))
    assert model[0].weight is model[0]._parameters["weight"]
    model(torch.randn(2, 3))
    assert model[0].weight is model[0]._parameters["weight"]


CONVOLUTIONS = [
    (nn.Conv1d(6, 10, 3, stride=2, padding=1), (6, 13)),
    (nn.Conv1d(6, 9, 3, groups=3, dilation=2), (6, 13)),
    (nn.Conv2d(3, 7, (3, 5), padding="same"), (3, 11, 9)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 7, 9)),
    (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (3, 7, 9)),
    (nn.Conv2d(4, 6, 3, (1, 2), (2, 1), dilation=(2, 1), groups=2, padding_mode="circular"), (4, 8, 9)),
    (nn.Conv3d(2, 5, 3, padding=1, padding_mode="replicate"), (2, 5, 6, 7)),
    (nn.Conv3d(4, 6, (1, 2, 3), stride=2, groups=2), (4, 5, 6, 7)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS, ids=str)
def test_convolution_equals_dense(conv: nn.Module, shape: tuple[int, ...]) -> None:
    model, reference = lora(nn.Sequential(copy.deepcopy(conv).double()), target_modules="all-layers")
    assert_same(model, reference, torch.randn(2, *shape))
    assert_same(merge(model), reference, torch.randn(2, *shape))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    method=st.sampled_from([LoRA, DoRA]),
)
def test_any_convolution_merges(
    groups: int, per_group: tuple[int, int], kernel: tuple[int, int], stride: int, dilation: int, method: type[LoRA]
) -> None:
    c_in, c_out = (groups * channels for channels in per_group)
    conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, dilation=dilation, groups=groups)
    model = moved(inject(nn.Sequential(conv), method(r=3, clip_rank=True, target_modules="all-layers")))
    x = torch.randn(2, c_in, 7, 8)
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    batch=st.lists(st.integers(0, 3), max_size=3),
    r=st.integers(1, 9),
    bias=st.booleans(),
    method=st.sampled_from([LoRA, DoRA]),
)
def test_any_linear_layer_merges(
    sizes: tuple[int, int], batch: list[int], r: int, bias: bool, method: type[LoRA]
) -> None:
    base = nn.Sequential(nn.Linear(*sizes, bias=bias))
    model = moved(inject(base, method(r=r, clip_rank=True)))
    x = torch.randn(*batch, sizes[0])
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected, rtol=1e-10, atol=1e-10)


def test_embedding_equals_dense() -> None:
    ids = torch.tensor([[0, 3, 1], [4, 4, 2]])
    model, reference = lora(nn.Sequential(nn.Embedding(5, 3, padding_idx=1)), target_modules="all-layers")
    assert_same(model, reference, ids)
    assert_same(merge(model), reference, ids)


def test_padding_of_an_embedding_gets_no_gradient() -> None:
    model = moved(inject(nn.Sequential(nn.Embedding(5, 3, padding_idx=1)), LoRA(r=2, target_modules="all-layers")))
    model(torch.tensor([0, 1, 1, 2])).sum().backward()
    (_, _, adapter), *_ = adapters_of(model)
    assert not adapter.lora_A.grad[:, 1].any()
    assert adapter.lora_A.grad[:, 0].all()


def test_transformers_conv1d_equals_dense() -> None:
    from transformers.pytorch_utils import Conv1D

    model, reference = lora(nn.Sequential(Conv1D(5, 3)))
    assert_same(model, reference, torch.randn(2, 3))
    assert_same(merge(model), reference, torch.randn(2, 3))


def test_bias_free_layer_stays_bias_free() -> None:
    model, reference = lora(nn.Sequential(nn.Linear(3, 5, bias=False)))
    assert_same(merge(model), reference, torch.randn(2, 3))
    assert list(model.state_dict()) == ["0.weight"]


ATTENTIONS = [{}, {"bias": False}, {"kdim": 4, "vdim": 5}, {"add_bias_kv": True}, {"add_zero_attn": True}]


@pytest.mark.parametrize("options", ATTENTIONS, ids=str)
def test_multihead_attention_equals_dense(options: dict[str, Any]) -> None:
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 3, batch_first=True, **options)})
    model, reference = lora(base)
    count = 4 if "kdim" in options else 2
    assert len(adapters_of(model)) == count
    q, k, v = torch.randn(2, 4, 6), torch.randn(2, 7, options.get("kdim", 6)), torch.randn(2, 7, options.get("vdim", 6))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True
    causal = torch.ones(4, 7).tril() == 0
    for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"need_weights": False}):
        assert_same(model["attention"], reference["attention"], q, k, v, **masks)
    assert_same(merge(model)["attention"], reference["attention"], q, k, v)


def test_fused_self_attention_equals_dense() -> None:
    # one tensor for query, key and value takes the fused kernel in evaluation
    model, reference = lora(nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, batch_first=True)}))
    x = torch.randn(2, 5, 6)
    assert_same(model["attention"], reference["attention"], x, x, x)
    assert_same(model["attention"], reference["attention"], x, x, x, need_weights=False)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # with norm_first, says torch
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # the fused path uses them
def test_transformer_encoder_equals_dense(norm_first: bool, nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True, norm_first=norm_first)
    model, reference = lora(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested))
    assert len(adapters_of(model)) == 2 * 4
    x = torch.randn(3, 5, 6)
    assert_same(model, reference, x)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    for training in (True, False):
        with torch.no_grad():
            ours = model.train(training)(x, src_key_padding_mask=padding)
            expected = reference.train(training)(x, src_key_padding_mask=padding)
        torch.testing.assert_close(ours[~padding], expected[~padding], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("part", ["linear1", "linear2", "out_proj", "in_proj_weight"])
def test_no_part_of_an_encoder_layer_is_lost_in_the_fused_path(part: str) -> None:
    base = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True).eval()
    plain = copy.deepcopy(base)
    model, reference = lora(base, target_modules=part)
    x = torch.randn(3, 5, 6)
    assert_same(model, reference, x)
    with torch.no_grad():
        assert not torch.allclose(model(x), plain(x), atol=1e-3)


def test_whole_transformer_equals_dense() -> None:
    base = nn.Transformer(6, 2, 1, 1, 10, dropout=0.0, batch_first=True)
    model, reference = lora(base)
    assert_same(model, reference, torch.randn(2, 5, 6), torch.randn(2, 4, 6))


class ReadingAttention(nn.Module):
    """As written in many code bases: the fused weight is used without a call of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18, bias=False)
        self.proj = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


def test_attention_that_reads_a_weight_equals_dense() -> None:
    model, reference = lora(nn.Sequential(ReadingAttention()))
    assert_same(model, reference, torch.randn(2, 5, 6))


@pytest.mark.parametrize("name", ["SwinTransformerV2Block", "EvaAttention", "BeitAttention"])
def test_timm_attention_that_reads_its_weight_equals_dense(name: str) -> None:
    if name == "SwinTransformerV2Block":
        from timm.models.swin_transformer_v2 import SwinTransformerV2Block

        base, x = SwinTransformerV2Block(6, (4, 4), 2, window_size=2), torch.randn(2, 4, 4, 6)
    elif name == "EvaAttention":
        from timm.models.eva import EvaAttention

        base, x = EvaAttention(6, 2, scale_norm=False), torch.randn(2, 5, 6)
    else:
        from timm.models.beit import Attention

        base, x = Attention(6, 2, qkv_bias=True), torch.randn(2, 5, 6)
    plain = copy.deepcopy(base)
    model, reference = lora(nn.Sequential(base), target_modules="qkv")
    assert_same(model, reference, x)
    assert not torch.allclose(model(x), plain(x), atol=1e-3)


def test_timm_fused_qkv_equals_dense() -> None:
    from timm.layers import Attention

    model, reference = lora(nn.Sequential(Attention(6, 2)))
    assert_same(model, reference, torch.randn(2, 5, 6))


def test_standardised_convolution_equals_dense() -> None:
    from timm.layers import ScaledStdConv2d, StdConv2d

    base = nn.Sequential(StdConv2d(3, 5, 3), ScaledStdConv2d(5, 4, 3))
    model, reference = lora(base, target_modules="all-layers")
    # batch normalisation inside standardises the weight in training and in evaluation alike
    assert_same(model, reference, torch.randn(2, 3, 7, 9))


def test_keyword_input_reaches_the_adapter() -> None:
    model, reference = lora(nn.Sequential(nn.Linear(3, 5)))
    x = torch.randn(2, 3)
    torch.testing.assert_close(model[0](input=x), reference[0](input=x))


def test_hooks_of_the_user_survive() -> None:
    base = nn.Sequential(nn.Linear(3, 5))
    calls: list[str] = []
    base[0].register_forward_pre_hook(lambda module, args: calls.append("before"))
    base[0].register_forward_hook(lambda module, args, y: 2 * y)
    x, plain = torch.randn(2, 3), copy.deepcopy(base)
    model, reference = lora(base)
    ours = model(x)
    assert calls == ["before"]
    torch.testing.assert_close(ours, reference(x))
    torch.testing.assert_close(unload(model)(x), plain(x))


def test_patched_forward_of_an_instance_survives() -> None:
    base = nn.Sequential(nn.Linear(3, 5))
    own = base[0].forward
    base[0].forward = patched = lambda x: own(x) + 1
    x = torch.randn(2, 3)
    y = base(x)
    assert torch.equal(inject(base, LoRA(r=2))(x), y)
    delta = moved(base)(x) - y
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(merge(base)(x), y + delta)
    assert torch.equal(unload(base)(x), y)
    assert base[0].forward is patched


def test_module_used_twice_holds_one_adapter() -> None:
    shared = nn.Linear(4, 4)
    model, reference = lora(nn.Sequential(shared, nn.Tanh(), shared))
    assert len(adapters_of(model)) == 1
    reference[2] = reference[0]
    assert_same(model, reference, torch.randn(2, 4))
    assert_same(merge(model), reference, torch.randn(2, 4))


def test_adapter_sees_what_lies_below_it() -> None:
    model = inject(nn.Sequential(nn.Linear(3, 5)), LoRA(r=2))
    model = moved(inject(model, DoRA(r=2), name="second"))
    x = torch.randn(2, 3)
    both = model(x)
    set_active(model, "default")
    assert not torch.allclose(model(x), both)
    set_active(model, ["default", "second"])
    torch.testing.assert_close(merge(model)(x), both)


@pytest.mark.parametrize("transfer", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_module_that_is_read_keep_working(transfer: Any) -> None:
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, batch_first=True)})
    model, reference = lora(base)
    x = torch.randn(2, 5, 6)
    copied = transfer(model)
    assert_same(copied["attention"], reference["attention"], x, x, x)
    assert_unchanged(copied, snapshot(model))


def test_error_inside_a_forward_leaves_no_effective_weight_behind() -> None:
    model = moved(inject(nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2)}), LoRA(r=2)))
    with pytest.raises(AssertionError):
        model["attention"](torch.randn(1, 2, 5), torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert getattr(module, name) is parameter


class LooksFirst(ReadingAttention):
    """Looks at the weight without a graph before it computes with it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = self.qkv.weight.norm()
        return super().forward(x) / norm


def test_a_look_without_a_graph_takes_no_gradient_away() -> None:
    model, reference = lora(nn.Sequential(LooksFirst()), target_modules="qkv")
    x = torch.randn(2, 5, 6)
    assert_same(model, reference, x)
    model(x).square().sum().backward()
    reference(x).square().sum().backward()
    (_, _, adapter), *_ = adapters_of(model)
    torch.testing.assert_close(adapter.lora_A.grad, 3.0 * adapter.lora_B.T @ reference[0].qkv.weight.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_survive_activation_checkpointing(reentrant: bool) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True)
    model, _ = lora(nn.Sequential(layer))
    x = torch.randn(2, 5, 6, requires_grad=True)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    checkpoint(model[0], x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected)


def test_gradients_are_those_of_the_formula() -> None:
    # y = W x + s B A x, so with G = dL/dW: grad_A = s B^T G, grad_B = s G A^T
    base = nn.Sequential(nn.Linear(5, 7))
    model = moved(inject(base, LoRA(r=3, alpha=6.0)))
    x, weight = torch.randn(11, 5), torch.randn(11, 7)
    (model(x) * weight).sum().backward()
    dense = nn.Linear(5, 7)
    (dense(x) * weight).sum().backward()
    (_, _, adapter), *_ = adapters_of(model)
    torch.testing.assert_close(adapter.lora_A.grad, 2.0 * adapter.lora_B.T @ dense.weight.grad)
    torch.testing.assert_close(adapter.lora_B.grad, 2.0 * dense.weight.grad @ adapter.lora_A.T)


def test_gradients_through_a_weight_that_is_read_are_those_of_the_formula() -> None:
    model, reference = lora(nn.Sequential(ReadingAttention()), target_modules="qkv")
    x = torch.randn(2, 5, 6)
    model(x).square().sum().backward()
    reference(x).square().sum().backward()
    (_, _, adapter), *_ = adapters_of(model)
    gradient = reference[0].qkv.weight.grad
    torch.testing.assert_close(adapter.lora_A.grad, 3.0 * adapter.lora_B.T @ gradient)
    torch.testing.assert_close(adapter.lora_B.grad, 3.0 * gradient @ adapter.lora_A.T)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_scaling_follows_the_rank(use_rslora: bool, scaling: float) -> None:
    model = inject(nn.Sequential(nn.Linear(5, 7)), LoRA(r=4, alpha=8.0, use_rslora=use_rslora))
    (_, _, adapter), *_ = adapters_of(model)
    nn.init.ones_(adapter.lora_B)
    x = torch.randn(2, 5)
    expected = F.linear(x, model[0].weight, model[0].bias) + scaling * (x @ adapter.lora_A.T).sum(-1, keepdim=True)
    torch.testing.assert_close(model(x), expected)


def test_norm_of_dora_has_no_gradient() -> None:
    model = moved(inject(nn.Sequential(nn.Linear(5, 7)), DoRA(r=2, alpha=4.0)))
    (_, layer, adapter), *_ = adapters_of(model)
    x, weight = torch.randn(11, 5), torch.randn(11, 7)
    (model(x) * weight).sum().backward()
    a, b, m = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B, adapter.magnitude))
    moved_weight = layer.weight.detach() + 2.0 * b @ a
    norm = moved_weight.norm(dim=1, keepdim=True).detach()
    y = x @ (m[:, None] / norm * moved_weight).T + layer.bias.detach()
    torch.testing.assert_close(model(x), y)
    (y * weight).sum().backward()
    for ours, reference in ((adapter.lora_A, a), (adapter.lora_B, b), (adapter.magnitude, m)):
        torch.testing.assert_close(ours.grad, reference.grad)


def test_adapters_are_bare_parameters() -> None:
    # precision plugins replace every nn.Linear after injection
    model = inject(nn.Sequential(nn.Linear(5, 7)), LoRA(r=2))
    (_, _, adapter), *_ = adapters_of(model)
    assert isinstance(adapter, Adapter)
    assert not list(adapter.children())


def test_training_mode_reaches_the_dropout_of_an_adapter() -> None:
    model = moved(inject(nn.Sequential(nn.Linear(50, 7)), LoRA(r=2, dropout=0.5)))
    x = torch.randn(2, 50)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


class Shares(nn.Module):
    """A module and a parameter under two names each, a missing module, and buffers of which one is never saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.block = nn.ModuleDict({"again": self.one, "norm": nn.BatchNorm1d(4)})
        self.head, self.none = nn.Linear(4, 5), None
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("counted", self.block["norm"].running_mean)


@pytest.mark.parametrize("build", [Shares, lambda: nn.Linear(4, 4), lambda: nn.MultiheadAttention(4, 2)])
def test_what_is_of_the_base_is_what_was_there_before(build: Any) -> None:
    model = build()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    for name in ("first", "second"):
        inject(model, LoRA(r=1), name)
    for found, before in (
        (dict(base_modules(model)), modules),
        (base_parameters(model), parameters),
        (base_buffers(model), buffers),
    ):
        assert list(found) == list(before)  # type: ignore[call-overload]
        assert all(one is other for one, other in zip(found.values(), before.values(), strict=True))
