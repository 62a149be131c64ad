"""The PEFT callback: plays the part of a method in Lightning's training loop.

Order of events in Lightning 2.6: ``Callback.setup``, ``LightningModule.setup``, ``LightningModule.configure_model``,
checkpoint restored, strategy set up (``configure_optimizers``), ``on_fit_start``. A model may be built in ``__init__``,
``setup`` or ``configure_model``, or a part in each; so injection is tried after each of them, adds what is missing,
and must have found everything after the last.
"""

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_peft.callbacks import checkpoints
from lightning_peft.callbacks.instance_hooks import after, around, within
from lightning_peft.callbacks.learning_rates import groups_split, ratios, scale_in_step, unscale
from lightning_peft.callbacks.probe import batch_loss
from lightning_peft.callbacks.sharding import check_mesh, check_sharding
from lightning_peft.callbacks.table import adapter_table, show, trainable_share
from lightning_peft.engine import (
    AdapterError,
    Method,
    TargetError,
    Training,
    adapters_of,
    get_method,
    inject,
    notify,
)
from lightning_peft.engine.inject import has_record, record_of
from lightning_peft.engine.slots import base_parameters, is_sharded
from lightning_peft.engine.training import Event
from lightning_peft.interop import load_adapter, read_adapter, save_adapter
from lightning_peft.interop.files import adapted_root, method_from
from lightning_peft.parts.switching import let_all_train

Module = TypeVar("Module", bound=L.LightningModule)


