"""Each sample of a batch with an adapter of its own: held against one sample at a time under `set_active`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import (
    IA3,
    AdapterError,
    AdaptFormer,
    BitFit,
    DoRA,
    LoHa,
    LoRA,
    PiSSA,
    disabled,
    inject,
    merge,
    routed,
    set_active,
    unload,
    unmerge,
)
from lightning_peft.adapters.low_rank import LowRank, _by_segments
from lightning_peft.engine import Method, adapters_of
from lightning_peft.engine.slots import Samples
from tests.methods.backbones import backbone, moved

NONE: tuple[str, ...] = ()


class Mixed(nn.Module):
    """An embedding, a convolution with groups, a norm and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.conv = nn.Conv1d(8, 6, 3, groups=2)
        self.norm = nn.LayerNorm(6)
        self.one, self.two = nn.Linear(6, 7), nn.Linear(7, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).mT).mT
        return self.two(torch.tanh(self.one(self.norm(x))))


def adapted(base: nn.Module, **methods: Method) -> nn.Module:
    """``base`` in float64 with an adapter of each name, off its initial point."""
    for seed, (name, method) in enumerate(methods.items()):
        inject(base.double(), method, name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, _, adapter in adapters_of(base, name):
                for parameter in adapter.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter.add_(0.3 * noise)
    return base.double().eval()


def one_by_one(model: nn.Module, names: list[str], x: Tensor) -> Tensor:
    """The reference: sample for sample, under `set_active`."""
    before = [name for name, injection in model.__dict__["_peft"].injections.items() if injection.active]
    answers = []
    for name, sample in zip(names, x, strict=True):
        set_active(model, NONE if name == "none" else name)
        answers.append(model(sample[None]))
    set_active(model, before)
    return torch.cat(answers)


# float64 leaves the order of sums
close = {"rtol": 1e-12, "atol": 1e-12}

EVERYWHERE = ("embed", "conv", "one", "two")
LINEAR = ("one", "two")
CASES: dict[str, dict[str, Method]] = {
    "lora": {"a": LoRA(r=1, alpha=3), "b": LoRA(r=4, alpha=2), "c": LoRA(r=3, alpha=9, target_modules="one")},
    "lora-everywhere": {
        "a": LoRA(r=2, target_modules=EVERYWHERE),
        "b": LoRA(r=4, alpha=2, target_modules=EVERYWHERE),
        "c": LoRA(r=1, target_modules="embed"),
    },
    "dora": {"a": DoRA(r=1), "b": DoRA(r=3, target_modules=EVERYWHERE), "c": DoRA(r=2, target_modules="conv")},
    "pissa": {"a": PiSSA(r=1), "b": PiSSA(r=3), "c": PiSSA(r=2)},
    "of-many-kinds": {
        "a": LoRA(r=2, target_modules=LINEAR),
        "b": IA3(target_modules=LINEAR, feedforward_modules="two"),
        "c": LoHa(r=2, target_modules=("conv", *LINEAR)),
    },
}
NAMES = ["b", "none", "a", "b", "c", "none", "a"]


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return adapted(Mixed(), **CASES[request.param])


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(13, (7, 6), generator=torch.Generator().manual_seed(1))


def test_a_mixed_batch_is_each_sample_alone(model: nn.Module, tokens: Tensor) -> None:
    expected = one_by_one(model, NAMES, tokens)
    with routed(model, NAMES) as same:
        assert same is model
        torch.testing.assert_close(model(tokens), expected, **close)
        with torch.inference_mode():
            torch.testing.assert_close(model(tokens), expected, **close)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), expected, **close)
    assert not torch.allclose(expected[0], one_by_one(model, ["none"] * 7, tokens)[0])


