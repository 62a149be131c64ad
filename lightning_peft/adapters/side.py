"""Side networks: taps that keep what the blocks of a frozen model answer, and an exit where a small network answers.

The blocks run without a graph, so the model is never back-propagated through. The exit, the last of the blocks, holds
all that trains: it takes what the taps have kept and changes what its own block answers; the rest of the model (the
last norm, the head) follows as ever, with gradients.
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.small_nets import Part
from lightning_peft.engine import Adapter, AdapterError, Layer, MethodWithHead, Target, TargetError
from lightning_peft.engine.limits import Patterns
from lightning_peft.parts.caches import tokens_in
from lightning_peft.parts.layout import Entered, entered, from_last, own_of, own_place, resample, to_last, with_own
from lightning_peft.parts.taps import Tap, blocks_to_tap, is_causal, taps_of


class Stash:
    """What the adapters of one injection hand to each other within one forward; a copy of it is empty."""

    def __init__(self) -> None:
        self.entered: Entered | None = None
        self.taps: dict[int, Tensor] = {}  # by index; -1 is the input of the first
        self.extra: dict[str, Tensor] = {}  # what else a method hands on
        self.replaced: list[tuple[Tensor, Tensor]] = []  # what exits answered, and what their blocks did
        # by the input of the last exit: what a forward had, as long as its graph lives
        self.before: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Stash, ()

    def clear(self) -> None:
        """Let go of all."""
        self.entered, self.taps, self.extra, self.replaced = None, {}, {}, []

    def own(self, x: Any) -> Any:
        """``x``, or what the block behind it answered, where an exit has changed it: blocks see their own model."""
        for changed, raw in self.replaced:
            if x is changed:
                return raw
        return x


@dataclass(eq=False)
class Kept:
    """What an exit works with.

    Args:
        x: the input of its block.
        taps: what the blocks answered, by index, as they did; -1 is the input of the first.
        entered: what the model was given.
        extra: what else was handed on.
    """

    x: Any
    taps: dict[int, Tensor]
    entered: Entered
    extra: dict[str, Tensor]


class Quiet(Adapter):
    """Runs its module without a graph, and keeps what it answers for the exit.

    Where something inside of the module trains, or another adapter lies below, it runs as it is called: what others
    train gets its gradients, and the memory is theirs. Gradients of what lies before the module end here.
    """

    def __init__(self, target: Tap, stash: Stash, method: "SideMethod") -> None:
        super().__init__()
        self.stash, self.who, self.attends = stash, type(method).__name__, method.attends
        self.name, self.index, self.first, self.enters = target.name, target.index, target.first, target.enters
        self.widths, self.place = (target.width_in, target.d_out), own_place(target.module)

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the module answers."""
        return self.tapped(x, layer)

    def tapped(self, x: Any, layer: Layer) -> Any:
        """The same, kept."""
        stash = self.stash
        if self.enters:
            stash.clear()
        given, x = x, stash.own(x)
        if stash.replaced and x is given and x.requires_grad and self.is_quiet(layer):
            raise AdapterError(
                f"{self.who}: what an exit answered was changed before it came to {self.name!r}, which should see the "
                "features of the model as it was. Name modules that hand on to each other directly in taps."
            )
        if self.index == 0:
            self.check_cache(layer)
            stash.taps[-1] = x
        y = self.run(x, layer)
        features = own_of(y, self.place)
        if self.enters:
            stash.entered = entered(x, features, layer.module)
        if self.index >= 0:
            axis, shape = 1 if self.first else -1, getattr(features, "shape", ())
            if len(shape) < 3 or shape[axis] != self.widths[1]:
                raise AdapterError(
                    f"{self.who}: {self.name!r} answered {tuple(shape) or type(features).__name__}; expected "
                    f"{self.widths[1]} features on axis {axis}. Name other modules in taps: blocks that answer tokens "
                    "(B, N, C) or maps."
                )
            stash.taps[self.index] = features
        return y

    def is_quiet(self, layer: Layer) -> bool:
        """Whether nothing trains below."""
        return layer.is_base and not _trains(layer.module)

    def run(self, x: Any, layer: Layer) -> Any:
        """Call the module."""
        with torch.no_grad() if self.is_quiet(layer) else nullcontext():
            return layer(x)

    def check_cache(self, layer: Layer) -> None:
        """Refuse earlier tokens that only the model's own attention would see."""
        for value in layer.arguments().values() if self.attends else ():
            if hasattr(value, "get_seq_length") and tokens_in(value, self.who) > 0:
                raise AdapterError(
                    f"{self.who}: {self.name!r} was given a cache of earlier tokens, which the side network does not "
                    "have. Generate with use_cache=False."
                )


