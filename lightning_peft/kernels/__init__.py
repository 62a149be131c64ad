"""Fast operations, one file each: the formula, a twin in plain PyTorch, and a Triton kernel for accelerators."""

from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .rms_norm import rms_norm as rms_norm
