"""Methods: what a paper changes, as frozen hyper-parameters; and the registry of all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from torch import Tensor, nn

from lightning_peft.engine.errors import AdapterError, nearest
from lightning_peft.engine.limits import Patterns, check_fields, check_range
from lightning_peft.engine.slots import Adapter, Kind
from lightning_peft.engine.targets import Target, is_below, select_modules, select_parameters, select_targets

if TYPE_CHECKING:
    from lightning_peft.engine.calibration import Calibration
    from lightning_peft.engine.training import Training

Modality = Literal["vision", "text", "diffusion"]

METHOD_STATE = "method_state"  # the keys of what a method keeps beside its adapters begin with it


class Method(ABC):
    """One fine-tuning recipe. Subclasses are frozen keyword-only dataclasses that state only what their paper changes.

    What tests, docs and the command line must know of a method is declared on the class; nothing else lists methods.

    Attributes:
        name: the registry name.
        family: the folder of the method.
        paper: where it comes from.
        modalities: what it is meant for; it may work elsewhere.
        adapter_types: layer kind -> adapter class that sits on it; empty for methods that only train base parameters.
        acts_on: single layers; or the blocks of a model, or all of it; or what a model is given beside its input, such
            as a text or the step of a diffusion (``"condition"``).
        identity_at_init: the adapted model answers as the base model before the first step.
        mergeable: the change can be folded into the base weights.
        keeps_base: a copy of the base value is kept of each parameter trained in place, so that ``disabled`` and
            ``unload`` can give it back.
        switches: which of its parameters require gradients changes while training.
        calibrated: its start is measured on data.
        changes_base: the base weights of its targets are kept in another form (`stored`), and stay in it after
            ``unload``.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    modalities: ClassVar[tuple[Modality, ...]] = ("vision", "text", "diffusion")
    adapter_types: ClassVar[dict[Kind, type[Adapter]]] = {}
    acts_on: ClassVar[Literal["layers", "blocks", "condition"]] = "layers"
    identity_at_init: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = True
    switches: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def examples(cls) -> tuple[Self, ...]:
        """Small instances for a net with layers ``q_proj``, ``v_proj`` and ``head``; the tests run over them.

        Of a method that acts on blocks, for a stack of two transformer blocks with a class token, 12 features wide. Of
        one that acts on a condition, for two blocks of the same width that look at a text, in a denoiser that takes
        ``encoder_hidden_states``, ``timestep`` and ``added_cond_kwargs``, image embeddings of 7 features among them.
        """

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # every method is a dataclass
            object.__setattr__(self, field.name, _frozen(getattr(self, field.name)))
        check_fields(self)

    def targets(self, model: nn.Module) -> list[Target]:
        """The weights of ``model`` that get an adapter."""
        return []

    def adapter(self, target: Target) -> Adapter:
        """A new adapter for ``target``, its parameters not yet filled."""
        return self.adapter_types[target.site.kind](target, self)

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """One new adapter for each of ``targets``; a method that shares a budget among them looks at all."""
        return [self.adapter(target) for target in targets]

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """Names of the base parameters that are trained as they are."""
        return []

    def stored(self, weight: Tensor, target: Target) -> Tensor:
        """The form in which the base weight of ``target`` is kept from injection on; ``weight`` itself by default.

        It answers with the shape and the dtype of ``weight``. Adapters are filled before, from ``weight``.
        """
        return weight

    def learning_rate_ratio(self, adapter: Adapter, parameter: str) -> float:
        """What the learning rate of this parameter of ``adapter`` is multiplied with."""
        return 1.0

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Tensors that the method keeps beside its adapters; saved with them, and resumed."""
        return {}

    def calibrate(self, calibration: "Calibration") -> None:
        """Measure the start of the adapters on data."""
        raise NotImplementedError

    def on_train_batch_start(self, training: "Training") -> None:  # noqa: B027
        """Before the first batch of each optimizer step."""

    def on_before_optimizer_step(self, training: "Training") -> None:  # noqa: B027
        """The gradients of a step are complete: accumulated, averaged over devices, unscaled, not clipped yet."""

    def on_after_optimizer_step(self, training: "Training") -> None:  # noqa: B027
        """Behind each step that was taken."""

    def penalties(self, training: "Training") -> dict[str, Tensor]:
        """Name -> scalar that is added to the loss, weighted; of the parameters alone.

        Its gradient is added once for each optimizer step, when the gradients of the loss are complete.
        """
        return {}

    def watched(self, model: nn.Module) -> str | None:
        """Name of the module whose outputs `output_losses` looks at; None in a method that looks at none."""
        return None

    def output_losses(self, outputs: Tensor, base_outputs: Tensor) -> dict[str, Tensor]:
        """Name -> scalar that is added to the loss of a batch, weighted.

        Args:
            outputs: what the watched module answered.
            base_outputs: what it answers for the same batch in the base model, in evaluation mode; without a graph.
        """
        raise NotImplementedError

    def num_trainable(self, target: Target) -> int:
        """Trainable numbers that the adapter of ``target`` has, by the formula of the paper."""
        raise NotImplementedError

    def total_trainable(self, targets: list[Target]) -> int:
        """Trainable numbers of the adapters of all ``targets``: the sum, unless they share a budget or parameters."""
        return sum(self.num_trainable(target) for target in targets)


@dataclass(frozen=True, kw_only=True)
class MethodWithHead(Method):
    """A method that may train modules whole beside its adapters: the head of a new task, for one.

    Args:
        modules_to_save: patterns of these modules, or of single parameters such as ``"q_proj.bias"``;
            ``"output-head"`` finds the head by itself.

    Raises:
        TargetError: a pattern matches nothing.
    """

    modules_to_save: Patterns = ()

    def trained_in_place(self, model: nn.Module) -> list[str]:
        """All parameters of ``modules_to_save``."""
        return select_parameters(model, self.modules_to_save, who=type(self).__name__)


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(MethodWithHead):
    """A method that puts one adapter on each of the layers it is told to.

    Args:
        target_modules: ``"all-linear"`` (every linear layer but the output head), ``"all-layers"`` (every layer the
            method can adapt but the head), or names, last parts of names, regular expressions, or class names.
        exclude_modules: patterns of layers that are left out.
        layers_to_transform: indices of the blocks to adapt; all of them by default.
        modules_to_save: see `MethodWithHead`.

    Raises:
        TargetError: a pattern matches nothing, or a layer that the method cannot adapt.
    """

    target_modules: Patterns = "all-linear"
    exclude_modules: Patterns = ()
    layers_to_transform: tuple[int, ...] | None = None

    def targets(self, model: nn.Module) -> list[Target]:
        """The layers chosen by ``target_modules``, less those that are trained whole."""
        whole = select_modules(model, self.modules_to_save, who=type(self).__name__, parameters=True)
        found = select_targets(
            model,
            tuple(self.adapter_types),
            self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            who=type(self).__name__,
        )
        return [t for t in found if not any(is_below(t.name, name) for name in whole)]


@dataclass(frozen=True, kw_only=True)
class HostedMethod(Method):
    """A method that trains what another one injects, in a way of its own.

    Args:
        method: the other one, or its registry name.

    Raises:
        AdapterError: ``method`` is neither.
    """

    method: Method | str

    def __post_init__(self) -> None:
        super().__post_init__()
        host = get_method(self.method)() if isinstance(self.method, str) else self.method
        check_range(type(self).__name__, "method", host, isinstance(host, Method), "a method such as LoRA(r=8)")
        steady = "a method that does not choose by itself what trains when"
        check_range(type(self).__name__, "method", host, not host.switches, steady)
        object.__setattr__(self, "method", host)
        for fact in ("acts_on", "identity_at_init", "mergeable", "keeps_base", "changes_base", "calibrated"):
            object.__setattr__(self, fact, getattr(host, fact))

    @property
    def host(self) -> Method:
        """The other method."""
        return self.method  # type: ignore[return-value]  # a name was looked up when this was made

    def targets(self, model: nn.Module) -> list[Target]:
        """Those of the other method; so for the rest."""
        return self.host.targets(model)

    def adapter(self, target: Target) -> Adapter:  # noqa: D102
        return self.host.adapter(target)

    def adapters(self, targets: list[Target]) -> list[Adapter]:  # noqa: D102
        return self.host.adapters(targets)

    def trained_in_place(self, model: nn.Module) -> list[str]:  # noqa: D102
        return self.host.trained_in_place(model)

    def stored(self, weight: Tensor, target: Target) -> Tensor:  # noqa: D102
        return self.host.stored(weight, target)

    def learning_rate_ratio(self, adapter: Adapter, parameter: str) -> float:  # noqa: D102
        return self.host.learning_rate_ratio(adapter, parameter)

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:  # noqa: D102
        return self.host.initial_state(model)

    def calibrate(self, calibration: "Calibration") -> None:  # noqa: D102
        self.host.calibrate(calibration)

    def on_train_batch_start(self, training: "Training") -> None:  # noqa: D102
        self.host.on_train_batch_start(training)

    def on_before_optimizer_step(self, training: "Training") -> None:  # noqa: D102
        self.host.on_before_optimizer_step(training)

    def on_after_optimizer_step(self, training: "Training") -> None:  # noqa: D102
        self.host.on_after_optimizer_step(training)

    def penalties(self, training: "Training") -> dict[str, Tensor]:  # noqa: D102
        return self.host.penalties(training)

    def watched(self, model: nn.Module) -> str | None:  # noqa: D102
        return self.host.watched(model)

    def output_losses(self, outputs: Tensor, base_outputs: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return self.host.output_losses(outputs, base_outputs)

    def num_trainable(self, target: Target) -> int:
        """As many as in the other method."""
        return self.host.num_trainable(target)

    def total_trainable(self, targets: list[Target]) -> int:  # noqa: D102
        return self.host.total_trainable(targets)


def _frozen(value: Any) -> Any:
    """Lists as tuples and classes as their names, so that equal arguments make equal methods that JSON can hold."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value.__name__ if isinstance(value, type) else value


