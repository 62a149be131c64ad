"""The PEFT callback: plays the part of a method in Lightning's training loop.

Order of events in Lightning 2.6: ``Callback.setup``, ``LightningModule.setup``, ``LightningModule.configure_model``,
checkpoint restored, strategy set up (``configure_optimizers``), ``on_fit_start``. A model may be built in ``__init__``,
``setup`` or ``configure_model``, or a part in each; so injection is tried after each of them, adds what is missing,
and must have found everything after the last.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import lightning as L
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.callbacks import checkpoints, checks
from lightning_peft.callbacks.averaging import average_what_trains, frozen_norms
from lightning_peft.callbacks.calibrating import calibrate_on_training_data
from lightning_peft.callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_peft.callbacks.fused import fused
from lightning_peft.callbacks.instance_hooks import after, around, before, unwrap, within
from lightning_peft.callbacks.learning_rates import groups_split, ratios, scale_in_step, unscale
from lightning_peft.callbacks.optimizer_state import restore_by_name
from lightning_peft.callbacks.probe import batch_loss
from lightning_peft.callbacks.resuming import Place
from lightning_peft.callbacks.sharding import check_mesh, check_sharding
from lightning_peft.callbacks.table import adapter_table, show, trainable_share
from lightning_peft.callbacks.telemetry import PREFIX, Telemetry
from lightning_peft.callbacks.terms import with_terms
from lightning_peft.engine import (
    AdapterError,
    Method,
    TargetError,
    Training,
    adapters_of,
    check_range,
    get_method,
    inject,
    notify,
)
from lightning_peft.engine.activation_checkpointing import inputs_require_grad
from lightning_peft.engine.limits import one_of
from lightning_peft.engine.record import has_record, record_of
from lightning_peft.engine.slots import is_sharded
from lightning_peft.engine.training import Event
from lightning_peft.interop import HFPEFT, load_adapter, read_adapter, save_adapter
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
        method: a method, several (applied in order), a registry name such as ``"lora"``, a ``peft.PeftConfig``
            (`HFPEFT`), or None to take the one that made the adapter in ``init_from``.
        name: name of the adapter; with several methods each gets ``name-method``.
        init_from: adapter folder to start from, as written by ``save_adapter``; the optimizer starts fresh.
        save_to: folder to write the adapter to when training ends; with several methods one folder each inside it.
        summary: print the table of what was adapted when training starts.
        save: what checkpoints hold: ``"adapter"``, what was trained and nothing of the frozen base; ``"full"``, the
            base too; ``"merged"``, weights for a model without adapters, which cannot be resumed.
        telemetry: log for each layer, with every ``log_every_n_steps``, the norms of its change and gradient, its share
            of the whole change, whether it trains at the moment, and how many directions its low-rank adapters use.
        calibration_batches: batches of the training data on which methods that are calibrated measure their start.
        kernels: ``"auto"`` computes norms, gates, activations and rotations of known types, and the logits of a wide
            output head, by the operations of ``lightning_peft.kernels`` while training: they save less for the
            backward pass, and the last digits differ. Where no kernel runs, as on a CPU, only what saves less is
            replaced: rotations stay. ``"off"`` leaves all as the model has it.

    Raises:
        TargetError: when the model is complete and the method finds nothing to adapt, or not all it was asked for.
        AdapterError: arguments contradict each other, another PEFT callback has the same name, or a parameter that is
            to be trained is in no optimizer.
        MergeError: checkpoints are to be merged, and the method is no change of weights that the base can hold.
    """

    def __init__(
        self,
        method: Method | list[Method] | str | None = None,
        name: str = "default",
        *,
        init_from: str | None = None,
        save_to: str | None = None,
        summary: bool = True,
        save: checkpoints.Save = "adapter",
        telemetry: bool = False,
        calibration_batches: int = 8,
        kernels: Literal["auto", "off"] = "auto",
    ) -> None:
        saves = get_args(checkpoints.Save)
        check_range("PEFT", "save", save, save in saves, one_of(saves))
        self.method, self.name, self.init_from, self.save_to, self.summary = method, name, init_from, save_to, summary
        self.save, self.telemetry, self.calibration_batches = save, telemetry, calibration_batches
        check_range("PEFT", "kernels", kernels, kernels in ("auto", "off"), one_of(("auto", "off")))
        self.kernels = kernels
        check_range("PEFT", "calibration_batches", calibration_batches, calibration_batches >= 1, "an integer >= 1")
        self._telemetry: Telemetry | None = None
        self.methods = _named(method, name, init_from)
        self._to_load: str | None = None
        self._resuming: dict[str, Any] = {}  # the checkpoint, between its loading and the start of training
        self._while_training = ExitStack()
        self._place = Place()
        self._told: int | None = None  # the step whose beginning the methods know of
        self._total_steps: int | None = None
        self._stepped: set[int] = set()  # ids of the optimizers whose gradients were looked at
        self._held: list[nn.Module] = []  # normalisation layers kept in evaluation mode while training

    @property
    def state_key(self) -> str:
        """Tells the callbacks of different adapters apart."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """The place of the run; everything else is with the model."""
        return {"place": self._place.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""
        self._place.load_state_dict(state_dict.get("place", {}))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Inject now or as soon as the model is built; make checkpoints hold the adapter alone."""
        twins = [c for c in trainer.callbacks if isinstance(c, PEFT) and c.methods.keys() & self.methods.keys()]  # type: ignore[attr-defined]
        if len(twins) > 1:
            raise AdapterError(
                f"PEFT: the Trainer has {len(twins)} callbacks for the adapter {self.name!r}. Keep one, or give each a "
                "name of its own: PEFT(method, name='second')."
            )
        checks.check_trainer(trainer, pl_module)
        check_mesh(trainer.strategy)
        checks.check_callbacks(trainer, self)
        self._set_up_checkpoints(trainer, pl_module)
        root = adapted_root(pl_module)
        trained_already = has_record(root) and self.name in record_of(root).injections
        self._to_load = None if trained_already else self.init_from
        self._inject(pl_module, last=False)
        if stage == "fit":
            self._place.setup(trainer)
            within(pl_module, "configure_optimizers", lambda module: groups_split(ratios(adapted_root(module))))
            # around the step itself, so that it holds in the runs of a tuner too, which calls no callback
            within(pl_module, "training_step", inputs_require_grad, once=lambda module: False)
            # the last moment at which a layer may get another rank: then the strategy wraps and the optimizers are made
            before(trainer.strategy, "setup", lambda _: self._calibrate(trainer, pl_module))
        built_later = is_overridden("configure_model", pl_module)
        after(pl_module, "setup", lambda module: self._inject(module, last=not built_later))
        if built_later:
            # others may call it early (weight averaging does): the last call is the one that the Trainer makes
            after(pl_module, "configure_model", self._inject_if_last, once=_called_by_trainer)

    def _calibrate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        calibrate_on_training_data(trainer, module, self.methods, self.calibration_batches)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what is being resumed until there are optimizers."""
        self._resuming = checkpoint if trainer.training else {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that all that is to be trained is in an optimizer; show and log what was adapted."""
        trainable, total = trainable_share(pl_module)
        if not trainable:
            raise AdapterError(
                f"PEFT: no parameter of {type(pl_module).__name__} requires gradients: something froze the adapters "
                "after they were injected. Freeze before fit, or let PEFT do it."
            )
        check_sharding(trainer.strategy, pl_module)
        checks.check_optimizers(trainer, pl_module)
        checks.check_switching(trainer, self.methods)
        checks.check_precision(pl_module)
        average_what_trains(trainer, pl_module)
        self._restore_optimizers_by_name(trainer, pl_module)

        def told(*_: Any) -> None:
            self._notify("on_after_optimizer_step", trainer, pl_module)

        if pl_module.automatic_optimization and any(m.watched(adapted_root(pl_module)) for m in self.methods.values()):
            self._while_training.enter_context(with_terms(trainer, pl_module, self.methods.keys()))
        for optimizer in trainer.optimizers:
            scale_in_step(optimizer)
            stepped = optimizer.register_step_post_hook(told)
            self._while_training.enter_context(stepped)
        self._told = None
        self._stepped.clear()
        for logger in trainer.loggers:
            logger.log_metrics(
                {"trainable_parameters": trainable, "trainable_percent": 100 * trainable / total}, step=0
            )
        replaced = self._while_training.enter_context(fused(pl_module)) if self.kernels == "auto" else Counter()
        if self.summary and trainer.is_global_zero:
            for name in self.methods:
                show(adapter_table(adapted_root(pl_module), name, replaced))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on where a checkpoint was written."""
        self._set_modes(adapted_root(pl_module))
        self._place.on_train_start(trainer)
        steps = trainer.estimated_stepping_batches
        self._total_steps = int(steps) if steps != float("inf") else None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adapters train; running statistics that belong to frozen weights do not move."""
        self._place.on_train_epoch_start(trainer)
        self._set_modes(adapted_root(pl_module))

    def _set_modes(self, root: nn.Module) -> None:
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
        if id(optimizer) not in self._stepped:
            self._stepped.add(id(optimizer))
            checks.check_gradients(adapted_root(pl_module), optimizer)
        penalties = self._notify("on_before_optimizer_step", trainer, pl_module)
        pl_module.log_dict({f"{PREFIX}/{key}": value for key, value in penalties.items()})
        self._log_telemetry(trainer, pl_module)

    def _log_telemetry(self, trainer: Any, module: L.LightningModule) -> None:
        due = trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0
        if self._telemetry is not None and due:
            measured = {f"{PREFIX}/{key}": value for key, value in self._telemetry.measure().items()}
            module.log_dict(measured, on_step=True, on_epoch=False)

    def _notify(self, event: Event, trainer: L.Trainer, module: L.LightningModule, **now: Any) -> dict[str, Tensor]:
        root = adapted_root(module)
        average = functools.partial(trainer.strategy.reduce, reduce_op="mean")
        now |= {"step": trainer.global_step, "epoch": trainer.current_epoch, "total_steps": self._total_steps}
        now["average"] = average
        return notify(root, event, trainer.optimizers, self.methods.keys(), **now)

    def _hold_statistics(self, root: nn.Module) -> None:
        self._release_statistics()
        for norm in frozen_norms(root):
            if norm.training:
                self._held.append(norm.eval())

    def _release_statistics(self) -> None:
        while self._held:
            self._held.pop().train()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A step that failed may have left its rates scaled: give back what was asked for, before anybody saves it."""
        unwrap(pl_module, "training_step", inputs_require_grad)
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

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the training step as it was."""
        unwrap(pl_module, "training_step", inputs_require_grad)

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
        if last and self.telemetry and self._telemetry is None:
            self._telemetry = Telemetry(adapted_root(module))
        if last and self._to_load is not None:
            load_adapter(module, self._to_load, self.name)
            self._to_load = None
        if last and self.save == "merged":
            checkpoints.check_can_merge(module)

    def _set_up_checkpoints(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        asked = {c.save for c in trainer.callbacks if isinstance(c, PEFT)}  # type: ignore[attr-defined]
        if len(asked) > 1:
            wanted = " and ".join(f"save={save!r}" for save in sorted(asked))
            raise AdapterError(f"PEFT: the callbacks ask for {wanted}. Give all the same.")
        sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy)
        if self.save == "merged" and sharded:
            raise AdapterError(
                f"PEFT(save='merged'): weights that {type(trainer.strategy).__name__} shards cannot be merged. Use "
                "save='adapter', and merge after training."
            )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        module.__dict__["_peft_saving"] = checkpoints.Saving(self.save)
        around(module, "on_save_checkpoint", checkpoints.on_save)
        around(module, "on_load_checkpoint", checkpoints.on_load)

    def _restore_optimizers_by_name(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        checkpoint, self._resuming = self._resuming, {}
        if "optimizer_param_names" in checkpoint.get("peft", {}):
            live = [config.scheduler for config in trainer.lr_scheduler_configs]
            schedulers = list(zip(live, checkpoint.get("lr_schedulers", ()), strict=False))
            restore_by_name(module, trainer.optimizers, checkpoint["peft"]["optimizer_param_names"], schedulers)

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
            around(self, "on_save_checkpoint", checkpoints.on_save)
            checkpoints.on_load(self, checkpoint)
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


def _named(method: Any, name: str, init_from: str | None) -> dict[str, Method]:
    if method is None:
        if init_from is None:
            raise AdapterError("PEFT: give a method such as LoRA(r=8), or a folder in init_from to take it from.")
        facts, _, _ = read_adapter(init_from)
        if facts is None:
            raise AdapterError(f"PEFT: init_from={init_from!r} does not say which method made it. Give the method too.")
        method = method_from(facts)
    several: Sequence[Any] = method if isinstance(method, list | tuple) else [method]
    found = [get_method(m)() if isinstance(m, str) else m for m in several]
    found = [HFPEFT(config=m) if hasattr(m, "peft_type") else m for m in found]
    for m in found:
        if not isinstance(m, Method):
            raise AdapterError(f"PEFT: expected a method such as LoRA(r=8), or a name such as 'lora', got {m!r}.")
    names = [name] if len(found) == 1 else [f"{name}-{m.name}" for m in found]
    if not found or len(set(names)) < len(names):
        raise AdapterError(f"PEFT: expected one or more methods of different kinds, got {found!r}.")
    if init_from is not None and len(found) > 1:
        raise AdapterError(
            f"PEFT: init_from={init_from!r} is one adapter, and there are {len(found)} methods. Use a callback for "
            "each."
        )
    return dict(zip(names, found, strict=True))


def _called_by_trainer(module: nn.Module) -> bool:
    return getattr(module, "_current_fx_name", None) == "configure_model"
