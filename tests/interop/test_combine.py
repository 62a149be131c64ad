"""Weighted sums of adapters: held to sums of dense changes in float64, and to HF PEFT's own ways to combine."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import (
    IA3,
    AdapterError,
    BitFit,
    DoRA,
    FullFineTuning,
    LoRA,
    PiSSA,
    combine,
    disabled,
    inject,
    load_adapter,
    merge,
    routed,
    save_adapter,
    set_active,
    set_trainable,
    unload,
)
from lightning_peft.engine import Method, adapters_of
from lightning_peft.engine.record import record_of
from tests.methods.backbones import assert_unchanged, snapshot

# HF PEFT asks transformers by a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Net(nn.Module):
    """Every kind of layer that LoRA adapts: one with groups, one whose weight is read, and two of one last name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.q_proj = nn.Linear(8, 5)
        self.block = nn.ModuleDict({"q_proj": nn.Linear(5, 4)})
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.embed(ids).mT).mT.tanh()
        h = self.attn(h, h, h, need_weights=False)[0]
        return self.head(self.block["q_proj"](self.q_proj(h).tanh()))


def net() -> Net:
    torch.manual_seed(1)
    return Net().double().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(2))


def adapted(base: nn.Module, **methods: Method) -> Any:
    """``base`` with an adapter of each name, off its initial point; they act one at a time."""
    for seed, (name, method) in enumerate(methods.items()):
        if seed:
            set_active(base, ())
        inject(base, method, name)
        set_trainable(base, name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in base.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter.add_(0.3 * noise)
    return base.double()


def changes(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Parameter name -> what adapter ``name`` adds to it, in the layout in which it is stored."""
    record, parameters = record_of(model), dict(model.named_parameters())
    with disabled(model):
        found = {key: (value - parameters[key]).detach() for key, value in record.injections[name].in_place.items()}
    for path, _, adapter in adapters_of(model, name):
        delta = adapter.delta().detach()  # type: ignore[operator]
        found[f"{path}.{adapter.site.weight}"] = delta.T if adapter.site.transposed else delta
    return found


def summed(base: nn.Module, terms: list[tuple[float, Mapping[str, Tensor]]]) -> nn.Module:
    """The reference: a plain model with the weighted changes added to its weights."""
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for weight, change in terms:
            for key, delta in change.items():
                parameters[key].add_(weight * delta)
    return base


# float64 leaves the order of sums
close = {"rtol": 1e-11, "atol": 1e-12}
# ours are in double precision, those of HF PEFT and of files in single
single = {"rtol": 1e-4, "atol": 1e-5}

EVERYWHERE = ("embed", "conv", "attn", "q_proj")
CASES: dict[str, dict[str, Method]] = {
    "plain": {"a": LoRA(r=2, alpha=3), "b": LoRA(r=1, alpha=9, use_rslora=True)},
    "everywhere": {"a": LoRA(r=1, target_modules=EVERYWHERE), "b": LoRA(r=2, alpha=5, target_modules=EVERYWHERE)},
    "on other layers": {"a": LoRA(r=2, target_modules="^q_proj"), "b": LoRA(r=3, target_modules=("conv", "q_proj"))},
    "on one of a last name": {
        "a": LoRA(r=2, target_modules="block.q_proj"),
        "b": LoRA(r=1, target_modules="block.q_proj"),
    },
    "another start": {"a": PiSSA(r=1, target_modules="q_proj"), "b": LoRA(r=2, target_modules="q_proj")},
    "one head": {
        "a": LoRA(r=2, target_modules="q_proj", modules_to_save="head"),
        "b": LoRA(r=1, target_modules="q_proj"),
    },
    "heads": {
        "a": LoRA(r=2, target_modules="q_proj", modules_to_save="head"),
        "b": LoRA(r=1, target_modules="conv", modules_to_save="head"),
    },
}
each_case = pytest.mark.parametrize("case", CASES)


@each_case
@torch.no_grad()
def test_the_sum_of_the_changes_is_exact(case: str, ids: Tensor) -> None:
    model = adapted(net(), **CASES[case])
    expected = summed(net(), [(0.7, changes(model, "a")), (-1.3, changes(model, "b"))])(ids)
    assert combine(model, {"a": 0.7, "b": -1.3}, "mixed") < 1e-12
    set_active(model, "mixed")
    torch.testing.assert_close(model(ids), expected, **close)
    with disabled(model):
        assert not torch.allclose(model(ids), expected, atol=1e-3)
    torch.testing.assert_close(merge(model)(ids), expected, **close)


@each_case
@torch.no_grad()
def test_nothing_else_is_changed(case: str, ids: Tensor) -> None:
    model = adapted(net(), **CASES[case])
    before, flags = model(ids), {n: p.requires_grad for n, p in model.named_parameters()}
    of_each = {name: changes(model, name) for name in "ab"}
    combine(model, {"a": 2, "b": 1}, "mixed")
    assert torch.equal(model(ids), before)  # what acts still acts, and alone
    now = {n: p.requires_grad for n, p in model.named_parameters()}
    assert now == {n: flags.get(n, False) for n in now}
    for name, expected in of_each.items():
        for key, value in changes(model, name).items():
            torch.testing.assert_close(value, expected[key], **close)
    unload(model)
    assert_unchanged(model, snapshot(net()))


def test_ranks_add_up_to_what_a_layer_can_use() -> None:
    model = adapted(net(), a=LoRA(r=3), b=LoRA(r=1, target_modules="^q_proj"), c=LoRA(r=2, alpha=1))
    combine(model, {"a": 1, "b": 1, "c": 1}, "mixed")
    ranks = {path: len(adapter.lora_A) for path, _, adapter in adapters_of(model, "mixed")}
    assert ranks == {"attn": 5, "attn.out_proj": 5, "q_proj": 5, "block.q_proj": 4}  # 3 + 1 + 2 in q_proj (5 x 8)
    terms = [model.attn.out_proj.adapters[name].lora_A for name in "ac"]
    assert torch.equal(model.attn.out_proj.adapters["mixed"].lora_A, torch.cat(terms))  # bit for bit


@torch.no_grad()
def test_a_smaller_rank_is_the_nearest_and_says_how_far() -> None:
    model = adapted(net(), a=LoRA(r=3, target_modules=EVERYWHERE), b=LoRA(r=2, alpha=7, target_modules=EVERYWHERE))
    a, b = changes(model, "a"), changes(model, "b")
    error = combine(model, {"a": 1.5, "b": -0.5}, "mixed", r=2)
    found, errors = changes(model, "mixed"), []
    for key in a:
        exact = (1.5 * a[key] - 0.5 * b[key]).flatten(1)
        values = torch.linalg.svdvals(exact)
        errors.append(float(values[2:].norm() / values.norm()))
        distance = (found[key].flatten(1) - exact).norm() / exact.norm()
        torch.testing.assert_close(float(distance), errors[-1], **close)  # Eckart and Young: no other is nearer
    torch.testing.assert_close(error, max(errors), **close)
    assert {len(adapter.lora_A) for _, _, adapter in adapters_of(model, "mixed")} == {2}
    assert combine(model, {"a": 1.5, "b": -0.5}, "whole", r=5) < 1e-12


def test_it_trains_when_it_is_told_to(ids: Tensor) -> None:
    model = adapted(net(), **CASES["heads"])
    combine(model, {"a": 1, "b": 1}, "mixed")
    set_active(model, "mixed")
    set_trainable(model, "mixed")
    model(ids).square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {n for n, _ in model.named_parameters() if ".mixed." in n} | {"head.weight", "head.bias"}


@pytest.mark.filterwarnings("ignore:.* is written in our own format")  # of layers that HF PEFT cannot adapt
@each_case
@torch.no_grad()
def test_it_is_saved_and_loaded_as_any_other(case: str, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(net(), **CASES[case])
    combine(model, {"a": 0.5, "b": 2}, "mixed")
    set_active(model, "mixed")
    folder = save_adapter(model, tmp_path, "mixed")
    torch.testing.assert_close(load_adapter(net(), folder, "again")(ids), model(ids), **close)


def test_names_are_as_short_as_they_select_the_same() -> None:
    model = adapted(net(), **CASES["on other layers"])
    combine(model, {"a": 1, "b": 1}, "mixed")
    method = record_of(model).injections["mixed"].method
    assert method == LoRA(r=3, alpha=None, target_modules=("q_proj", "conv"), rank_pattern={"^q_proj": 5})
    model = adapted(net(), **CASES["on one of a last name"])
    combine(model, {"a": 1, "b": 1}, "mixed")
    assert record_of(model).injections["mixed"].method == LoRA(r=3, alpha=None, target_modules=("block.q_proj",))


class Wrapped(nn.Module):
    """As a LightningModule is."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def training_step(self) -> None: ...

    def forward(self, ids: Tensor) -> Tensor:
        return self.inside(ids)


@pytest.mark.filterwarnings("ignore:.* is written in our own format")
@pytest.mark.parametrize("case", ["everywhere", "on one of a last name", "heads"])
@torch.no_grad()
def test_its_file_fits_the_model_inside_of_another(case: str, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(Wrapped(net()), **CASES[case])
    combine(model, {"a": 1, "b": -1}, "mixed")
    set_active(model, "mixed")
    folder = save_adapter(model, tmp_path, "mixed")
    torch.testing.assert_close(load_adapter(net(), folder)(ids), model(ids), **close)


@torch.no_grad()
def test_another_change_of_weights_is_combined_as_lora(ids: Tensor, tmp_path: Path) -> None:
    model = adapted(net(), a=LoRA(r=1, target_modules="q_proj"), dora=DoRA(r=1, target_modules="block.q_proj"))
    weight = net().block["q_proj"].weight
    dora = model.block["q_proj"].adapters["dora"].merged(weight, None)[0] - weight
    expected = summed(net(), [(2, changes(model, "a")), (-1, {"block.q_proj.weight": dora})])(ids)
    load_adapter(model, save_adapter(model, tmp_path, "dora", as_lora=4), "dora as lora")
    combine(model, {"a": 2, "dora as lora": -1}, "mixed")
    set_active(model, "mixed")
    torch.testing.assert_close(model(ids), expected, **close)


@torch.no_grad()
def test_it_can_be_a_term_again_and_is_routed(ids: Tensor) -> None:
    model = adapted(net(), a=LoRA(r=2, target_modules="q_proj"), b=LoRA(r=1, target_modules="q_proj"))
    combine(model, {"a": 2, "b": -1}, "mixed")
    combine(model, {"mixed": 0.5, "b": 0.5}, "again")
    set_active(model, "a")
    expected = model(ids)
    set_active(model, "again")
    torch.testing.assert_close(model(ids), expected, **close)
    with routed(model, ["again", "none", "b"]):
        torch.testing.assert_close(model(ids)[:1], expected[:1], **close)


class HFNet(nn.Module):
    """What HF PEFT can combine by all of its types."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.fc2, self.head = nn.Linear(9, 7), nn.Linear(7, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.q_proj(x).tanh()))


WEIGHTS = {"one": 0.7, "two": -0.4}


def hf_net() -> nn.Module:
    torch.manual_seed(3)
    return HFNet().eval()


@pytest.fixture
def both(tmp_path: Path) -> tuple[PeftModel, nn.Module]:
    """HF PEFT's model with two adapters, and ours that has loaded them."""
    torch.manual_seed(4)
    names = {"target_modules": ["q_proj", "fc2"], "init_lora_weights": False}
    theirs = get_peft_model(hf_net(), LoraConfig(r=2, lora_alpha=3, **names), "one")
    theirs.add_adapter("two", LoraConfig(r=2, lora_alpha=5, **names))
    theirs.save_pretrained(str(tmp_path))
    ours = hf_net()
    for name in WEIGHTS:
        load_adapter(ours, tmp_path / name, name)
    return theirs.eval(), ours


def combined_by_hf(theirs: PeftModel, x: Tensor, **how: Any) -> Tensor:
    theirs.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "mixed", **how)
    theirs.set_adapter("mixed")
    return theirs(x)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"combination_type": "cat"}, {}),
        ({"combination_type": "svd", "svd_rank": 1}, {"r": 1}),
        ({"combination_type": "svd", "svd_rank": 3}, {"r": 3}),
        ({"combination_type": "ties_svd", "svd_rank": 3, "density": 0.3}, {"r": 3, "ties": 0.3}),
        ({"combination_type": "ties_svd", "svd_rank": 7, "density": 0.6}, {"r": 7, "ties": 0.6}),
    ],
    ids=str,
)
@torch.no_grad()
def test_hf_peft_combines_the_same(both: Any, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    x = torch.randn(5, 9)
    expected = combined_by_hf(both[0], x, **theirs)
    error = combine(both[1], WEIGHTS, "mixed", **ours)
    assert (error > 0.01) is (ours.get("r", 9) < 4)  # the sum has rank 4, and the layers allow 7
    set_active(both[1], "mixed")
    torch.testing.assert_close(both[1](x), expected, **single)


@torch.no_grad()
def test_linear_of_hf_peft_is_not_the_sum_of_the_changes(both: Any) -> None:
    theirs, ours = both
    x = torch.randn(5, 9)
    answered = combined_by_hf(theirs, x, combination_type="linear")

    def weights_of(factors: Callable[[Any, Any], Tensor]) -> Tensor:
        """What the model answers with these changes."""
        plain = hf_net()
        for path, module, a in adapters_of(ours, "one"):
            plain.get_submodule(path).weight.add_(factors(a, module.adapters["two"]))
        return plain(x)

    def of_factors(a: Any, b: Any) -> Tensor:
        roots = [(abs(w) * float(t.scaling)) ** 0.5 for w, t in ((0.7, a), (-0.4, b))]
        # its sign is taken to A alone
        return (roots[0] * a.lora_B + roots[1] * b.lora_B) @ (roots[0] * a.lora_A - roots[1] * b.lora_A)

    exact = weights_of(lambda a, b: 0.7 * a.delta() - 0.4 * b.delta())
    torch.testing.assert_close(answered, weights_of(of_factors), **single)
    assert F.mse_loss(answered, exact) > 0.1 * exact.var()  # far off, for any purpose
    combine(ours, WEIGHTS, "mixed")
    set_active(ours, "mixed")
    torch.testing.assert_close(ours(x), exact, **single)


@torch.no_grad()
def test_hf_peft_reads_what_was_combined(both: Any, tmp_path: Path) -> None:
    _, ours = both
    x = torch.randn(5, 9)
    combine(ours, WEIGHTS, "mixed", r=3)
    set_active(ours, "mixed")
    save_adapter(ours, tmp_path / "mixed", "mixed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(hf_net(), str(tmp_path / "mixed")).eval()
    torch.testing.assert_close(theirs(x), ours(x), **single)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"weights": {}}, "expected adapter names with weights"),
    ({"weights": ["a"]}, "expected adapter names with weights"),
    ({"weights": {"first": 1}}, r"no adapter 'first'.*Did you mean 'frst'"),
    ({"weights": {"frst": float("nan")}}, "the weight of 'frst' must be a finite number"),
    ({"weights": {"frst": "1"}}, "the weight of 'frst' must be a finite number"),
    ({"name": "other"}, r"'other' already.*unload\(model, 'other'\)"),
    ({"name": "a.b"}, "without '.'"),
    ({"r": 0}, "r must be an integer >= 1"),
    ({"ties": 0.0, "r": 2}, "ties must be a number in"),
    ({"ties": 1.1, "r": 2}, "ties must be a number in"),
    ({"ties": 0.5}, "Give r, the rank"),
    ({"weights": {"frst": 1, "dora": 1}}, "'dora' has a .* on 'q_proj', which is no low-rank product"),
    ({"weights": {"frst": 1, "scale": 1}}, "'scale' has a .* which is no low-rank product"),
    ({"weights": {"frst": 1, "bias": 1}}, "'q_proj' is trained in place by one of these, and 'q_proj' has an adapter"),
    ({"weights": {"bias": 1}}, "no low-rank product, as LoRA has"),
]


