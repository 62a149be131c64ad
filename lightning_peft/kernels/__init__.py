"""Fast operations, one file each: the formula, a twin in plain PyTorch, and a Triton kernel for accelerators."""

from .lora_linear import lora_linear as lora_linear
from .lora_linear import lora_product as lora_product
from .rms_norm import rms_norm as rms_norm
