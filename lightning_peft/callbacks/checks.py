"""What would go wrong without a sign of it, found before it does."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_peft.engine import AdapterError, Method, adapters_of
from lightning_peft.engine.errors import joined
from lightning_peft.engine.record import has_record
from lightning_peft.engine.slots import base_parameters
from lightning_peft.interop.files import adapted_root


def check_trainer(trainer: Any, module: nn.Module) -> None:
    """Refuse what would leave the user's module without adapters, with no other sign of it."""
    if not isinstance(trainer, Trainer):
        package = type(trainer).__module__.partition(".")[0]
        raise AdapterError(
            f"PEFT: this callback belongs to the package lightning, the Trainer to {package}, which has classes of its "
            "own. Import both from one: import lightning as L."
        )
    start = getattr(trainer.strategy.launcher, "_start_method", None)
    if start is not None and not has_record(adapted_root(module)):
        raise AdapterError(
            f"PEFT: the strategy starts its processes by {start}, and what is injected there does not come back. "
            "Inject before fit: inject(module, method), with the method that PEFT is given; or use strategy='ddp'."
        )


def check_callbacks(trainer: Any, peft: L.Callback) -> None:
    """Refuse callbacks that do not go together with this one, or not in this order."""
    for callback in trainer.callbacks:
        if isinstance(callback, BaseFinetuning):
            raise AdapterError(
                f"{type(callback).__name__} unfreezes the base that PEFT keeps frozen. Take one of them out of the "
                "callbacks; parts of the base that are to be trained whole are named in modules_to_save."
            )
    before = trainer.callbacks[: trainer.callbacks.index(peft)]
    averaging = [c for c in before if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
    if averaging:
        name = type(averaging[0]).__name__
        raise AdapterError(
            f"{name} comes before PEFT, so it would average a model without adapters. Put PEFT first: "
            f"callbacks=[PEFT(...), {name}(...)]."
        )


def check_switching(trainer: L.Trainer, methods: dict[str, Method]) -> None:
    """What begins to train after it was wrapped would not be averaged over devices, with no sign of it."""
    switching = [type(method).__name__ for method in methods.values() if method.switches]
    if switching and isinstance(trainer.strategy.model, DistributedDataParallel):
        raise AdapterError(
            f"{switching[0]} changes what trains while training, which DistributedDataParallel does not follow. Use "
            "Trainer(strategy='peft_ddp')."
        )


def check_gradients(root: nn.Module, optimizer: Optimizer) -> None:
    """Before its first step: warn of what an optimizer should train but got no gradient for."""
    idle = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.grad is None}
    of_adapters = [(f"{path} ({type(a).__name__})", list(a.parameters())) for path, _, a in adapters_of(root)]
    adapters = [name for name, own in of_adapters if own and all(id(p) in idle for p in own)]
    in_place = [name for name, p in base_parameters(root).items() if id(p) in idle]
    if adapters:
        rank_zero_warn(
            f"PEFT: {len(adapters)} adapters got no gradient in the first step ({joined(adapters)}). Either "
            "their layers were not used in this batch, or their weights are read in a way that hides it (a helper "
            "function that is handed the layer, getattr): such an adapter has no effect. Leave those layers out "
            "with exclude_modules, or let the model call them."
        )
    if in_place:
        rank_zero_warn(
            f"PEFT: {len(in_place)} parameters that are trained in place got no gradient in the first step "
            f"({joined(in_place)}). Their layers were not used in this batch, or the loss does not depend "
            "on them. Leave them out with exclude_modules or modules_to_save."
        )


def check_optimizers(trainer: L.Trainer, module: L.LightningModule) -> None:
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if trainer.optimizers and missing:
        raise AdapterError(
            f"PEFT: {len(missing)} parameters are to be trained but are in no optimizer ({joined(missing)}). "
            "Make the optimizer in configure_optimizers, from self.parameters() or those that require gradients."
        )


def check_precision(module: nn.Module) -> None:
    """Refuse to train in float16: with Adam such parameters are NaN after a few steps."""
    half = [name for name, p in module.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise AdapterError(
            f"PEFT: {len(half)} parameters of the base are to be trained in float16 ({joined(half)}). They would "
            "become NaN within a few steps (adapters would not: they stay in float32). Use precision='bf16-true', or "
            "'16-mixed' on a GPU, or train adapters alone."
        )
