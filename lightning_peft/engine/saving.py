"""What others save of an adapted model: ``save_pretrained``, and the checkpoints of training loops that call it."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.engine.errors import AdapterError
from lightning_peft.engine.method import METHOD_STATE
from lightning_peft.engine.record import has_record, record_of


def method_states(model: nn.Module) -> dict[str, Tensor]:
    """Key -> tensor of what methods keep beside their adapters; ``model.load_state_dict`` reads these keys, too.

    ``state_dict`` itself does not hold it: whoever shards a model looks up each of its keys among the parameters.
    """
    injections = record_of(model).injections.items()
    return {f"{METHOD_STATE}.{name}.{key}": value for name, i in injections for key, value in i.state.items()}


def read_method_states(model: nn.Module) -> None:
    """Let ``model.load_state_dict`` read `method_states`, if there are any."""
    record = record_of(model)
    if record.giving_back is None and method_states(model):
        record.giving_back = model.register_load_state_dict_pre_hook(_give_back)


def _give_back(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for key, tensor in method_states(model).items():
        value = state_dict.pop(prefix + key, None)
        if value is not None:
            tensor.copy_(value)


_ADAPTERS_INSIDE = (
    "save_pretrained would write the base and adapters that from_pretrained passes over. merge(model) first, or write "
    "the adapters with save_adapter(model, folder)."
)


class SavePretrained:
    """In the place of ``save_pretrained`` of a model of which it would write what nobody reads.

    A person is told what to do, ``because`` something stands in the way. A training loop (the Trainer of transformers,
    accelerate), which says which process writes, gets a checkpoint of what is trained from
    ``write_checkpoint(model, folder)``, if there is one.
    """

    write_checkpoint: ClassVar[Callable[[nn.Module, Any], None] | None] = None

    def __init__(self, model: Any, because: str | None) -> None:
        self.model, self.because = model, because

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        write = type(self).write_checkpoint
        adapted = has_record(self.model) and record_of(self.model).merged is None
        if "is_main_process" in kwargs and write is not None and adapted:
            if kwargs["is_main_process"]:
                write(self.model, args[0] if args else kwargs["save_directory"])
            return None
        if self.because is not None:
            raise AdapterError(self.because)
        return type(self.model).save_pretrained(self.model, *args, **kwargs)


def let_loops_save(model: Any) -> None:
    """Let checkpoints of training loops hold what trains, also where no adapter keeps ``save_pretrained`` away.

    Not where all of the base does, and nothing stands beside it: then the model itself is that.
    """
    saves = callable(getattr(type(model), "save_pretrained", None)) and "save_pretrained" not in vars(model)
    if saves and any(i.method.keeps_base or i.state for i in record_of(model).injections.values()):
        model.__dict__["save_pretrained"] = SavePretrained(model, None)


def refuse_to_save(model: nn.Module, path: str, because: str = _ADAPTERS_INSIDE) -> None:
    """Let ``save_pretrained`` of the modules above ``path``, of those that have it, raise an error."""
    parts = path.split(".") if path else []
    for depth in range(len(parts) + 1):
        module = model.get_submodule(".".join(parts[:depth]))
        if callable(getattr(type(module), "save_pretrained", None)):
            module.__dict__["save_pretrained"] = SavePretrained(module, because)
            if getattr(module, "is_quantized", False):  # else the Trainer of transformers holds it for frozen
                module.__dict__["_hf_peft_config_loaded"] = True