def test_gradients_are_those_of_its_own_samples(model: nn.Module, tokens: Tensor) -> None:
    trained = [p for _, _, adapter in adapters_of(model) for p in adapter.parameters()]
    weights = torch.randn(7, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    losses: list[Callable[[], Tensor]] = [lambda: model(tokens), lambda: one_by_one(model, NAMES, tokens)]
    with routed(model, NAMES):
        ours = torch.autograd.grad((losses[0]() * weights).sum(), trained, allow_unused=True)
    expected = torch.autograd.grad((losses[1]() * weights).sum(), trained, allow_unused=True)
    for one, other in zip(ours, expected, strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_who_has_no_sample_gets_no_gradient(tokens: Tensor) -> None:
    model = adapted(Mixed(), **CASES["lora"])
    with routed(model, ["a", "none", "a", "a", "none", "a", "c"]):
        model(tokens).sum().backward()
    for name, seen in (("a", True), ("b", False), ("c", True)):
        gradients = [p.grad for _, _, adapter in adapters_of(model, name) for p in adapter.parameters()]
        assert any(g is not None and g.any() for g in gradients) is seen


def test_a_pass_that_trains_may_follow_one_for_inference(tokens: Tensor) -> None:
    model = adapted(Mixed(), **CASES["dora"])
    with routed(model, NAMES):
        with torch.inference_mode():
            model(tokens)
        model(tokens).sum().backward()


def test_each_name_counts_for_several_samples_in_a_row(model: nn.Module, tokens: Tensor) -> None:
    long = torch.cat([tokens, tokens.flip(0)])
    expected = one_by_one(model, [name for name in NAMES for _ in range(2)], long)
    with routed(model, NAMES):
        torch.testing.assert_close(model(long), expected, **close)


def test_all_on_the_base_is_the_base(model: nn.Module, tokens: Tensor) -> None:
    with disabled(model):
        expected = model(tokens)
    with routed(model, ["none"]):
        assert torch.equal(model(tokens), expected)


def test_forty_adapters() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 7))
    model = adapted(base, **{f"a{i}": LoRA(r=1 + i % 7, alpha=1 + i) for i in range(40)})
    names = [f"a{i * 7 % 40}" for i in range(40)] + ["none", "a0", "a39"]
    x = torch.randn(43, 3, 11, dtype=torch.float64)
    expected = one_by_one(model, names, x)
    with routed(model, names):
        torch.testing.assert_close(model(x), expected, **close)


def counted_runs(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes with which ``layer`` itself runs from here on."""
    seen, linear = [], F.linear

    def counting(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        if weight is layer.weight:
            seen.append(len(x))
        return linear(x, weight, *others)

    monkeypatch.setattr(F, "linear", counting)
    return seen


def test_products_share_one_run_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever rank and start, and with a dropout of their own."""
    model = adapted(nn.Sequential(nn.Linear(4, 4)), a=LoRA(r=1, dropout=0.5), b=PiSSA(r=2), c=LoRA(r=2), d=IA3(
        target_modules="0", feedforward_modules=()))  # fmt: skip
    x = torch.randn(4, 4, dtype=torch.float64)
    expected = one_by_one(model, ["b", "a", "none", "c"], x)
    seen = counted_runs(model[0], monkeypatch)
    with routed(model, ["b", "a", "none", "c"]):
        torch.testing.assert_close(model(x), expected, **close)
        assert seen == [4]
        model.train()
        answers = torch.stack([model(x) for _ in range(400)])
        assert seen == [4] * 401
    torch.testing.assert_close(answers[:, [0, 2, 3]], expected[[0, 2, 3]].expand(400, 3, 4), **close)
    assert answers[:, 1].std(0).gt(0).all()
    noise = answers[:, 1].std(0) / 400**0.5
    assert ((answers[:, 1].mean(0) - expected[1]).abs() < 5 * noise).all()  # one of millions would be further off
    model.eval()
    expected = one_by_one(model, ["b", "d", "none", "c"], x)
    del seen[:]
    with routed(model, ["b", "d", "none", "c"]):  # a rescaling is no product
        torch.testing.assert_close(model(x), expected, **close)
    assert sorted(seen) == [1] * 4


class Doubled(LowRank):
    def product(self, x: Tensor, layer: Any) -> Tensor:
        return 2 * super().product(x, layer)


def in_single_precision(adapter: Any) -> None:
    adapter.lora_A.data, adapter.lora_B.data = adapter.lora_A.float().data, adapter.lora_B.float().data
    adapter.scaling = adapter.scaling.float()


def doubled(adapter: Any) -> None:
    adapter.__class__ = Doubled


@pytest.mark.parametrize("change", [in_single_precision, doubled])
def test_products_that_cannot_be_stacked(change: Callable[[Any], None]) -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4)), a=LoRA(r=1), b=LoRA(r=2))
    for _, _, adapter in adapters_of(model, "b"):
        change(adapter)
    x = torch.randn(2, 4, dtype=torch.float64)
    expected = one_by_one(model, ["b", "a"], x)
    with routed(model, ["b", "a"]):
        torch.testing.assert_close(model(x), expected, **close)  # each keeps its own
    assert _by_segments([adapter for _, _, adapter in adapters_of(model)], x, torch.tensor([1, 0])) is None