class Exit(Quiet):
    """The last of the taps. Subclasses hold the side network, and answer with it in `side`."""

    def __init__(self, target: Tap, stash: Stash, method: Any, targets: Sequence[Tap]) -> None:
        super().__init__(target, stash, method)
        self.causal = is_causal(target.module) if method.causal is None else method.causal
        self.names = {t.index: t.name for t in targets if 0 <= t.index <= target.index}
        self.firsts = {t.index: t.first for t in targets if t.index >= 0}
        self.firsts[-1] = self.firsts[0]
        self.last = max(self.firsts) == target.index
        self.entry_name = next(t.name for t in targets if t.enters)

    def side(self, y: Tensor, kept: "Kept", layer: Layer) -> Tensor:
        """The features (B, ..., C) to answer with in the place of those of the block, ``y``, channels last.

        Or ``y`` itself, if what it made is left in ``self.stash.extra["side"]`` for a later exit.
        """
        raise NotImplementedError

    def reset_parameters(self, layer: Layer, generator: torch.Generator) -> None:
        """Fill the parts of the side network."""
        for part in self.modules():
            if isinstance(part, Part):
                part.fill(generator)

    def forward(self, x: Any, layer: Layer) -> Any:
        """What the side network answers, in the form in which the block does."""
        stash = self.stash
        answer = self.tapped(x, layer)
        raw = own_of(answer, self.place)
        # an activation checkpoint runs this block again, and not those whose answers have no graph
        before = None if torch.compiler.is_compiling() or self.enters else stash.before.get(id(x))
        taps, given, extra = stash.taps, stash.entered, stash.extra
        if before is not None:  # what is in the stash may be of another forward
            taps, given, extra = taps | before.taps, before.entered, extra | before.extra
        absent = [name for index, name in self.names.items() if index not in taps]
        missing = dict.fromkeys([*([self.entry_name] if given is None else []), *absent])
        if missing:
            raise AdapterError(
                f"{self.who}: {', '.join(map(repr, missing))} was not called before {self.name!r}. Give the model its "
                "usual inputs (no inputs_embeds), name only blocks that are always called, in the order of their calls "
                "(taps=), and let activation checkpoints be of the kind use_reentrant=False, or leave them off: the "
                "blocks keep nothing here."
            )
        kept = Kept(x, dict(taps), given, dict(extra))  # type: ignore[arg-type]  # it was not missing
        try:
            y = to_last(raw, self.first)
            changed = self.side(y, kept, layer)
        finally:
            if self.last:
                stash.clear()
        handed_on = changed is y  # what it made goes to a later exit
        features = stash.extra["side"] if handed_on else from_last(changed, self.first).to(raw.dtype)
        if not torch.compiler.is_compiling() and features.grad_fn is not None:
            metadata: Any = features.grad_fn.metadata
            metadata["lightning_peft"] = kept
            stash.before[id(x)] = kept
        if handed_on:
            return answer
        if not self.last:
            stash.replaced.append((features, raw))
        return with_own(answer, self.place, features)

    def tap(self, kept: Kept, index: int, like: Tensor) -> Tensor:
        """What block ``index`` answered, (B, ..., C), in the precision of ``like``."""
        return to_last(kept.taps[index], self.firsts[index]).to(like.dtype)


def _trains(module: nn.Module) -> bool:
    children = (child.parameters() for key, child in module._modules.items() if child is not None and key != "adapters")
    own = (p for p in module._parameters.values() if p is not None)
    return any(p.requires_grad for p in own) or any(p.requires_grad for each in children for p in each)


