"""Every precision that a Trainer has: adapters stay precise, the base does what it does without them."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_peft import PEFT, AdapterError, LoRA, disabled
from lightning_peft.engine import METHODS, Method, adapters_of
from tests.callbacks.nets import Lit, LitConfigured, StopAfterAnEpoch, lit_for, loader, trainer
from tests.methods.backbones import kept

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:.*is supported for historical reasons"),  # 16-true
]

CASES = [
    pytest.param(example, id=f"{name}-{i}")
    for name, cls in sorted(METHODS.items())
    for i, example in enumerate(cls.examples())
]
# precision -> dtype of the base, of adapters and their optimizer state, of the output
PRECISIONS = {
    "bf16-true": (torch.bfloat16, torch.float32, torch.bfloat16),
    "16-true": (torch.float16, torch.float32, torch.float16),
    "64-true": (torch.float64, torch.float64, torch.float64),
    "bf16-mixed": (torch.float32, torch.float32, torch.bfloat16),
}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


class Losses(L.Callback):
    """Keeps the loss of each step, and the same dropout mask for a batch however the run came to it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(outputs["loss"].item())


def state_dtypes(made: L.Trainer) -> set[torch.dtype]:
    tensors = [v for state in made.optimizers[0].state.values() for v in state.values() if isinstance(v, Tensor)]
    return {v.dtype for v in tensors if v.dim()}


@pytest.mark.parametrize(("cls", "where"), [(Lit, "__init__"), (LitConfigured, "configure_model")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_and_their_optimizer_keep_single_precision(
    precision: Any, cls: type[Lit], where: str, tmp_path: Path
) -> None:
    base, adapter, output = PRECISIONS[precision]
    module, losses = cls(where), Losses()
    made = trainer(tmp_path, PEFT(LoRA(r=2), summary=False), losses, precision=precision, max_epochs=6)
    made.fit(module, loader(), loader())
    assert {p.dtype for _, _, a in adapters_of(module) for p in a.parameters()} == {adapter}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {base}
    assert state_dtypes(made) == {adapter}
    assert made.predict(module, loader())[0].dtype == output
    assert sum(losses.seen[-6:]) < 0.8 * sum(losses.seen[:6])
    with disabled(module):
        assert made.predict(module, loader())[0].dtype == output


@pytest.mark.parametrize("method", CASES)
def test_every_method_trains_in_bfloat16_and_resumes_exactly(method: Method, tmp_path: Path) -> None:
    cls = lit_for(method)

    def run(*callbacks: L.Callback, **resume: Any) -> tuple[Lit, list[float]]:
        torch.manual_seed(0)
        module, losses = cls(), Losses()
        options = {"max_epochs": 3, "precision": "bf16-true", "enable_checkpointing": bool(callbacks)}
        made = trainer(tmp_path, PEFT(method, summary=False), losses, *callbacks, **options)
        made.fit(module, loader(), loader(), **resume)
        return module, losses.seen

    through, seen = run()
    start = cls().bfloat16().state_dict()
    assert any(key not in start or not torch.equal(start[key], v) for key, v in through.state_dict().items())
    assert all(value.isfinite().all() for value in (*through.parameters(), torch.tensor(seen)))
    assert {p.dtype for _, _, a in adapters_of(through) for p in a.parameters()} <= {torch.float32}
    run(ModelCheckpoint(tmp_path, save_last=True), StopAfterAnEpoch())
    resumed, rest = run(ckpt_path=tmp_path / "last.ckpt")
    assert rest == seen[len(loader()) :]
    for key, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_small_steps_are_not_lost_beside_a_base_in_bfloat16(tmp_path: Path) -> None:
    # a step of less than 1e-3 from 1 is rounded away in bfloat16, whose numbers around 1 are 2 ** -8 apart
    class Small(Lit):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-5)

        def on_train_start(self) -> None:
            for _, _, adapter in adapters_of(self):
                nn.init.ones_(adapter.lora_A), nn.init.ones_(adapter.lora_B)

    module, one = Small(), {"precision": "bf16-true", "max_steps": 1}
    trainer(tmp_path, PEFT(LoRA(r=2), summary=False), **one).fit(module, loader(), loader())
    for name, _, adapter in adapters_of(module):
        for factor in (adapter.lora_A, adapter.lora_B):
            assert 0 < (factor - 1).abs().max() < 2**-9, name


@pytest.mark.parametrize(
    "method", ["bitfit", "fullfinetuning", "linearprobe", LoRA(r=2, modules_to_save="head")], ids=str
)
def test_training_the_base_in_float16_is_refused(method: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"parameters of the base are to be trained in float16 \('net\..*bf16-true"):
        trainer(tmp_path, PEFT(method, summary=False), precision="16-true").fit(Lit(), loader(), loader())


def scaled(device: str) -> dict[str, Any]:
    # the scale overflows at first: steps are left out, and it is lowered
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24)
    return {"accelerator": device, "devices": 1, "plugins": MixedPrecision("16-mixed", device, scaler)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", CASES)
def test_every_method_trains_with_a_gradient_scaler(method: Method, device: str, tmp_path: Path) -> None:
    cls = lit_for(method)
    module, losses = cls(), Losses()
    options = {**scaled(device), "gradient_clip_val": 1.0, "max_epochs": 3}
    made = trainer(tmp_path, PEFT(method, summary=False), losses, **options)
    start = {name: p.clone() for name, p in kept(cls(), method).named_parameters()}
    made.fit(module, loader(), loader())
    assert made.scaler is not None
    assert 1 < made.scaler.get_scale() < 2**24
    assert state_dtypes(made) == {torch.float32}
    assert {group["lr"] for group in made.optimizers[0].param_groups} == {0.02}, "rates are as configured"
    assert all(p.isfinite().all() for p in module.parameters())
    for name, parameter in start.items():
        if not module.get_parameter(name).requires_grad:
            assert torch.equal(parameter, module.get_parameter(name).cpu()), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_base_in_float16_with_a_gradient_scaler_trains_adapters_alone(device: str, tmp_path: Path) -> None:
    module = Lit().half()
    trainer(tmp_path, PEFT(LoRA(r=2), summary=False), **scaled(device)).fit(module, loader(), loader())
    assert all(adapter.lora_B.any() and adapter.lora_B.isfinite().all() for _, _, adapter in adapters_of(module))
    with pytest.raises(AdapterError, match="to be trained in float16"):
        trainer(tmp_path, PEFT("bitfit", summary=False), **scaled(device)).fit(Lit().half(), loader(), loader())