@pytest.mark.parametrize(("change", "match"), REFUSED, ids=[match[:30] for _, match in REFUSED])
def test_what_cannot_be_combined_is_refused(change: dict[str, Any], match: str, ids: Tensor) -> None:
    q = {"target_modules": "^q_proj"}
    model = adapted(net(), frst=LoRA(r=2, **q), other=LoRA(r=1, modules_to_save="head"), dora=DoRA(r=1, **q),
                    scale=IA3(feedforward_modules=(), **q), bias=BitFit(modules_to_save=()))  # fmt: skip
    set_active(model, ("frst", "other"))
    before, answer, names = snapshot(model), model(ids), list(record_of(model).injections)
    arguments: dict[str, Any] = {"weights": {"frst": 1, "other": 1}, "name": "mixed"} | change
    with pytest.raises(AdapterError, match=match):
        combine(model, **arguments)
    assert_unchanged(model, before)
    assert torch.equal(model(ids), answer)
    assert list(record_of(model).injections) == names
    with (
        routed(set_active(model, "frst") or model, ["frst"]),
        pytest.raises(AdapterError, match="routed: its block has not ended"),
    ):
        combine(model, {"frst": 1}, "mixed")


def test_a_base_that_is_gone_or_merged_is_refused() -> None:
    model = inject(net(), FullFineTuning(), "full")
    with pytest.raises(AdapterError, match="kept no copy"):
        combine(model, {"full": 1}, "mixed")
    with pytest.raises(AdapterError, match="merged into the base"):
        combine(merge(adapted(net(), a=LoRA(r=1))), {"a": 1}, "mixed")
    with pytest.raises(AdapterError, match="has no adapters"):
        combine(net(), {"a": 1}, "mixed")
    model = adapted(net(), a=LoRA(r=1))
    nn.init.constant_(adapters_of(model, "a")[0][2].lora_B, torch.inf)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="holds NaN or infinite values"):
        combine(model, {"a": 1}, "mixed")
