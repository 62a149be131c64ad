"""Fast operations, one file each: the formula, a twin in plain PyTorch, and a Triton kernel for accelerators."""

from .rms_norm import rms_norm as rms_norm
