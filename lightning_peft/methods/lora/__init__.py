"""Low-rank updates of weights."""

from .dora import DoRA as DoRA
from .kasa import KaSA as KaSA
from .lora import LoRA as LoRA
from .loraplus import LoRAPlus as LoRAPlus
from .pissa import PiSSA as PiSSA
from .soma import SoMA as SoMA
from .sorsa import SORSA as SORSA
from .svfit import SVFit as SVFit