@pytest.mark.parametrize("ranks", [(2, 2), (1, 3)])
def test_products_in_segments_are_the_same(ranks: tuple[int, int]) -> None:
    """What an accelerator runs; here its twin."""
    model = adapted(nn.Sequential(nn.Linear(4, 5)), a=LoRA(r=ranks[0], dropout=0.5), b=LoRA(r=ranks[1], alpha=3))
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    expected = one_by_one(model, ["b", "a", "none", "b"], x) - one_by_one(model, ["none"] * 4, x)
    adapters = [adapter for _, _, adapter in adapters_of(model)]
    change = _by_segments(adapters, x, torch.tensor([1, 0, -1, 1]))
    assert change is not None
    torch.testing.assert_close(change, expected, **close)
    assert _by_segments([adapter.train() for adapter in adapters], x, torch.tensor([1, 0, -1, 1])) is None


def test_an_adapter_that_diverged_harms_nobody_else() -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4)), a=LoRA(r=1), b=LoRA(r=2))
    x = torch.randn(4, 4, dtype=torch.float64)
    expected = one_by_one(model, ["a", "none", "a"], x[:3])
    torch.nn.init.constant_(model[0].adapters["b"].lora_A, torch.nan)
    with routed(model, ["a", "none", "a", "b"]):
        answer = model(x)
    torch.testing.assert_close(answer[:3], expected, **close)
    assert answer[3].isnan().all()


def test_the_answer_has_the_precision_of_the_layer() -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4)), a=LoRA(r=1), b=LoRA(r=2)).float().bfloat16()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    expected = one_by_one(model, ["b", "a"], x)
    with routed(model, ["b", "a"]):
        assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x), expected)