class PEFT(L.Callback):
    """Fine-tune any LightningModule with a parameter-efficient method; nothing in the module changes.

    Adapters are injected before optimizers are made, everything else is frozen, checkpoints hold the adapter alone
    (``fit``, ``validate``, ``test`` and ``predict`` take them as ``ckpt_path``), and a table shows what was adapted.

    While training, the adapters are in training mode even if the model around them was left in evaluation mode, and
    normalisation layers whose weight is frozen keep their running statistics. Dropout of the base is left as it is.

    Args:
        method: a method, several (applied in order), a registry name such as ``"lora"``, or None to take the one that
            made the adapter in ``init_from``.
        name: under which name; with several methods each gets ``name-method``.
        init_from: adapter folder to start from, as written by ``save_adapter``; the optimizer starts fresh.
        save_to: folder to write the adapter to when training ends; with several methods one folder each inside it.
        summary: print the table of what was adapted when training starts.

    Raises:
        TargetError: when the model is complete and the method finds nothing to adapt, or not all it was asked for.
        AdapterError: arguments contradict each other, another PEFT callback has the same name, or a parameter that is
            to be trained is in no optimizer.
    """

    def __init__(
        self,
        method: Method | list[Method] | str | None = None,
        name: str = "default",
        *,
        init_from: str | None = None,
        save_to: str | None = None,
        summary: bool = True,
    ) -> None:
        self.method, self.name, self.init_from, self.save_to, self.summary = method, name, init_from, save_to, summary
        self.methods = _named(method, name, init_from)
        self._to_load: str | None = None
        self._gradients_seen = True
        self._while_training = ExitStack()
        self._told: int | None = None  # the step whose beginning the methods know of
        self._held: list[nn.Module] = []  # normalisation layers kept in evaluation mode while training

    @property
    def state_key(self) -> str:
        """Tells the callbacks of different adapters apart."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Inject now or as soon as the model is built; make checkpoints hold the adapter alone."""
        twins = [c for c in trainer.callbacks if isinstance(c, PEFT) and c.methods.keys() & self.methods.keys()]  # type: ignore[attr-defined]
        if len(twins) > 1:
            raise AdapterError(
                f"the Trainer has {len(twins)} PEFT callbacks for the adapter {self.name!r}. Keep one, or give each a "
                "name of its own: PEFT(method, name='second')."
            )
        _check_trainer(trainer, pl_module)
        check_mesh(trainer.strategy)
        before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        averaging = [c for c in before if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        if averaging:
            name = type(averaging[0]).__name__
            raise AdapterError(
                f"{name} comes before PEFT, so it would average a model without adapters. Put PEFT first: "
                f"callbacks=[PEFT(...), {name}(...)]."
            )
        around(pl_module, "on_save_checkpoint", checkpoints.keep_adapters)
        around(pl_module, "on_load_checkpoint", checkpoints.fill_in_base)
        root = adapted_root(pl_module)
        trained_already = has_record(root) and self.name in record_of(root).injections
        self._to_load = None if trained_already else self.init_from
        self._inject(pl_module, last=False)
        if stage == "fit":
            within(pl_module, "configure_optimizers", lambda module: groups_split(ratios(adapted_root(module))))
        built_later = is_overridden("configure_model", pl_module)
        after(pl_module, "setup", lambda module: self._inject(module, last=not built_later))
        if built_later:
            # others may call it early (weight averaging does): the last call is the one that the Trainer makes
            after(pl_module, "configure_model", self._inject_if_last, once=_called_by_trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that all that is to be trained is in an optimizer; show and log what was adapted."""
        trainable, total = trainable_share(pl_module)
        if not trainable:
            raise AdapterError(
                f"no parameter of {type(pl_module).__name__} requires gradients: something froze the adapters after "
                "they were injected. Freeze before fit, or let PEFT do it."
            )
        check_sharding(trainer.strategy, pl_module)
        _check_optimizers(trainer, pl_module)
        _check_switching(trainer, self.methods)
        for optimizer in trainer.optimizers:
            scale_in_step(optimizer)
            stepped = optimizer.register_step_post_hook(
                lambda *_: self._notify("on_after_optimizer_step", trainer, pl_module)
            )
            self._while_training.enter_context(stepped)
        self._gradients_seen, self._told = False, None
        for logger in trainer.loggers:
            logger.log_metrics(
                {"trainable_parameters": trainable, "trainable_percent": 100 * trainable / total}, step=0
            )
        if self.summary and trainer.is_global_zero:
            for name in self.methods:
                show(adapter_table(adapted_root(pl_module), name))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adapters train; running statistics that belong to frozen weights do not move."""
        root = adapted_root(pl_module)
        for _, _, adapter in adapters_of(root):
            adapter.train()
        self._hold_statistics(root)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the methods of each optimizer step before its first batch."""
        if self._told != trainer.global_step:
            self._told = trainer.global_step
            loss = functools.partial(batch_loss, trainer, pl_module, batch, batch_idx)
            self._notify("on_train_batch_start", trainer, pl_module, loss=loss)
            if any(method.switches for method in self.methods.values()):
                self._hold_statistics(adapted_root(pl_module))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Tell the methods that the gradients of a step are complete."""
        self._notify("on_before_optimizer_step", trainer, pl_module)

    def _notify(self, event: Event, trainer: L.Trainer, module: L.LightningModule, **now: Any) -> None:
        root = adapted_root(module)
        average = functools.partial(trainer.strategy.reduce, reduce_op="mean")
        now |= {"step": trainer.global_step, "epoch": trainer.current_epoch, "average": average}
        notify(root, event, trainer.optimizers, self.methods.keys(), **now)

    def _hold_statistics(self, root: nn.Module) -> None:
        self._release_statistics()
        parameters = base_parameters(root)
        if all(parameter.requires_grad for parameter in parameters.values()):
            return
        for name, module in root.named_modules():
            trained = f"{name}.weight" in parameters and parameters[f"{name}.weight"].requires_grad
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and not trained:
                self._held.append(module.eval())

    def _release_statistics(self) -> None:
        while self._held:
            self._held.pop().train()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Once, after the first backward: warn of adapters that no gradient reached."""
        if self._gradients_seen:
            return
        self._gradients_seen = True
        idle = [
            f"{path} ({type(adapter).__name__})"
            for path, _, adapter in adapters_of(adapted_root(pl_module))
            if all(p.grad is None for p in adapter.parameters()) and any(p.requires_grad for p in adapter.parameters())
        ]
        if idle:
            rank_zero_warn(
                f"{len(idle)} adapters got no gradient in the first backward: {', '.join(idle[:3])}, ... Either their "
                "layers were not used in this batch, or their weights are read in a way that hides it (a helper "
                "function that is handed the layer, getattr): such an adapter has no effect. Leave those layers out "
                "with exclude_modules, or let the model call them."
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A step that failed may have left its rates scaled: give back what was asked for, before anybody saves it."""
        for optimizer in trainer.optimizers:
            unscale(optimizer)
        self._while_training.close()
        self._let_all_train(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the adapter folder, if one was asked for; give the modes back."""
        self._while_training.close()
        self._release_statistics()
        self._let_all_train(pl_module)
        if self.save_to is not None and (trainer.is_global_zero or is_sharded(pl_module)):
            self._save(pl_module, Path(self.save_to))

    def _let_all_train(self, module: L.LightningModule) -> None:
        """The next optimizer is made from all that may train."""
        root = adapted_root(module)
        for name, method in self.methods.items():
            if method.switches and has_record(root) and name in record_of(root).injections:
                let_all_train(Training(root, name, ()))

    def _save(self, module: nn.Module, folder: Path) -> None:
        for name in self.methods:
            save_adapter(module, folder / name if len(self.methods) > 1 else folder, name)

    def _inject_if_last(self, module: nn.Module) -> None:
        self._inject(module, last=_called_by_trainer(module))

    def _inject(self, module: nn.Module, last: bool) -> None:
        try:
            for name, method in self.methods.items():
                inject(adapted_root(module), method, name)
        except TargetError:
            if last:
                raise
            return  # not all of the model is built yet
        if last and self._to_load is not None:
            load_adapter(module, self._to_load, self.name)
            self._to_load = None

    @staticmethod
    def load_from_checkpoint(module_class: type[Module], checkpoint_path: str | Path, **kwargs: Any) -> Module:
        """``module_class.load_from_checkpoint`` for a checkpoint that holds an adapter alone.

        The module is built as usual, then the adapters are injected and all values are filled in, strictly.

        Args:
            module_class: a LightningModule that builds its model in ``__init__`` or ``configure_model``.
            checkpoint_path: a checkpoint written by a Trainer with this callback.
            kwargs: passed on; ``map_location`` and the arguments of the module.

        Raises:
            AdapterFileError: the checkpoint has no adapter in it, or does not fit.
            TargetError: the model is not built yet (in ``setup``, which is not called here): use
                ``trainer.test(module, ckpt_path=...)`` with this callback instead.
        """
        original = module_class.on_load_checkpoint

        def on_load_checkpoint(self: L.LightningModule, checkpoint: dict[str, Any]) -> None:
            checkpoints.inject_from(self, checkpoint)
            around(self, "on_save_checkpoint", checkpoints.keep_adapters)
            checkpoints.fill_in_base(self, checkpoint)
            original(self, checkpoint)

        own = "on_load_checkpoint" in vars(module_class)
        module_class.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign, assignment]
        try:
            return module_class.load_from_checkpoint(checkpoint_path, **kwargs)
        finally:
            if own:
                module_class.on_load_checkpoint = original  # type: ignore[method-assign]
            else:
                del module_class.on_load_checkpoint


def _check_trainer(trainer: Any, module: nn.Module) -> None:
    """Refuse what would leave the user's module without adapters, with no other sign of it."""
    if not isinstance(trainer, Trainer):
        package = type(trainer).__module__.partition(".")[0]
        raise AdapterError(
            f"this callback belongs to the package lightning, the Trainer to {package}, which has classes of its own. "
            "Import both from one: import lightning as L."
        )
    start = getattr(trainer.strategy.launcher, "_start_method", None)
    if start is not None and not has_record(adapted_root(module)):
        raise AdapterError(
            f"the strategy starts its processes by {start}, and what is injected there does not come back. Inject "
            "before fit: inject(module, method), with the method that PEFT is given; or use strategy='ddp'."
        )


def _named(method: Method | Sequence[Method] | str | None, name: str, init_from: str | None) -> dict[str, Method]:
    if method is None:
        if init_from is None:
            raise AdapterError("PEFT: give a method such as LoRA(r=8), or a folder in init_from to take it from.")
        facts, _, _ = read_adapter(init_from)
        if facts is None:
            raise AdapterError(f"PEFT: {init_from} does not say which method made it. Give the method too.")
        method = method_from(facts)
    several: Sequence[Any] = method if isinstance(method, list | tuple) else [method]
    found = [get_method(m)() if isinstance(m, str) else m for m in several]
    for m in found:
        if not isinstance(m, Method):
            raise AdapterError(f"PEFT: expected a method such as LoRA(r=8), or a name such as 'lora', got {m!r}.")
    names = [name] if len(found) == 1 else [f"{name}-{m.name}" for m in found]
    if not found or len(set(names)) < len(names):
        raise AdapterError(f"PEFT: expected one or more methods of different kinds, got {found!r}.")
    if init_from is not None and len(found) > 1:
        raise AdapterError("PEFT: init_from is one adapter, so it goes with one method.")
    return dict(zip(names, found, strict=True))


def _called_by_trainer(module: nn.Module) -> bool:
    return getattr(module, "_current_fx_name", None) == "configure_model"


def _check_switching(trainer: L.Trainer, methods: dict[str, Method]) -> None:
    """What begins to train after it was wrapped would not be averaged over devices, with no sign of it."""
    switching = [type(method).__name__ for method in methods.values() if method.switches]
    if switching and isinstance(trainer.strategy.model, DistributedDataParallel):
        raise AdapterError(
            f"{switching[0]} changes what trains while training, which DistributedDataParallel does not follow. Use "
            "Trainer(strategy='peft_ddp')."
        )


def _check_optimizers(trainer: L.Trainer, module: L.LightningModule) -> None:
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if trainer.optimizers and missing:
        raise AdapterError(
            f"{len(missing)} parameters are to be trained but are in no optimizer: {', '.join(missing[:3])}, ... "
            "Make the optimizer in configure_optimizers, from self.parameters() or those that require gradients."
        )
