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

from lightning_peft import kernels
from lightning_peft.engine.slots import is_sharded, is_slot
from lightning_peft.engine.targets import output_head
from lightning_peft.kernels.backend import runs_triton
from lightning_peft.kernels.recipes import AttentionFollowed, leave

Forward = Callable[..., Any]
# a head whose logits are this many times as wide as its input is worth deferring
WIDE = 4


def _layer_norm(self: Any, x: Tensor) -> Tensor:
    if runs_triton(x):
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)
    # torch's own saves as little, in one pass
    again = functools.partial(_own_layer_norm, self.eps)
    return leave(again(x, self.weight, self.bias), again, x, self.weight, self.bias)


def _own_layer_norm(eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return kernels.rms_norm(x, self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)


def _llama_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gemma_norm(self: Any, x: Tensor) -> Tensor:
    return kernels.rms_norm(x, self.weight, self.eps, offset=1.0)


def _gate(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    activation = _ACTIVATIONS[_name(self.act_fn)]
    if activation is F.silu:
        return self.down_proj(kernels.swiglu(gate, up))
    return self.down_proj(kernels.geglu(gate, up, approximate="tanh" if activation is _tanh_gelu else "none"))


def _gelu_half(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    up, gate = self.proj(hidden_states).chunk(2, dim=-1)
    return kernels.geglu(gate, up, approximate="none")


def _gelu_behind(self: Any, hidden_states: Tensor) -> Tensor:
    return _recalled(self.proj(hidden_states), _tanh_gelu if self.approximate == "tanh" else F.gelu)


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _recalled(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    return leave(activation(x), activation, x)


def _activation(self: Any, x: Tensor) -> Tensor:
    return _recalled(x, _ACTIVATIONS[_name(self)])


def _gelu(self: Any, x: Tensor) -> Tensor:
    return _recalled(x, F.gelu if self.approximate == "none" else _tanh_gelu)


def _followed(self: Any, *args: Any, **kwargs: Any) -> Any:
    own = type(self).forward
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return own(self, *args, **kwargs)
    with AttentionFollowed():
        return own(self, *args, **kwargs)


def _head(self: Any, x: Tensor) -> Tensor:
    return kernels.deferred_linear(x, self.weight, self.bias)


def _rotary(own: Forward, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """In the place of ``apply_rotary_pos_emb``, which is ``own``."""
    plain = unsqueeze_dim == 1 and q.dtype == k.dtype == cos.dtype  # else the result is in the wider dtype
    return kernels.rope(q, k, cos, sin) if plain else own(q, k, cos, sin, unsqueeze_dim)


def _names(kind: str, *models: str) -> list[str]:
    return [f"transformers.models.{m.lower()}.modeling_{m.lower()}.{m}{kind}" for m in models]


_LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3")
_GEMMA_LIKE = ("Gemma", "Gemma2", "Gemma3")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.nn.modules.activation.SiLU": F.silu,
    "transformers.activations.SiLUActivation": F.silu,
    "transformers.activations.GELUActivation": F.gelu,
    "transformers.activations.GELUTanh": _tanh_gelu,
    # the same formula, spelled out
    "transformers.activations.NewGELUActivation": _tanh_gelu,
    "transformers.activations.FastGELUActivation": _tanh_gelu,
}
_TYPES: dict[str, Forward] = {
    "torch.nn.modules.normalization.LayerNorm": _layer_norm,
    "timm.layers.norm.LayerNorm": _layer_norm,
    "torch.nn.modules.normalization.RMSNorm": _rms_norm,
    **dict.fromkeys(_names("RMSNorm", *_LLAMA_LIKE), _llama_norm),
    **dict.fromkeys(_names("RMSNorm", *_GEMMA_LIKE), _gemma_norm),
    **dict.fromkeys(_names("MLP", *_LLAMA_LIKE, *_GEMMA_LIKE), _gate),
    "torch.nn.modules.activation.GELU": _gelu,
    **dict.fromkeys(_ACTIVATIONS, _activation),
    "diffusers.models.activations.GELU": _gelu_behind,
    "diffusers.models.activations.GEGLU": _gelu_half,
}
_ROTATED = [f"transformers.models.{m.lower()}.modeling_{m.lower()}" for m in (*_LLAMA_LIKE, *_GEMMA_LIKE)]


@contextmanager
def fused(model: nn.Module) -> Iterator[Counter[str]]:
    """While it lasts, the modules of ``model`` that can be are computed by our operations; says how many of which.

    Where no kernel runs, only what keeps less for the backward pass is replaced: rotations and attentions, of which
    plain PyTorch keeps as little there, stay as they are.
    """
    replaced: Counter[str] = Counter()
    kernels_run = any(runs_triton(p) for p in model.parameters())
    with ExitStack() as undo:
        for module, forward in _forwards(model):
            # an adapted norm, and one whose forward somebody replaced, stay as they are
            left = forward is _followed and not kernels_run
            if not (left or is_slot(module) or "forward" in module.__dict__):
                module.__dict__["forward"] = MethodType(forward, module)
                undo.callback(module.__dict__.pop, "forward", None)
                replaced["logits" if forward is _head else type(module).__name__] += forward is not _followed
        # rotations are functions of a module of transformers, the same for all models of a family
        rotated = {type(module).__module__ for module in model.modules()}.intersection(_ROTATED)
        for name in rotated if kernels_run else ():
            family: Any = sys.modules[name]
            own = family.apply_rotary_pos_emb
            if not isinstance(own, functools.partial):
                undo.callback(setattr, family, "apply_rotary_pos_emb", own)
                family.apply_rotary_pos_emb = functools.partial(_rotary, own)
        yield +replaced


def _forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    found = [(module, forward) for module in model.modules() if (forward := _forward_for(module)) is not None]
    in_gates = {id(module.act_fn) for module, forward in found if forward is _gate}
    yield from ((module, forward) for module, forward in found if id(module) not in in_gates)
    name = output_head(model)
    head: Any = model if name is None else model.get_submodule(name)
    # hooks may want to see logits, and a sharded weight is whole in the forward of its module alone
    seen = head._forward_hooks or head._forward_pre_hooks
    wide = type(head) is nn.Linear and head.out_features >= WIDE * head.in_features
    if wide and not seen and not is_sharded(model):
        yield head, _head


def _forward_for(module: Any) -> Forward | None:
    forward = _TYPES.get(_name(module))
    if forward is None and "Attention" in type(module).__name__:
        return _followed
    if forward in (_layer_norm, _rms_norm) and len(module.normalized_shape) > 1:
        return None
    if forward is _gate and _name(module.act_fn) not in _ACTIVATIONS:
        return None
    return None if getattr(module, "inplace", False) else forward


def _name(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