@pytest.fixture
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "max_position_embeddings": 32}
    config = LlamaConfig(vocab_size=31, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
                         eos_token_id=None, initializer_range=0.5, **sizes)  # fmt: skip
    base = LlamaForCausalLM(config)
    base.generation_config.eos_token_id = None
    return adapted(base, de=LoRA(r=2), fr=LoRA(r=3, alpha=9), other=IA3())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generate_is_token_for_token_each_sample_alone(llama: Any, options: dict[str, Any]) -> None:
    names = ["de", "fr", "none", "other", "de"]
    ids = torch.randint(2, 31, (5, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for i, padding in enumerate((0, 2, 1, 3, 4)):
        ids[i, :padding], mask[i, :padding] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False} | options
    alone = []
    for i, name in enumerate(names):
        set_active(llama, NONE if name == "none" else name)
        alone.append(llama.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **options))
    with routed(llama, names):
        together = llama.generate(ids, attention_mask=mask, **options)
    assert torch.equal(together, torch.cat(alone))
    with disabled(llama):
        assert not torch.equal(together, llama.generate(ids, attention_mask=mask, **options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_encoder_and_decoder_generate_each_sample_alone(options: dict[str, Any]) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 20, "d_kv": 4, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
    base = T5ForConditionalGeneration(T5Config(vocab_size=31, decoder_start_token_id=0, eos_token_id=None, **sizes))
    base.generation_config.eos_token_id = None
    with torch.no_grad():  # else it repeats one token, whatever it is given
        for parameter in base.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model: Any = adapted(base, de=LoRA(r=2), fr=LoRA(r=3, alpha=9, target_modules=("q", "wo")), other=PiSSA(r=1))
    names = ["de", "fr", "none", "other", "de"]
    ids, mask = torch.randint(2, 31, (5, 6)), torch.ones(5, 6, dtype=torch.long)
    mask[1, 4:] = mask[3, 2:] = 0
    options = {"max_new_tokens": 8, "do_sample": False} | options
    alone = []
    for i, name in enumerate(names):
        set_active(model, NONE if name == "none" else name)
        alone.append(model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **options))
    with routed(model, names):
        together = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(together, torch.cat(alone))
    with disabled(model):
        assert not torch.equal(together, model.generate(ids, attention_mask=mask, **options))


@torch.no_grad()
def test_images_each_with_an_adapter() -> None:
    """Patches are a convolution, and attention reads one weight of three parts."""
    model = adapted(backbone("vit"), a=LoRA(r=2), b=LoRA(r=3, target_modules=("all-linear", "proj")), c=IA3())
    names = ["b", "none", "a", "c", "b"]
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    expected = one_by_one(model, names, images)
    with routed(model, names):
        torch.testing.assert_close(model(images), expected, **close)
    assert not torch.allclose(expected, one_by_one(model, ["none"] * 5, images))


def test_what_was_before_is_back(tokens: Tensor) -> None:
    model = adapted(Mixed(), **CASES["lora"])
    set_active(model, ("a", "c"))
    before = model(tokens)
    with routed(model, NAMES):
        outer = model(tokens)
        with routed(model, ["none"]):
            assert not torch.equal(model(tokens), outer)
        assert torch.equal(model(tokens), outer)
        with pytest.raises(AdapterError, match="routed: its block has not ended"):
            set_active(model, "a")
        with pytest.raises(RuntimeError, match="by the way"), routed(model, ["a"]):
            raise RuntimeError("by the way")
        assert torch.equal(model(tokens), outer)
    assert torch.equal(model(tokens), before)
    with pytest.raises(RuntimeError, match="by the way"), routed(model, NAMES):
        raise RuntimeError("by the way")
    assert torch.equal(model(tokens), before)
    assert [i.active for i in model.__dict__["_peft"].injections.values()] == [True, False, True]
    set_active(model, "b")  # can be changed again


@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_active(model, "a"),
        lambda model: disabled(model).__enter__(),
        lambda model: inject(model, LoRA(r=2), "new"),
        lambda model: merge(model),
        lambda model: unload(model),
    ],
)
def test_adapters_cannot_be_changed_inside(change: Callable[[nn.Module], Any], tokens: Tensor) -> None:
    model = adapted(Mixed(), **CASES["lora"])
    with routed(model, NAMES):
        outer = model(tokens)
        with pytest.raises(AdapterError, match="routed: its block has not ended"):
            change(model)
        assert torch.equal(model(tokens), outer)


def refused(model: nn.Module, names: Any, match: str) -> None:
    before = [dict(m.__dict__) for m in model.modules()]
    with pytest.raises(AdapterError, match=match), routed(model, names):
        raise RuntimeError("got inside")
    assert [{k: m.__dict__[k] for k in kept} for m, kept in zip(model.modules(), before, strict=True)] == before


def two() -> nn.Module:
    return adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), a=LoRA(r=1), b=LoRA(r=2))


def test_names_have_to_be_known() -> None:
    refused(two(), ["a", "c"], r"no adapter 'c'.*There are: a, b")
    refused(two(), "a", "expected an adapter name for each sample")
    refused(two(), [], "expected an adapter name for each sample")
    refused(two(), ["a", 0], "no adapter 0. There are: a, b")
    refused(two(), ["a", "__base__"], r"'none' stands for the base, got \['a', '__base__'\]")
    refused(two(), [None, "a"], r"'none' stands for the base, got \[None, 'a'\]")
    refused(adapted(nn.Sequential(nn.Linear(4, 4)), none=LoRA(r=1)), ["none"], "stands for the base")
    refused(nn.Linear(3, 3), ["none"], "has no adapters")


def test_a_merged_model_has_nothing_to_choose() -> None:
    model = merge(two())
    refused(model, ["a"], "merged into the base")
    with routed(unmerge(model), ["a", "b"]):
        model(torch.zeros(2, 4, dtype=torch.float64))


