"""QLoRA beside its formula: LoRA on the NF4 rounding of each weight, and what becomes of such a base."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_peft import (
    PEFT,
    AdapterError,
    LoRA,
    PEFTOffloadStrategy,
    QLoRA,
    disabled,
    get_method,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from lightning_peft.engine import METHODS, Method, TargetError, adapters_of
from lightning_peft.engine.state import fingerprint
from lightning_peft.parts.nf4 import NF4Tensor
from lightning_peft.strategies.fsdp import _check
from tests.callbacks.nets import Lit, loader, trainer
from tests.methods.backbones import assert_unchanged, backbone, kept, moved, snapshot, tiny, trainable

# the table that the authors' library ships
TABLE = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
METHOD = QLoRA(r=2, alpha=3.0)


def rounded(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> Tensor:
    """W in NF4, by the definition, in float64; for fewer blocks than share one scale."""
    table, blocks = torch.tensor(TABLE, dtype=torch.float64), weight.detach().double().flatten().split(block_size)
    nearest = [table[(block[:, None] / block.abs().max() - table).abs().argmin(1)] for block in blocks]
    absmax = torch.stack([block.abs().max() for block in blocks])
    if double_quant:
        absmax = (absmax / absmax.max() * 255).round() / 255 * absmax.max()
    return torch.cat([n * a for n, a in zip(nearest, absmax, strict=True)]).view(weight.shape)


def packed_in(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, NF4Tensor)]


def bits_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """What is kept of each packed weight."""
    parameters = dict(model.named_parameters())
    return {n: [part.clone() for part in parameters[n].packed if part is not None] for n in packed_in(model)}


def assert_same_bits(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> None:
    assert one.keys() == other.keys()
    assert one, "something is packed"
    assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("double_quant", [True, False])
def test_output_and_gradients_are_those_of_the_formula(block_size: int, double_quant: bool) -> None:
    layer, x = nn.Linear(37, 23), torch.randn(5, 37, requires_grad=True)
    Q, b = rounded(layer.weight, block_size, double_quant), layer.bias.detach().double()
    method = QLoRA(r=2, alpha=3.0, block_size=block_size, double_quant=double_quant)
    model = moved(inject(nn.Sequential(layer), method))
    adapter = adapters_of(model)[0][2]
    A, B = (t.detach().double().requires_grad_() for t in (adapter.lora_A, adapter.lora_B))
    z = x.detach().double().requires_grad_()
    expected = z @ Q.T + b + 3 / 2 * z @ A.T @ B.T
    y = model(x)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    y.square().sum().backward(), expected.square().sum().backward()
    for found, one in ((x, z), (adapter.lora_A, A), (adapter.lora_B, B)):
        torch.testing.assert_close(found.grad, one.grad.float(), rtol=1e-4, atol=1e-4)


def test_without_the_adapter_the_base_answers_in_four_bits() -> None:
    weight = nn.Linear(37, 23, bias=False).weight
    model = nn.Sequential(nn.Linear(37, 23, bias=False))
    model.load_state_dict({"0.weight": weight})
    moved(inject(model, METHOD))
    x = torch.randn(5, 37)
    expected = (x.double() @ rounded(weight).T).float()
    with disabled(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unload(model)(x), expected, rtol=1e-5, atol=1e-5)
    assert packed_in(model) == ["0.weight"]
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_adds_the_change_to_what_is_kept_and_rounds_once(dtype: torch.dtype) -> None:
    layer = nn.Linear(37, 23).to(dtype)
    Q = rounded(layer.weight)
    model = moved(inject(nn.Sequential(layer), METHOD))
    A, B = adapters_of(model)[0][2].factors()
    bits, parameter = bits_of(model), layer.weight
    merge(model)
    assert type(layer.weight) is nn.Parameter
    assert layer.weight.requires_grad, "a weight that is whole may train, as before"
    rtol = 1e-6 if dtype == torch.float32 else 0.008
    rtol = 1e-6 if dtype == torch.float32 else 0.008
    torch.testing.assert_close(layer.weight, (Q + (B @ A).double()).to(dtype), rtol=rtol, atol=1e-7)
    if dtype == torch.bfloat16:
        assert (layer.weight != (Q.to(dtype) + B @ A).to(dtype)).any(), "rounded once, not twice"
    unmerge(model)
    assert layer.weight is parameter
    assert_same_bits(bits_of(model), bits)


def test_as_in_the_paper() -> None:
    assert (QLoRA().r, QLoRA().alpha, QLoRA().dropout, QLoRA().block_size) == (64, 16, 0, 64)
    model = nn.Sequential(nn.Linear(512, 1024))
    inject(model, QLoRA())
    assert model[0].weight.nbytes * 8 / model[0].weight.numel() == pytest.approx(4.127, abs=5e-4)
    once = inject(nn.Sequential(nn.Linear(512, 1024)), QLoRA(double_quant=False))
    assert once[0].weight.nbytes * 8 / once[0].weight.numel() == 4.5


def test_linear_layers_are_packed_and_nothing_else() -> None:
    model = backbone("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject(model, METHOD)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert packed_in(model) == [name for name in before if name.split(".")[-2] in projections]
    after = dict(model.named_parameters())
    for name, value in before.items():
        assert torch.equal(after[name], value) == (name not in packed_in(model)), name
    whole = inject(backbone("llama"), QLoRA(r=2, modules_to_save=r"model\.layers\.1\.mlp"))
    assert [name for name in packed_in(whole) if "layers.1.mlp" in name] == []
    with pytest.raises(TargetError, match="adapts conv, linear layers"):
        inject(backbone("llama"), QLoRA(r=2, target_modules="embed_tokens"))


def test_the_output_head_of_a_tied_model_is_not_packed_in_secret() -> None:
    model = backbone("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    before = snapshot(model)
    with pytest.raises(TargetError, match="'lm_head' is tied to 'transformer.wte.weight'.*exclude_modules"):
        inject(model, QLoRA(r=2, target_modules="lm_head"))
    assert_unchanged(model, before)
    inject(model, METHOD)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert type(model.lm_head.weight) is nn.Parameter


def test_no_step_keeps_a_whole_weight() -> None:
    model = inject(nn.Sequential(nn.Linear(37, 23), nn.Tanh(), nn.Linear(23, 29)), METHOD)
    x, saved = torch.randn(5, 37), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    plain = [t for t in saved if not isinstance(t, NF4Tensor)]
    assert len(plain) < len(saved)
    assert all(t.numel() < 23 * 29 for t in plain)


def broken(weight: float | None) -> nn.Module:
    model = tiny()
    if weight is None:
        return model.to("meta")
    nn.init.constant_(model.v_proj.weight, weight)
    return model


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        (broken(torch.nan), METHOD, "'v_proj' has NaN or infinite values"),
        (broken(torch.inf), METHOD, "'v_proj' has NaN or infinite values"),
        (broken(None), METHOD, "'q_proj' has no values to quantise yet"),
        (kept(tiny(), METHOD), QLoRA(r=2, block_size=32), "'q_proj' is in 4 bits already, with block_size=64"),
        (kept(tiny(), METHOD), QLoRA(r=2, double_quant=False), "already, with block_size=64 and double_quant=True"),
    ],
)
def test_what_cannot_be_packed_is_refused_and_nothing_changes(model: nn.Module, method: Method, message: str) -> None:
    classes = [type(m) for m in model.modules()]
    packed = packed_in(model)
    with pytest.raises(AdapterError, match=message):
        inject(model, method)
    assert [type(m) for m in model.modules()] == classes
    assert packed_in(model) == packed


@pytest.mark.parametrize("block_size", [0, 1, 63, 96, 64.0])
def test_blocks_that_do_not_fit_are_refused(block_size: Any) -> None:
    with pytest.raises(AdapterError, match="QLoRA: block_size must be a power of two"):
        QLoRA(block_size=block_size)


def test_an_adapter_loads_into_the_base_in_full_precision_which_is_packed_alike(tmp_path: Path) -> None:
    model = moved(inject(tiny(), METHOD))
    loaded = load_adapter(tiny(), save_adapter(model, tmp_path))
    assert_same_bits(bits_of(loaded), bits_of(model))
    x = torch.randn(4, 7)
    assert torch.equal(loaded(x), model(x))
    # as plain LoRA it computes the same on the packed base alone, which the file says
    save_adapter(model, tmp_path, as_lora=True)
    with pytest.raises(AdapterError, match="the same model with other weights"):
        load_adapter(tiny(), tmp_path)
    torch.testing.assert_close(load_adapter(kept(tiny(), METHOD), tmp_path)(x), model(x))


def test_a_base_is_the_same_base_whatever_happens_to_it_while_packed(tmp_path: Path) -> None:
    model = inject(tiny(), METHOD)
    first, bits = fingerprint(model), bits_of(model)
    moved(model)
    unmerge(merge(model))
    model = copy.deepcopy(model).bfloat16().float()
    assert fingerprint(model) == first
    assert_same_bits(bits_of(model), bits)
    unload(model)
    assert fingerprint(inject(model, LoRA(r=2))) == first
    assert fingerprint(inject(tiny(), LoRA(r=2))) != first


def test_a_base_that_is_loaded_behind_the_injection_is_packed() -> None:
    model = inject(nn.Sequential(nn.Linear(37, 23)), METHOD)
    base = nn.Sequential(nn.Linear(37, 23))
    missing = model.load_state_dict(base.state_dict(), strict=False).missing_keys
    assert all("adapters" in key for key in missing)
    torch.testing.assert_close(model[0].weight.unpacked(), rounded(base[0].weight).float())


def methods_on_a_packed_base() -> list[Any]:
    found = [(name, example) for name, cls in sorted(METHODS.items()) for example in cls.examples()[:1]]
    return [pytest.param(method, id=name) for name, method in found if not method.calibrated]


@pytest.mark.parametrize("method", methods_on_a_packed_base())
def test_every_method_starts_exactly_on_a_packed_base_or_says_why_not(method: Method) -> None:
    # nothing is taken out of the stored weight, not even by those that start at a part of it
    base, x = kept(tiny(method), METHOD), torch.randn(2, 13, 7)
    model, before = copy.deepcopy(base), snapshot(base)
    trained = {name for name in method.trained_in_place(base) if name in packed_in(base)}
    if trained:
        with pytest.raises(TargetError, match="is kept in few bits, which no gradient can change"):
            inject(model, method)
        assert_unchanged(model, before)
        return
    inject(model, method)
    if method.identity_at_init:
        torch.testing.assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)
    moved(model)
    y = model(x)
    assert not torch.allclose(y, base(x), atol=1e-4)
    assert_same_bits(bits_of(model), bits_of(base))
    if method.mergeable:
        torch.testing.assert_close(merge(model)(x), y, rtol=1e-4, atol=1e-5)
        assert_unchanged(unload(model), before)


def test_a_second_adapter_beside_it_sees_the_packed_base() -> None:
    model, x = inject(tiny(), METHOD), torch.randn(4, 7)
    bits = bits_of(model)
    y = model(x)
    inject(model, get_method("pissa")(r=2), name="second")
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    second = adapters_of(model, "second")[0][2]
    values = torch.linalg.svdvals(rounded(tiny().q_proj.weight))[:2].float()
    torch.testing.assert_close(torch.linalg.svdvals(second.start_B @ second.start_A)[:2], values, rtol=1e-4, atol=1e-4)
    assert_same_bits(bits_of(model), bits)


def test_a_method_that_hosts_it_packs_the_base_too() -> None:
    method = get_method("ist")(method=METHOD, n_layers=1)
    assert method.changes_base
    assert_same_bits(bits_of(inject(backbone("llama"), method)), bits_of(kept(backbone("llama"), METHOD)))


def test_strategies_that_take_weights_apart_refuse_it(tmp_path: Path) -> None:
    module = inject(Lit(), METHOD)
    with pytest.raises(
        AdapterError, match=r"PEFTFSDPStrategy: it cannot send weights in 4 bits.*'net\.q_proj\.weight'"
    ):
        _check(module)
    strategy = PEFTOffloadStrategy(blocks=["net.q_proj", "net.v_proj"])
    with pytest.raises(AdapterError, match="PEFTOffloadStrategy: it cannot send weights in 4 bits"):
        trainer(tmp_path, PEFT(METHOD, summary=False), strategy=strategy).fit(Lit(), loader(), loader())


class Text(L.LightningModule):
    """A tiny Llama that learns to count to five."""

    def __init__(self) -> None:
        super().__init__()
        self.model = backbone("llama").float().train()

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        logits = self.model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.03)


def counting() -> DataLoader:
    first = torch.arange(16)[:, None]
    return DataLoader((first + torch.arange(6)) % 5, batch_size=4)


@pytest.mark.parametrize("save", ["adapter", "full"])
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_llama_learns_and_goes_on_exactly(save: Any, tmp_path: Path) -> None:
    def run(epochs: int, *callbacks: L.Callback, precision: Any = "bf16-true", **resume: Any) -> Text:
        module = Text()
        peft = PEFT(QLoRA(r=4), summary=False, save=save)
        options = {"max_epochs": epochs, "precision": precision, "enable_checkpointing": bool(callbacks)}
        trainer(tmp_path, peft, *callbacks, **options).fit(module, counting(), **resume)
        return module

    through = run(12)
    assert sum(through.losses[-4:]) < 0.92 * sum(through.losses[:4]), "the head is frozen"
    run(5, ModelCheckpoint(tmp_path, save_last=True))
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {type(value) for value in stored["state_dict"].values()} == {Tensor}
    if save == "adapter":
        assert stored["state_dict"].keys() == trainable(through).keys()
    resumed = run(12, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.losses == through.losses[20:]
    assert_same_bits(bits_of(resumed), bits_of(through))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), through.parameters(), strict=True))
