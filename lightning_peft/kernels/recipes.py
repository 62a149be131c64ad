"""Recipes: how an output is made again from what its operation saves for its backward pass anyway.

A norm saves its input, a gate both of its inputs. Whoever needs the output in its own backward pass (the low-rank
product behind a norm) takes the recipe in its place, so that nothing more is saved: `leave` hangs it on the output,
`keep` finds it there.

Under ``torch.compile``, whose partitioner decides by itself what is computed again, nothing is left.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Recipe:
    """``make(*inputs)`` gives the output again, bit for bit.

    What is made is kept until all who asked for it have used it: the three products behind one norm make it once.
    """

    def __init__(self, make: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], version: int) -> None:
        self.make, self.inputs, self.version = make, inputs, version
        self.users = self.used = 0
        self.made: Tensor | None = None

    def output(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        """The output, from the saved ``inputs``."""
        made = self.made if self.made is not None else self.make(*inputs)
        self.used += 1
        self.made = made if self.used < self.users else None
        return made


def leave(output: Tensor, make: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Hang the recipe on ``output``, and return it. ``make`` and ``inputs`` must not hold ``output`` itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        output.recipe = Recipe(make, inputs, output._version)  # type: ignore[attr-defined]
    return output


def keep(ctx: Any, x: Tensor | None, *others: Tensor | None) -> None:
    """Save ``others`` and ``x``, or what they are made from; `kept` brings them back."""
    ctx.recipes, saved = [], list[Tensor | None]()
    for each in (*others, x):
        recipe = getattr(each, "recipe", None)
        if each is None or recipe is None or recipe.version != each._version:  # it was changed in place since
            recipe, inputs = None, (each,)
        else:
            recipe.users += 1
            inputs = recipe.inputs
        ctx.recipes.append((recipe, len(inputs)))
        saved += inputs
    ctx.save_for_backward(*saved)


def kept(ctx: Any) -> tuple[Any, ...]:
    """What `keep` saved: the others, then ``x``."""
    saved = iter(ctx.saved_tensors)  # once: a checkpoint computes again for each time that it is asked
    given = [(recipe, tuple(itertools.islice(saved, n))) for recipe, n in ctx.recipes]
    return tuple(inputs[0] if recipe is None else recipe.output(inputs) for recipe, inputs in given)


class AttentionFollowed(TorchFunctionMode):
    """While it lasts, what is rearranged from the output of an attention keeps a recipe: attention saves its output."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None
        self.last: Tensor | None = None
        self.steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.output, self.last, self.steps = y, y, ()
        elif func in _REARRANGES and args and args[0] is self.last and y is not self.last:
            rest = args[1:]
            self.steps, self.last = (*self.steps, lambda t: func(t, *rest, **(kwargs or {}))), y
            leave(y, functools.partial(_rearranged, self.steps), self.output)
        return y


_REARRANGES = {Tensor.transpose, Tensor.permute, Tensor.reshape, Tensor.view, Tensor.flatten, Tensor.contiguous}
_REARRANGES |= {torch.transpose, torch.permute, torch.reshape, torch.flatten}


def _rearranged(steps: tuple[Callable[[Tensor], Tensor], ...], output: Tensor) -> Tensor:
    for step in steps:
        output = step(output)
    return output
