"""Slots: how an adapter comes to act inside a module that keeps its class, its names and its parameters.

`occupy` swaps the class of a module in place for a subclass made once per (class, adapted parameter names), and hangs
the adapter below it as a child of ``adapters``. An adapter acts in one of two ways:

* **when its module is called**: the forward hands the input to the adapters, which call the layer below (`Layer`).
  The module may be one layer, or a block, or a whole network (a site of kind ``"module"``).
* **when its weight is read** by a forward that does not call the owner (``nn.MultiheadAttention`` reads
  ``out_proj.weight``): while that forward runs, the parameter answers with its *effective* value, base plus adapters.

The effective value is visible only while such a forward runs (``_live`` holds its cache, else it is None). At any other
time ``module.weight`` is the raw parameter: optimizers, checkpoints and sharding never see anything else.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.engine.codes import answers_in, decoded, holds_codes, linear_size
from lightning_peft.engine.errors import AdapterError, MergeError

TensorT = TypeVar("TensorT", bound=Tensor)
Kind = Literal["linear", "conv", "embedding", "norm", "module"]


@dataclass(frozen=True)
class Site:
    """Where on a module an adapter sits: which parameters it changes, and how their module uses them.

    Args:
        kind: what the parameters compute; ``"module"`` where the adapter changes none, but the calls of a whole module.
        weight: name of the weight in its module; empty for a whole module, and for a linear layer that another
            library keeps in codes of several tensors.
        bias: name of the bias, or None where the module has no place for one.
        transposed: the weight is stored (d_in, d_out), as in ``nn.Embedding`` and transformers' ``Conv1D``.
        read: the module uses the parameters by itself, so that an adapter acts through their effective value only.
        width: features of what a whole module answers.
    """

    kind: Kind
    weight: str = "weight"
    bias: str | None = "bias"
    transposed: bool = False
    read: bool = False
    width: int = 0

    def key(self, name: str) -> str:
        """The key of adapter ``name`` below ``adapters``; a module with several weights has one key for each."""
        return name if self.weight in ("weight", "") else f"{name}:{self.weight}"

    def prefix(self, path: str) -> str:
        """What the keys of a saved adapter begin with that sits here on the module ``path``."""
        return f"{path}.{self.key('adapters')}.".lstrip(".")

    def name(self, path: str) -> str:
        """The name that selects the weight, in the module ``path``."""
        return path if self.weight in ("weight", "") else f"{path}.{self.weight}".lstrip(".")

    def get(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The raw weight (d_out, d_in, ...) and bias of ``module``, output axis first whatever the storage.

        Without a name there is none, and this is a tensor without storage, of the module's dtype and device: (width,)
        for a whole module, (d_out, d_in) for a linear layer in codes.
        """
        if not self.weight:
            dtype, device = answers_in(module)
            size = (self.width,) if self.kind == "module" else linear_size(module)
            bias = module._parameters[self.bias] if self.bias else None
            return torch.empty((), dtype=dtype, device=device).expand(size), bias  # type: ignore[arg-type]
        weight: Tensor | None = module._parameters[self.weight]
        if weight is None:  # a normalisation layer without affine parameters scales by one
            weight = torch.ones(_channels(module), device=_device(module))
        bias = module._parameters[self.bias] if self.bias else None
        return (weight.T if self.transposed else weight), bias

    def store(
        self, module: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """The inverse of `get`: parameter name -> value in the layout and dtype that ``module`` stores.

        ``dtype`` is that of the input or of the model; it counts where ``module`` stores no weight that tells.
        """
        raw: Tensor | None = module._parameters[self.weight]
        stored = weight.T if self.transposed else weight
        values = {self.weight: stored.to(dtype if raw is None else raw.dtype)}
        if bias is not None and self.bias is not None:
            values[self.bias] = bias.to(values[self.weight].dtype)
        return values


class Adapter(nn.Module):
    """What is injected. Parameters are bare ``nn.Parameter``s, made in ``__init__`` and filled in `reset_parameters`.

    They keep their precision when the model around them is cast to a lower one: a rank-r update in half precision
    loses small steps, and costs little memory in single precision.

    Attributes:
        rank_axes: tensor -> its axes of length r, in adapters whose rank is chosen when the base or the data is known:
            a file decides it then.
    """

    rank_axes: ClassVar[dict[str, tuple[int, ...]]] = {}

    site: Site
    dropout: float = 0.0  # of the input, which an adapter on a weight that is read does not see

    def shapes_at(self, r: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in ``rank_axes`` at another rank."""
        shapes = {key: getattr(self, key).shape for key in self.rank_axes}
        return {
            key: tuple(r if axis in self.rank_axes[key] else length for axis, length in enumerate(shape))
            for key, shape in shapes.items()
        }

    def rank_in(self, tensors: Mapping[str, Tensor], prefix: str) -> int | None:
        """The rank that ``tensors`` give to this adapter, whose keys begin with ``prefix``; None if they give none."""
        for key, axes in list(self.rank_axes.items())[:1]:  # one decides, and the others have to agree
            given = tensors.get(prefix + key)
            if given is not None and given.dim() == getattr(self, key).dim():
                return given.shape[axes[0]]
        return None

    def resize(self, r: int) -> None:
        """Take another rank; all values of these tensors are zero then. Parameters stay the same objects."""
        for key, shape in self.shapes_at(r).items():
            tensor = getattr(self, key)
            tensor.data = tensor.new_zeros(shape)

    def reset_parameters(self, layer: "Layer", generator: torch.Generator) -> None:
        """Fill the parameters; draw from ``generator`` alone, so that no other random number is touched."""

    def forward(self, x: Any, layer: "Layer") -> Any:
        """The output of the adapted layer for input ``x``; ``layer(x)`` is the output of what lies below."""
        raise NotImplementedError(f"{type(self).__name__} acts through weights only: it sits on a module that is read")

    @classmethod
    def together(cls, adapters: Sequence["Adapter"], x: Any, layer: "Layer", samples: "Samples") -> Any:
        """What `forward` gives where each sample of a batch has an adapter of its own, in one go; None if it cannot.

        Args:
            adapters: adapters on one layer, of classes that have this method in common.
            x: the input, samples along its first axis.
            layer: what lies below all of them.
            samples: which of them have which adapter.
        """
        return None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (d_out, d_in, ...) and bias of one plain layer that computes what `forward` does."""
        raise MergeError(f"{type(self).__name__}: {self.unmergeable_because()}")

    @property
    def changes_weights(self) -> bool:
        """Whether `merged` is defined, so that a forward that only reads the weight can be adapted."""
        return type(self).merged is not Adapter.merged

    def unmergeable_because(self) -> str | None:
        """Why this adapter cannot be folded into its layer, as a sentence; None if it can."""
        return None if self.changes_weights else f"{type(self).__name__} is not a change of weights."

    def unreadable_because(self) -> str | None:
        """Why this adapter cannot train where its weight is read without a call of its layer, as a sentence."""
        return "its dropout acts on the input: set dropout=0." if self.dropout else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            lower = moved.is_floating_point() and moved.dtype.itemsize < t.dtype.itemsize
            return t.to(moved.device) if lower else moved

        return super()._apply(keep_precision, recurse)


@dataclass(frozen=True)
class Samples:
    """How the samples of a batch are spread over adapters.

    Args:
        index: (samples,) int64, the adapter of each; -1 for none.
        order: (samples,) int64, those of the first adapter first, and those without one last.
        back: (samples,) int64, where each of them is in that order.
        lengths: how many each adapter has; behind them how many have none, if there are such.
    """

    index: Tensor
    order: Tensor
    back: Tensor
    lengths: list[int]

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Those of each adapter by themselves, in the order of ``lengths``."""
        return x.index_select(0, self.order).split(self.lengths)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `parts`."""
        return torch.cat(parts).index_select(0, self.back)  # type: ignore[arg-type]


class Layer:
    """What lies below an adapter: the base layer, or the base under the adapters that were put in before."""

    __slots__ = ("module", "site", "_below", "_args", "_kwargs", "_keyword")

    def __init__(
        self,
        module: Any,
        site: Site,
        below: tuple[Adapter, ...] = (),
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        keyword: str | None = None,
    ) -> None:
        self.module, self.site, self._below = module, site, below
        self._args, self._kwargs, self._keyword = args, kwargs or {}, keyword

    def __call__(self, x: Any, **arguments: Any) -> Any:
        """The output for ``x``. ``arguments``, if there are any, take the place of all others of the call."""
        args, kwargs, keyword = self._args, self._kwargs, self._keyword
        if arguments:
            args, kwargs = (), arguments
        if self._below:
            top = self._below[-1]
            return top(x, Layer(self.module, top.site, self._below[:-1], args, kwargs, keyword))
        if keyword is None:
            return _base_forward(self.module, x, *args, **kwargs)
        return _base_forward(self.module, **{keyword: x}, **kwargs)

    def under(self, adapters: tuple[Adapter, ...]) -> "Layer":
        """What this gives under more adapters, the last of them on top."""
        return Layer(self.module, self.site, (*self._below, *adapters), self._args, self._kwargs, self._keyword)

    @property
    def below(self) -> tuple[Adapter, ...]:
        """The adapters that lie below, in the order of injection."""
        return self._below

    @property
    def is_base(self) -> bool:
        """Whether no other adapter lies below."""
        return not self._below

    @property
    def keyword(self) -> str | None:
        """The name under which the module was given ``x``; None if it was given without one."""
        return self._keyword

    def arguments(self) -> dict[str, Any]:
        """Name -> value of what the module was called with beside ``x``."""
        return dict(zip(self.module._parameter_names[1:], self._args, strict=False)) | self._kwargs

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in, ...), the adapters below included.

        Of a linear layer that another library keeps in codes, it takes a pass through the layer.

        Raises:
            AdapterError: it is in codes that cannot be read.
        """
        return effective(self.module, self.site, self._same_weight())[0]

    @property
    def bias(self) -> Tensor | None:
        """(d_out,) or None, the adapters below included."""
        if not self._same_weight() and self.site.bias:  # which needs no weight
            return whole(self.site.get(self.module)[1])
        return effective(self.module, self.site, self._same_weight())[1]

    def _same_weight(self) -> list[Adapter]:
        return [adapter for adapter in self._below if adapter.site.weight == self.site.weight]


def effective(module: nn.Module, site: Site, adapters: Iterable[Adapter]) -> tuple[Tensor, Tensor | None]:
    """Weight (output axis first) and bias of ``module`` with the change of each adapter applied in order."""
    weight, bias = values(module, site)
    for adapter in adapters:
        weight, bias = adapter.merged(weight, bias)
    return weight, bias


def values(module: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """Weight (output axis first) and bias of ``module`` in numbers: whole, and not in codes.

    Raises:
        AdapterError: they are in codes that cannot be read.
    """
    if not in_codes(module, site):
        weight, bias = map(whole, site.get(module))
        return weight, bias
    if site.kind != "linear" or linear_size(module) is None:
        raise AdapterError(f"{in_codes_because(module, site)} {CALL_IT}")
    return decoded(module, functools.partial(_base_forward, module) if is_slot(module) else module.forward)


def whole(tensor: Any) -> Any:
    """Put a sharded tensor (DTensor) together, for which all ranks have to call this; any other as it is.

    A sharded base is whole only while its forward runs.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def in_codes(module: nn.Module, site: Site) -> bool:
    """Whether another library quantised the weight, so that only the forward of its layer can read its values."""
    if not site.weight:
        return site.kind != "module"
    return holds_codes(module, site.weight)


def in_codes_because(module: nn.Module, site: Site) -> str:
    """What stands in the way of reading the weight, as a sentence."""
    weight = module._parameters[site.weight] if site.weight else None
    plain = type(weight) in (nn.Parameter, Tensor)
    form = "" if weight is None else f"{weight.dtype if plain else type(weight).__name__} "
    return (
        f"{base_class(module).__name__} keeps its {site.weight or 'weight'} in {form}codes that only its own forward "
        "can read."
    )


CALL_IT = "Use a method that calls the layer and no more, such as LoRA, or quantise with QLoRA."


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter of ``model`` is spread over ranks."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def active_adapters(module: Any, parameter: str) -> tuple[Adapter, ...]:
    """The adapters that change ``parameter`` of this module at present, in the order of injection."""
    active = set(module._active)
    return tuple(
        adapter
        for key, adapter in module._modules["adapters"].items()
        if key.partition(":")[0] in active and parameter in (adapter.site.weight, adapter.site.bias)
    )


class Adapters(nn.ModuleDict):
    """The child of a slot below which its adapters hang."""


STATE = ("_live", "_reads", "_active", "_called", "_dtype", "_calls", "_parameter_names")  # of a slot, in its __dict__


class Slot:
    """What a swapped class puts in front of the class that the module had."""

    _live: dict[tuple[str, bool], Tensor | None] | None  # (parameter, with a graph) -> value, while it is read
    _reads: list[Any]  # the slots whose effective values this forward sees
    _active: tuple[str, ...]  # names of the adapters that act
    _called: tuple[Adapter, ...]  # those of them that act when the module is called
    _dtype: torch.dtype | None  # of the last input, for layers that store no weight
    _calls: list[Any]  # the slots that this forward has to call, where it could hand their weights to a fused operation
    _parameter_names: tuple[str, ...]  # of its forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._called:
            return _base_forward(self, *args, **kwargs)
        keyword = None
        if not args:  # the input was given by keyword
            keyword, *others = kwargs
            args, kwargs = (kwargs[keyword],), {name: kwargs[name] for name in others}
        last = self._called[-1]
        return last(args[0], Layer(self, last.site, self._called[:-1], args[1:], kwargs, keyword))

    def train(self, mode: bool = True) -> Any:
        if mode and linear_size(self) is not None:  # type: ignore[arg-type]
            # bitsandbytes packs 4 bits for evaluation on a CPU so that no gradient passes, and takes it back to save
            self.state_dict()  # type: ignore[attr-defined]
        return super().train(mode)  # type: ignore[misc]


class SequentialSlot(Slot):
    """The same for ``nn.Sequential``, whose forward runs over its children."""

    _modules: dict[str, Any]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for name, module in self._modules.items() if name != "adapters"])

    def __len__(self) -> int:
        return len(self._modules) - ("adapters" in self._modules)