def test_what_is_trained_in_place_is_shared() -> None:
    model = two()
    set_active(model, NONE)
    inject(model, BitFit(modules_to_save=()), "bias")
    refused(model, ["a", "bias"], "'bias' trains parameters in place.*cannot be routed")
    refused(model, ["a", "b"], "'bias' trains parameters in place.*is active")
    set_active(model, NONE)
    with routed(model, ["a", "b"]):
        model(torch.zeros(2, 4, dtype=torch.float64))


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.proj.weight, self.proj.bias)


def test_a_weight_that_is_read_cannot_be_routed() -> None:
    attention = adapted(nn.MultiheadAttention(6, 2), a=LoRA(r=1, target_modules="in_proj_weight"))
    refused(attention, ["a"], "read without a call")
    model = adapted(Reads(), a=LoRA(r=1, target_modules="proj"), b=LoRA(r=1, target_modules="called"))
    refused(model, ["b", "a"], "'a' cannot be routed.*'proj'.*read without a call")
    # those that are not asked for do not act, through their weight neither
    x = torch.randn(2, 4, dtype=torch.float64)
    expected = one_by_one(model, ["b", "none"], x)
    with routed(model, ["b", "none"]):
        torch.testing.assert_close(model(x), expected, **close)


def test_what_sits_around_more_than_a_layer_cannot_be_routed() -> None:
    from tests.methods.backbones import TinyBlocks

    model = moved(inject(TinyBlocks(), AdaptFormer(r=2), "a"))
    kinds = {adapter.site.kind for _, _, adapter in adapters_of(model)}
    assert "module" in kinds
    refused(model, ["a"], "sits around .* as a whole")


def test_the_batch_has_to_fit() -> None:
    model = two()
    with routed(model, ["a", "b", "none"]):
        with pytest.raises(AdapterError, match=r"3 adapter names for a batch of 4 at '0'"):
            model(torch.zeros(4, 4, dtype=torch.float64))
        with pytest.raises(AdapterError, match=r"'0' was called with one sample \(4,\)"):
            model(torch.zeros(4, dtype=torch.float64))
        model(torch.zeros(3, 4, dtype=torch.float64))


@torch.no_grad()
def test_a_compiled_model_is_routed_too() -> None:
    model = two()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(3, 4, dtype=torch.float64)
    before = compiled(x)
    with routed(model, ["b", "none", "a"]):
        torch.testing.assert_close(compiled(x), model(x), **close)
        assert not torch.allclose(compiled(x), before)
    assert torch.equal(compiled(x), before)


def test_samples_say_which_adapter_each_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator is told, of two layers with other adapters."""
    model = adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), a=LoRA(r=1), b=LoRA(r=1, target_modules="0"))
    seen = []

    def together(cls: Any, adapters: Any, x: Tensor, layer: Any, samples: Samples) -> None:
        seen.append((adapters, samples.index.tolist(), samples.lengths))

    monkeypatch.setattr(LowRank, "together", classmethod(together))
    a, b = ([adapter for _, _, adapter in adapters_of(model, name)] for name in "ab")
    x = torch.randn(6, 4, dtype=torch.float64)
    with routed(model, ["a", "b"]):
        model(x)
    with routed(model, ["none", "b", "a"]):
        model(x)
    assert seen == [
        ([a[0], b[0]], [0, 0, 0, 1, 1, 1], [3, 3]),
        ([a[1]], [0, 0, 0, -1, -1, -1], [3, 3]),
        ([b[0], a[0]], [-1, -1, 0, 0, 1, 1], [2, 2, 2]),
        ([a[1]], [-1, -1, -1, -1, 0, 0], [2, 4]),
    ]


def test_adapters_that_share_no_way_for_many_run_by_themselves() -> None:
    class Alone(LowRank):
        @classmethod
        def together(cls, *others: Any) -> Any:
            raise RuntimeError("asked for others than its own")

    model = adapted(nn.Sequential(nn.Linear(4, 4)), a=LoRA(r=1), b=LoRA(r=2))
    model[0].adapters["b"].__class__ = Alone
    x = torch.randn(2, 4, dtype=torch.float64)
    expected = one_by_one(model, ["b", "a"], x)
    with routed(model, ["b", "a"]):
        torch.testing.assert_close(model(x), expected, **close)
