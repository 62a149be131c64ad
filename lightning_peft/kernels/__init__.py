"""Fast operations: of each the formula, a twin in plain PyTorch, and a Triton kernel for accelerators."""

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
from .nf4 import nf4_pack as nf4_pack
from .nf4 import nf4_unpack as nf4_unpack
from .nf4_linear import nf4_linear as nf4_linear
from .rms_norm import rms_norm as rms_norm
from .rope import rope as rope
from .scale_shift import scale_shift as scale_shift
from .segment_lora import segment_lora as segment_lora
from .sparse_grad import linear_with_columns as linear_with_columns
from .sparse_grad import linear_with_entries as linear_with_entries
from .sparse_grad import linear_with_rows as linear_with_rows
