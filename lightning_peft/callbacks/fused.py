"""Norms, gates and activations of a model, computed by our operations while it trains.

They save less for the backward pass than the model's own, and leave recipes, so that the low-rank products behind them
save no input. Only exact types are replaced, whose forward is known to be the same function: a subclass may do more.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine.slots import is_slot
from lightning_peft.kernels import geglu, layer_norm, rms_norm, swiglu
from lightning_peft.kernels.recipes import leave

Forward = Callable[[Any, Tensor], Tensor]


def _layer_norm(self: Any, x: Tensor) -> Tensor:
    return layer_norm(x, self.weight, self.bias, self.eps)


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)


def _llama_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gemma_norm(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, self.weight, self.eps, offset=1.0)


def _silu_gate(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _gelu_gate(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


def _gelu(self: Any, x: Tensor) -> Tensor:
    return leave(F.gelu(x), F.gelu, x)


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_by_tanh(self: Any, x: Tensor) -> Tensor:
    return leave(_tanh_gelu(x), _tanh_gelu, x)


def _names(kind: str, *models: str) -> list[str]:
    return [f"transformers.models.{m.lower()}.modeling_{m.lower()}.{m}{kind}" for m in models]


_LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3")
_TYPES: dict[str, Forward] = {
    "torch.nn.modules.normalization.LayerNorm": _layer_norm,
    "timm.layers.norm.LayerNorm": _layer_norm,
    "torch.nn.modules.normalization.RMSNorm": _rms_norm,
    **dict.fromkeys(_names("RMSNorm", *_LLAMA_LIKE), _llama_norm),
    **dict.fromkeys(_names("RMSNorm", "Gemma"), _gemma_norm),
    "transformers.activations.GELUActivation": _gelu,
    "transformers.activations.PytorchGELUTanh": _gelu_by_tanh,
}
_GATED = _names("MLP", *_LLAMA_LIKE, "Gemma")


@contextmanager
def fused(model: nn.Module) -> Iterator[Counter[str]]:
    """While it lasts, the modules of ``model`` that can be are computed by our operations; says how many of which."""
    replaced: Counter[str] = Counter()
    touched: list[nn.Module] = []
    for module in model.modules():
        forward = _forward_for(module)
        # an adapted norm, and one whose forward somebody replaced, stay as they are
        if forward is not None and not is_slot(module) and "forward" not in module.__dict__:
            module.__dict__["forward"] = MethodType(forward, module)
            touched.append(module)
            replaced[type(module).__name__] += 1
    try:
        yield replaced
    finally:
        for module in touched:
            module.__dict__.pop("forward", None)


def _forward_for(module: Any) -> Forward | None:
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    forward = _TYPES.get(name)
    if forward in (_layer_norm, _rms_norm) and len(module.normalized_shape) > 1:
        return None
    if name == "torch.nn.modules.activation.GELU":
        return _gelu if module.approximate == "none" else _gelu_by_tanh
    if name in _GATED:
        return {"silu": _silu_gate, "gelu_pytorch_tanh": _gelu_gate}.get(module.config.hidden_act)
    return forward