M = TypeVar("M", bound=type[Method])

METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Class decorator that makes a method known under ``name``; its family is the folder of its file.

    Raises:
        AdapterError: the name is taken.
    """

    def add(cls: M) -> M:
        taken = METHODS.get(name)
        # the same class again is a file that was loaded anew, or a cell of a notebook that was run twice
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise AdapterError(f"register: the method name {name!r} is taken by {taken.__qualname__}. Choose another.")
        # lightning_peft.methods.lora.lora -> lora; a method of a script or a notebook is a family by itself
        cls.name, cls.family = name, (cls.__module__.split(".")[-2:-1] or [cls.__module__])[0]
        cls.__repr__ = _changed_arguments  # type: ignore[method-assign]
        METHODS[name] = cls
        return cls

    return add


def _changed_arguments(method: Any) -> str:
    """The call that makes ``method``, without the arguments that have their default."""
    shown = []
    for field in fields(method):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(method, field.name) != default:
            shown.append(f"{field.name}={getattr(method, field.name)!r}")
    return f"{type(method).__name__}({', '.join(shown)})"


def get_method(name: str) -> type[Method]:
    """The method class of this registry name.

    Raises:
        AdapterError: there is none; the nearest names are shown.
    """
    if name not in METHODS:
        raise AdapterError(f"unknown method {name!r}.{nearest(name, METHODS)} list_methods() shows all.")
    return METHODS[name]


class MethodRow(NamedTuple):
    """One row of `list_methods`."""

    name: str
    cls: type[Method]
    family: str
    paper: str
    mergeable: bool
    modalities: tuple[Modality, ...]


def list_methods() -> list[MethodRow]:
    """All registered methods, sorted by family and name."""
    rows = [MethodRow(n, c, c.family, c.paper, c.mergeable, c.modalities) for n, c in METHODS.items()]
    return sorted(rows, key=lambda row: (row.family, row.name))