def _base_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward that the module had before, with the effective values visible to it that it reads."""
    # not by way of the class: torch.compile does not look into one that was allowed in its graph as a whole
    own = module.__dict__.get("_own_forward") or super(Slot, module).forward
    if module._calls and any(owner._called for owner in module._calls):
        own = functools.partial(_call_layers, module, own)
    if module._live is None and not module._reads:
        return own(*args, **kwargs)
    before = [(owner, owner._live) for owner in (module, *module._reads)]
    # its own effective value is hidden from a layer that is called, or the delta would count twice
    module._live = None
    module._dtype = next((x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    for owner in module._reads:
        owner._live = {}
    try:
        return own(*args, **kwargs)
    finally:
        for owner, live in before:
            owner._live = live


def _call_layers(module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What an encoder of torch answers when it does not use its fused operation."""
    # what it looks at before, in a way that torch.compile can follow
    fits = "use_nested_tensor" if isinstance(module, nn.TransformerEncoder) else "activation_relu_or_gelu"
    before = getattr(module, fits)
    setattr(module, fits, 0)
    try:
        return forward(*args, **kwargs)
    finally:
        setattr(module, fits, before)


def _effective_property(parameter: str) -> property:
    def value(self: Any) -> Tensor | None:
        raw, live = self._parameters[parameter], self._live
        if live is None:
            return raw
        graph = torch.is_grad_enabled()  # a value made without a graph must not serve where gradients are wanted
        if (parameter, graph) not in live:
            live[parameter, graph] = raw
            adapters = active_adapters(self, parameter)
            if adapters:
                site = adapters[-1].site
                stored = site.store(self, *effective(self, site, adapters), self._dtype)
                live.update({(name, graph): value for name, value in stored.items()})
        return live[parameter, graph]

    return property(value)