def visible(layer: Layer, h: Tensor, causal: bool, who: str) -> Tensor | None:
    """Which tokens see which, (B, 1, N, N) or (1, 1, N, N); None if all see all.

    Taken from the masks that the block was called with; of several heads, what all see. A token sees itself always.

    Raises:
        AdapterError: the mask is for another number of tokens.
    """
    n, seen = h.shape[1], None
    for name, mask in layer.arguments().items():
        if not isinstance(mask, Tensor) or "mask" not in name or name.startswith(("encoder_", "memory_")):
            continue
        of_keys = "key_padding" in name
        of_torch = of_keys or name.startswith(("src_", "tgt_"))  # whose True is what is not seen
        if mask.is_floating_point():
            allowed = mask > torch.finfo(mask.dtype).min / 2
        else:
            allowed = mask.logical_not() if of_torch else mask.bool()
        if allowed.shape[-1] != n:
            raise AdapterError(
                f"{who}: {name!r} is a mask for {allowed.shape[-1]} tokens, and there are {n}. A side network has no "
                "cache of earlier tokens: generate with use_cache=False."
            )
        if allowed.dim() == 2:
            allowed = allowed[None, None] if of_torch and not of_keys else allowed[:, None, None]
        elif allowed.dim() == 3:  # with one for each sample, or for each sample and head
            allowed = allowed.unflatten(0, (len(h), -1))
        seen = allowed if seen is None else seen & allowed
    if causal or layer.arguments().get("is_causal") is True:
        past = torch.ones(1, 1, n, n, dtype=torch.bool, device=h.device).tril()
        seen = past if seen is None else seen & past
    return None if seen is None else seen.all(1, keepdim=True) | torch.eye(n, dtype=torch.bool, device=h.device)


def alike(h: Tensor, y: Tensor, adapter: Exit) -> Tensor:
    """``h`` (B, ..., C) at the size of ``y``: maps are averaged, or interpolated; tokens have to be as many.

    Raises:
        AdapterError: they are not.
    """
    if h.shape[1:-1] == y.shape[1:-1]:
        return h
    if h.dim() == 3 or y.dim() == 3:
        raise AdapterError(
            f"{adapter.who}: at {adapter.name!r} there are {tuple(y.shape[1:-1])} tokens, and an earlier tap had "
            f"{tuple(h.shape[1:-1])}. Name blocks that keep the number of tokens, those of one stage, in taps."
        )
    return resample(h.movedim(-1, 1), tuple(y.shape[1:-1])).movedim(1, -1)


def check_widths(targets: Sequence[Target], method: Any) -> None:
    """Raise a `TargetError` if D / r of one of ``targets`` is less than 2."""
    for target in targets:
        if method.width(target) < 2:
            raise TargetError(
                f"{type(method).__name__}: r={method.r} leaves {method.width(target)} of the {target.d_out} features "
                f"of {target.name!r}. Choose a smaller r, so that the side network is at least 2 wide."
            )


@dataclass(frozen=True, kw_only=True)
class SideMethod(MethodWithHead):
    """A method that trains a network beside the model, fed by the answers of its blocks.

    Args:
        taps: the blocks that feed it, by default all: the path of their list, or patterns of single blocks, in the
            order of their calls. The last is where the side network answers.
        causal: whether tokens look back alone, as in language models; by default as the attention in the blocks says
            of itself, or else whether they keep a cache. Where a model of your own does not say, this does.
        modules_to_save: modules trained whole.
    """

    tap_type: ClassVar[type[Quiet]] = Quiet
    attends: ClassVar[bool] = False  # whether the side network looks from one token to another
    acts_on: ClassVar = "blocks"
    mergeable: ClassVar[bool] = False

    taps: Patterns | None = None
    causal: bool | None = None
    modules_to_save: Patterns = "output-head"

    def targets(self, model: nn.Module) -> list[Target]:
        """The blocks."""
        who = type(self).__name__
        return [*taps_of(model, blocks_to_tap(model, self.taps, who), who)]

    def adapters(self, targets: list[Target]) -> list[Adapter]:
        """The side network at the last block, or at several, and taps at the others."""
        taps = [t for t in targets if isinstance(t, Tap)]
        if taps and len(taps) != taps[0].count:
            raise TargetError(
                f"{type(self).__name__}: {taps[0].count - len(taps)} of {taps[0].count} modules to tap were adapted "
                "before, when the others were not built yet. Build all blocks in one place (configure_model), or "
                "unload the model first."
            )
        stash = Stash()
        return [self.exit(t, stash, taps) if t.role == "exit" else self.tap_type(t, stash, self) for t in taps]

    def exit(self, target: Tap, stash: Stash, targets: list[Tap]) -> Adapter:
        """The side network at ``target``, one of ``targets``."""
        return self.adapter_types["module"](target, stash, self, targets)
