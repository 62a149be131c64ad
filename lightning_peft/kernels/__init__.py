"""Fast operations: of each the formula, a twin in plain PyTorch, and a Triton kernel for accelerators."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deferred_logits import deferred_linear as deferred_linear
    from .dora_norm import dora_norm as dora_norm
    from .gates import geglu as geglu
    from .gates import swiglu as swiglu
    from .layer_norm import layer_norm as layer_norm
    from .layer_norm import modulated_layer_norm as modulated_layer_norm
    from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from .lora_linear import lora_linear as lora_linear
    from .lora_linear import lora_product as lora_product
    from .mixture_lora import mixture_lora as mixture_lora
    from .nf4 import Packed as Packed
    from .nf4 import nf4_pack as nf4_pack
    from .nf4 import nf4_unpack as nf4_unpack
    from .nf4_linear import nf4_linear as nf4_linear
    from .rms_norm import rms_norm as rms_norm
    from .rope import rope as rope
    from .scale_shift import scale_shift as scale_shift
    from .segment_lora import segment_lora as segment_lora
    from .sparse_conv import conv_with_entries as conv_with_entries
    from .sparse_grad import linear_with_columns as linear_with_columns
    from .sparse_grad import linear_with_entries as linear_with_entries
    from .sparse_grad import linear_with_rows as linear_with_rows

# file -> the operations in it, which are registered with torch when somebody asks for one of them
_FILES = {
    "deferred_logits": ("deferred_linear",),
    "dora_norm": ("dora_norm",),
    "gates": ("geglu", "swiglu"),
    "layer_norm": ("layer_norm", "modulated_layer_norm"),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "lora_linear": ("lora_linear", "lora_product"),
    "mixture_lora": ("mixture_lora",),
    "nf4": ("Packed", "nf4_pack", "nf4_unpack"),
    "nf4_linear": ("nf4_linear",),
    "rms_norm": ("rms_norm",),
    "rope": ("rope",),
    "scale_shift": ("scale_shift",),
    "segment_lora": ("segment_lora",),
    "sparse_conv": ("conv_with_entries",),
    "sparse_grad": ("linear_with_columns", "linear_with_entries", "linear_with_rows"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


class _Operations(ModuleType):
    """This package: files are loaded on demand, and an operation goes before the file of the same name."""

    def __getattr__(self, name: str) -> Any:
        if name not in _FILE_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{self.__name__}.{_FILE_OF[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Python hangs each file that is imported on its package
        super().__setattr__(name, getattr(value, name) if name in _FILE_OF and isinstance(value, ModuleType) else value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_FILE_OF})


sys.modules[__name__].__class__ = _Operations