def _with_adapters(self: Any, *args: Any, **kwargs: Any) -> Any:
    state = super(Slot, self).state_dict(*args, **kwargs)
    if holds_adapters(self):
        into = {"destination": state} | kwargs
        self.adapters.state_dict(**into | {"prefix": f"{kwargs.get('prefix', '')}adapters."})
    return state


@functools.cache
def _slot_class(base: type[nn.Module], parameters: frozenset[str]) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any = None) -> tuple[Any, ...]:
        return _rebuild, (base, parameters), self.__getstate__()

    members: dict[str, Any] = {name: _effective_property(name) for name in parameters}
    if base.state_dict is not nn.Module.state_dict:  # it may write what it knows and no more
        members["state_dict"] = _with_adapters
    members |= {"_slot_base": base, "_slot_parameters": parameters}
    # str() of the class stays that of the base: transformers knows by it what a model can record (hidden states, say)
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__reduce_ex__": reduce}
    slot, name = SequentialSlot if issubclass(base, nn.Sequential) else Slot, f"Adapted{base.__name__}"
    if type(base) is type:
        return type(name, (slot, base), members)
    # below an abstract class, Python takes the swap for one of layouts unless the base is the first of the two
    return type("SlotFirst", (_SlotFirst, type(base)), {})(name, (base, slot), members)


