"""What a model is given beside its input (a text, a step, an image), and the parts that look at it.

Whatever is made of it where the model is called goes on to these parts as an argument, in the dictionary that models
of diffusers hand through to their attentions. So nothing is remembered between calls: an activation checkpoint gives
a part its arguments again, whatever the model was called with since.
"""

from typing import Any

from torch import nn

from lightning_peft.engine import Layer
from lightning_peft.engine.targets import base_modules, is_below
from lightning_peft.parts.attention import find_attentions, is_cross
from lightning_peft.parts.tokens import parameters_of

TEXT = "encoder_hidden_states"

# names of the dictionary that is handed through to all attentions
THROUGH = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def takes(module: nn.Module, *names: str) -> bool:
    """Whether the forward of ``module`` has parameters of all these names."""
    try:
        return set(names) <= set(parameters_of(module))
    except ValueError:  # a forward without a signature, such as a compiled one
        return False


def handed_through(module: nn.Module) -> str | None:
    """Under which name ``module`` takes what it hands through to its attentions; None if it does not."""
    return next((name for name in THROUGH if takes(module, name)), None)


def entries(model: nn.Module, *names: str) -> list[str]:
    """Names of the outermost modules of ``model`` that hand through and whose forward takes all of ``names``."""
    found: list[str] = []
    for name, module in base_modules(model):
        inside = any(not outer or is_below(name, outer) for outer in found)
        if not inside and takes(module, *names) and handed_through(module):
            found.append(name)
    return found


def cross_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of the attentions in ``model`` that look at another sequence, as far as they tell."""
    found = find_attentions(model).items()
    # one that says of itself that it does not may still have the name of one that does
    return {n: m for n, m in found if is_cross(n, m) and getattr(m, "is_cross_attention", None) is not False}


def given_to(x: Any, layer: Layer) -> dict[str, Any]:
    """Name -> value of all that a module was called with."""
    return {layer.keyword or layer.module._parameter_names[0]: x} | layer.arguments()


def call_with(layer: Layer, given: dict[str, Any]) -> Any:
    """What ``layer`` answers, called with ``given``, as `given_to` puts it."""
    first = layer.keyword or layer.module._parameter_names[0]
    return layer(given[first], **{name: value for name, value in given.items() if name != first})
