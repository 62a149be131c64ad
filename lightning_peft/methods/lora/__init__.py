"""Low-rank updates of weights."""

from .corda import CorDA as CorDA
from .dora import DoRA as DoRA
from .lora import LoRA as LoRA
from .loraga import LoRAGA as LoRAGA
from .loraplus import LoRAPlus as LoRAPlus
from .pissa import PiSSA as PiSSA
from .soma import SoMA as SoMA
