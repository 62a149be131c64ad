"""The layers of libraries that quantise, where these are installed; others test with layers made like theirs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    IA3,
    PEFT,
    DoRA,
    LoHa,
    LoRA,
    PiSSA,
    VeRA,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from lightning_peft.engine import Layer, Method, adapters_of
from lightning_peft.engine.state import fingerprint
from lightning_peft.engine.targets import candidates
from tests.methods.backbones import moved

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about other hardware than this


class Net(nn.Module):
    """Widths that blocks of 64 weights divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(128, 192), nn.LayerNorm(192)
        self.down, self.head = nn.Linear(192, 64, bias=False), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.down(self.norm(torch.tanh(self.up(x))))))


Quantise = Callable[[Any], Any]
Read = Callable[[Any], Tensor]


def each(make: Callable[[nn.Linear], nn.Module]) -> Quantise:
    def change(model: Any) -> Any:
        for name in ("up", "down"):
            setattr(model, name, make(getattr(model, name)).train(model.training))
        return model

    return change


def bitsandbytes_4(quant_type: str) -> tuple[Quantise, Read, float]:
    bnb = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        made = bnb.nn.Linear4bit(*sizes, bias=bias, quant_type=quant_type, compute_dtype=torch.float32)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    return each(make), lambda m: bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state), 0.02


def bitsandbytes_8() -> tuple[Quantise, Read, float]:
    bnb = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        made = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    def read(layer: Any) -> Tensor:
        scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return layer.weight.data.float() * scale[:, None] / 127

    return each(make), read, 0.05  # it rounds its input to 8 bits, too


def torchao(config: str) -> tuple[Quantise, Read, float]:
    quantization = pytest.importorskip("torchao.quantization")

    def change(model: Any) -> Any:
        quantization.quantize_(model, getattr(quantization, config)(), filter_fn=lambda _, name: name in ("up", "down"))
        return model

    return change, lambda layer: layer.weight.dequantize(), 1e-5


def hqq() -> tuple[Quantise, Read, float]:
    module = pytest.importorskip("hqq.core.quantize")

    def make(layer: nn.Linear) -> nn.Module:
        config = module.BaseQuantizeConfig(nbits=4, group_size=64)
        return module.HQQLinear(copy.deepcopy(layer), config, compute_dtype=torch.float32, device="cpu")

    return each(make), lambda layer: layer.dequantize(), 1e-5


def quanto(name: str) -> tuple[Quantise, Read, float]:
    module = pytest.importorskip("optimum.quanto")

    def change(model: Any) -> Any:
        module.quantize(model, weights=getattr(module, name), exclude=["head", "norm"])
        module.freeze(model)
        return model

    return change, lambda layer: layer.weight.dequantize(), 1e-5


LIBRARIES: dict[str, Callable[[], tuple[Quantise, Read, float]]] = {
    "bitsandbytes nf4": lambda: bitsandbytes_4("nf4"),
    "bitsandbytes fp4": lambda: bitsandbytes_4("fp4"),
    "bitsandbytes int8": bitsandbytes_8,
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao fp8": lambda: torchao("Float8WeightOnlyConfig"),
    "torchao intx": lambda: torchao("IntxWeightOnlyConfig"),
    "hqq": hqq,
    "quanto int8": lambda: quanto("qint8"),
    "quanto int4": lambda: quanto("qint4"),
}
METHODS = [
    LoRA(r=2),
    LoHa(r=2),
    VeRA(r=2),
    IA3(target_modules=("up", "down"), feedforward_modules="down"),
    DoRA(r=2),
    PiSSA(r=2),
]


@pytest.fixture(params=LIBRARIES)
def library(request: Any) -> tuple[Callable[[], Any], Read, float]:
    change, read, atol = LIBRARIES[request.param]()

    def base() -> Any:
        torch.manual_seed(0)
        return change(Net().eval())

    return base, read, atol


def test_what_is_read_through_a_layer_is_what_its_library_says(library: Any) -> None:
    base, read, _ = library
    model = base()
    targets = [t for t in candidates(model) if t.name in ("up", "down")]
    assert [tuple(t.shape) for t in targets] == [(192, 128), (64, 192)]
    for target in targets:
        torch.testing.assert_close(Layer(target.module, target.site).weight, read(target.module), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_quantised_base_is_adapted_from_injection_to_unloading(library: Any, method: Method, tmp_path: Path) -> None:
    base, _, atol = library
    x = torch.randn(9, 128)
    model = inject(base().train(), method)
    assert {path for path, _, _ in adapters_of(model)} == {"up", "down"}
    first = fingerprint(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    moved(model).eval()
    with torch.no_grad():
        y, y_base = model(x), base()(x)
        assert not torch.allclose(y, y_base, atol=1e-3)
        loaded = load_adapter(base(), save_adapter(model, tmp_path)).eval()
        assert torch.equal(loaded(x), y)
        assert fingerprint(model) == first
        layers = [model.up, model.down]
        merge(model, dequantize=True)
        assert [type(m) for m in (model.up, model.down)] == [nn.Linear, nn.Linear]
        torch.testing.assert_close(model(x), y, rtol=0, atol=atol)
        unmerge(model)
        assert [model.up, model.down] == layers
        assert torch.equal(model(x), y)
        assert torch.equal(unload(model)(x), y_base)
    loaded.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in loaded.parameters() if p.requires_grad)


def test_gradients_are_those_of_a_base_that_was_never_evaluated(library: Any) -> None:
    base, _, _ = library
    x, found = torch.randn(9, 128), []
    for evaluated in (False, True):
        model = moved(inject(base().train(), LoRA(r=2)))
        if evaluated:
            with torch.no_grad():
                model.eval()(x)
        torch.manual_seed(1)
        with torch.no_grad():
            for _, _, adapter in adapters_of(model):
                adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape))
                adapter.lora_A.copy_(torch.randn(adapter.lora_A.shape) / 10)
        model.train()(x).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        # bitsandbytes keeps its scales in bfloat16 once it has been evaluated on some CPUs
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02 * float(one.abs().max()))


def test_a_run_of_lightning_goes_on_and_keeps_the_adapters_alone(library: Any, tmp_path: Path) -> None:
    base, _, _ = library
    data = [(x, x[:5].sign()) for x in torch.randn(16, 128)]

    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = base().train()

        def training_step(self, batch: Any) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def fit(steps: int, resume: str | None = None) -> Lit:
        saving = ModelCheckpoint(tmp_path, filename=f"{steps}", save_on_train_epoch_end=True)
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(max_epochs=steps, callbacks=[PEFT(LoRA(r=2), summary=False), saving], **options)
        lit = Lit()
        trainer.fit(lit, DataLoader(data, batch_size=8), ckpt_path=resume)
        return lit

    fit(1)
    kept = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    assert all(".adapters." in key for key in kept)
    assert len(kept) == 4
    whole, resumed = fit(2), fit(2, str(tmp_path / "1.ckpt"))
    for (_, _, a), (_, _, b) in zip(adapters_of(whole), adapters_of(resumed), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
