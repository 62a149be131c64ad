"""Norms, gates, activations, rotations and the logits of a model, computed by our operations while it trains.

They save less for the backward pass than the model's own, and leave recipes, so that the low-rank products behind them
save no input. Only exact types are replaced, whose forward is known to be the same function: a subclass may do more.
Attentions stay as they are; it is noted what is made of their outputs.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine.slots import is_sharded, is_slot
from lightning_peft.engine.targets import output_head
from lightning_peft.kernels import deferred_linear, geglu, layer_norm, rms_norm, rope, swiglu
from lightning_peft.kernels.recipes import AttentionFollowed, leave

Forward = Callable[..., Any]
# a head whose logits are this many times as wide as its input is worth deferring
WIDE = 4


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


def _gelu_half(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    up, gate = self.proj(hidden_states).chunk(2, dim=-1)
    return geglu(gate, up, approximate="none")


def _followed(self: Any, *args: Any, **kwargs: Any) -> Any:
    own = type(self).forward
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return own(self, *args, **kwargs)
    with AttentionFollowed():
        return own(self, *args, **kwargs)


def _head(self: Any, x: Tensor) -> Tensor:
    return deferred_linear(x, self.weight, self.bias)


def _rotary(own: Forward, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """In the place of ``apply_rotary_pos_emb``, which is ``own``."""
    plain = unsqueeze_dim == 1 and q.dtype == k.dtype == cos.dtype  # else the result is in the wider dtype
    return rope(q, k, cos, sin) if plain else own(q, k, cos, sin, unsqueeze_dim)


def _names(kind: str, *models: str) -> list[str]:
    return [f"transformers.models.{m.lower()}.modeling_{m.lower()}.{m}{kind}" for m in models]


_LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3")
_TYPES: dict[str, Forward] = {
    "torch.nn.modules.normalization.LayerNorm": _layer_norm,
    "timm.layers.norm.LayerNorm": _layer_norm,
    "torch.nn.modules.normalization.RMSNorm": _rms_norm,
    **dict.fromkeys(_names("RMSNorm", *_LLAMA_LIKE), _llama_norm),
    **dict.fromkeys(_names("RMSNorm", "Gemma"), _gemma_norm),
    "diffusers.models.activations.GEGLU": _gelu_half,
    "transformers.activations.GELUActivation": _gelu,
    "transformers.activations.PytorchGELUTanh": _gelu_by_tanh,
}
_GATED = _names("MLP", *_LLAMA_LIKE, "Gemma")


_ROTATED = [f"transformers.models.{m.lower()}.modeling_{m.lower()}" for m in (*_LLAMA_LIKE, "Gemma")]


@contextmanager
def fused(model: nn.Module) -> Iterator[Counter[str]]:
    """While it lasts, the modules of ``model`` that can be are computed by our operations; says how many of which."""
    replaced: Counter[str] = Counter()
    with ExitStack() as undo:
        for module, forward in _forwards(model):
            # an adapted norm, and one whose forward somebody replaced, stay as they are
            if not is_slot(module) and "forward" not in module.__dict__:
                module.__dict__["forward"] = MethodType(forward, module)
                undo.callback(module.__dict__.pop, "forward", None)
                replaced["logits" if forward is _head else type(module).__name__] += forward is not _followed
        # rotations are functions of a module of transformers, the same for all models of a family
        for name in {type(module).__module__ for module in model.modules()}.intersection(_ROTATED):
            family: Any = sys.modules[name]
            own = family.apply_rotary_pos_emb
            if not isinstance(own, functools.partial):
                undo.callback(setattr, family, "apply_rotary_pos_emb", own)
                family.apply_rotary_pos_emb = functools.partial(_rotary, own)
        yield +replaced


def _forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    for module in model.modules():
        forward = _forward_for(module)
        if forward is not None:
            yield module, forward
    name = output_head(model)
    head: Any = model if name is None else model.get_submodule(name)
    # hooks may want to see logits, and a sharded weight is whole in the forward of its module alone
    seen = head._forward_hooks or head._forward_pre_hooks
    wide = type(head) is nn.Linear and head.out_features >= WIDE * head.in_features
    if wide and not seen and not is_sharded(model):
        yield head, _head


def _forward_for(module: Any) -> Forward | None:
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    forward = _TYPES.get(name)
    if forward in (_layer_norm, _rms_norm) and len(module.normalized_shape) > 1:
        return None
    if name == "torch.nn.modules.activation.GELU":
        return _gelu if module.approximate == "none" else _gelu_by_tanh
    if name in _GATED:
        return {"silu": _silu_gate, "gelu_pytorch_tanh": _gelu_gate}.get(module.config.hidden_act)
    if forward is None and "Attention" in type(module).__name__:
        return _followed
    return forward