class _SlotFirst(type):
    """Looks names up in the slot before the base, wherever it stands among the bases."""

    def mro(cls) -> list[type]:
        own, *others = super().mro()
        return [own, *(c for c in others if c in _SLOTS), *(c for c in others if c not in _SLOTS)]


_SLOTS = (SequentialSlot, Slot)


def _rebuild(base: type[nn.Module], parameters: frozenset[str]) -> nn.Module:
    cls = _slot_class(base, parameters)  # type: ignore[arg-type]  # mypy takes a class for unhashable here
    return cls.__new__(cls)


def is_slot(module: nn.Module) -> bool:
    """Whether the class of this module has been swapped."""
    return isinstance(module, Slot)


def holds_adapters(module: nn.Module) -> bool:
    """Whether adapters hang below this module; a slot may also be there only to let its forward read others."""
    return is_slot(module) and isinstance(module._modules.get("adapters"), Adapters)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before it was adapted."""
    return getattr(type(module), "_slot_base", type(module))


def _swap(module: nn.Module, *parameters: str | None) -> None:
    known: frozenset[str] = getattr(type(module), "_slot_parameters", frozenset())
    if not is_slot(module):
        names = tuple(inspect.signature(module.forward).parameters)
        module.__dict__.update(_live=None, _reads=[], _active=(), _called=(), _dtype=None)
        module.__dict__.update(_calls=[], _parameter_names=names)
        if "forward" in module.__dict__:  # somebody patched this instance: call that, do not lose it
            module.__dict__["_own_forward"] = module.__dict__.pop("forward")
    adapted = known.union(filter(None, parameters))
    module.__class__ = _slot_class(base_class(module), adapted)  # type: ignore[arg-type]  # mypy takes a class for unhashable here


def occupy(module: Any, name: str, adapter: Adapter) -> None:
    """Put ``adapter`` into the slot of ``module`` under ``name``, and let it act."""
    hang(module, name, adapter)
    if name not in module._active:
        module._active += (name,)
    if not adapter.site.read:
        module._called += (adapter,)


def hang(module: Any, name: str, adapter: Adapter) -> None:
    """The same, and it does not act yet."""
    site = adapter.site
    if not holds_adapters(module):
        module.add_module("adapters", Adapters())
    _swap(module, site.weight, site.bias)
    module.adapters[site.key(name)] = adapter
    adapter.train(module.training)
    if site.read and module not in module._reads:
        module._reads.append(module)


def named(module: Any, name: str) -> list[Adapter]:
    """The adapters of this name in this slot: one for each weight that it changes."""
    adapters = module.adapters._modules
    keys = name, *(f"{name}:{parameter}" for parameter in module._parameters)  # see `Site.key`
    return [adapters[key] for key in keys if key in adapters]


def set_active(module: Any, names: Iterable[str]) -> None:
    """Let the adapters of these names, and no others, act in this slot."""
    active = dict.fromkeys(names)
    module._active = tuple(active)
    module._called = tuple(
        adapter for key, adapter in module.adapters.items() if key.partition(":")[0] in active and not adapter.site.read
    )


def let_read(reader: Any, owner: nn.Module) -> None:
    """Let the forward of ``reader`` see the effective weights of ``owner``, a slot somewhere below it."""
    if not is_slot(reader):
        _swap(reader)
    if owner not in reader._reads:
        reader._reads.append(owner)


def let_call(encoder: Any, owner: nn.Module) -> None:
    """Let the forward of ``encoder`` call ``owner``, a slot below it, while an adapter acts in its calls.

    Else it could hand the weights of all its layers to a fused operation.
    """
    if not is_slot(encoder):
        _swap(encoder)
    if owner not in encoder._calls:
        encoder._calls.append(owner)


def vacate(module: nn.Module) -> nn.ModuleDict | None:
    """Give ``module`` its own class back; return the adapters it held, if any."""
    adapters = module._modules.pop("adapters") if holds_adapters(module) else None
    module.__class__ = base_class(module)
    if "_own_forward" in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop("_own_forward")
    for attribute in STATE:
        module.__dict__.pop(attribute, None)
    return adapters  # type: ignore[return-value]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` without what was injected: as fast with a thousand adapters as with one."""
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        name, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        below = [item for item in module._modules.items() if item[1] is not None and not isinstance(item[1], Adapters)]
        todo += [(f"{name}.{key}" if name else key, child) for key, child in reversed(below)]  # type: ignore[misc]


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module below ``model`` that holds adapters."""
    for name, module in base_modules(model):
        if holds_adapters(module):
            yield name, module


# what torch.compile and others put between a module and its name
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def plain_name(name: str) -> str:
    """``name`` of a module or parameter as it is when nothing is compiled or wrapped: what people and files call it.

    >>> plain_name("_orig_mod.layers.0._orig_mod.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def adapters_of(model: nn.Module, name: str | None = None) -> list[tuple[str, nn.Module, Adapter]]:
    """(plain module name, module, adapter) of every adapter below ``model``; of one adapter name if it is given."""
    return [
        (plain_name(path), module, adapter)
        for path, module in slots(model)
        for adapter in (module.adapters.values() if name is None else named(module, name))  # type: ignore[operator]
    ]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that is not an adapter's; a tied one once."""
    return _each_once(
        (f"{path}.{name}".lstrip("."), parameter)
        for path, module in base_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    )


def base_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer of all that is saved and is not an adapter's; without codes, which nothing changes."""
    return _each_once(
        (f"{path}.{name}".lstrip("."), buffer)
        for path, module in base_modules(model)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set and linear_size(module) is None
    )


def _each_once(named: Iterable[tuple[str, TensorT]]) -> dict[str, TensorT]:
    first: dict[int, tuple[str, TensorT]] = {}
    for name, tensor in named:
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def _channels(module: nn.Module) -> Any:
    shape = getattr(module, "normalized_shape", None)
    return shape if shape is not None else getattr(module, "num_features", None) or module.num_channels


def _device(module: nn.Module) -> torch.device | None:
    return next((t.device for t in (*module.parameters(), *module.buffers())), None)
