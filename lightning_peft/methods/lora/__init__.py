"""Low-rank updates of weights."""

from .balora import BALoRA as BALoRA
from .corda import CorDA as CorDA
from .dora import DoRA as DoRA
from .eva import EVA as EVA
from .ffalora import FFALoRA as FFALoRA
from .inttune import IntTune as IntTune
from .kasa import KaSA as KaSA
from .lamda import LaMDA as LaMDA
from .lamdaplusplus import LaMDAPlusPlus as LaMDAPlusPlus
from .loku import LoKU as LoKU
from .loldu import LoLDU as LoLDU
from .lora import LoRA as LoRA
from .loraga import LoRAGA as LoRAGA
from .loraggpo import LoRAGGPO as LoRAGGPO
from .loraplus import LoRAPlus as LoRAPlus
from .lorapro import LoRAPro as LoRAPro
from .nlora import NLoRA as NLoRA
from .pego import PEGO as PEGO
from .pissa import PiSSA as PiSSA
from .soma import SoMA as SoMA
from .sorsa import SORSA as SORSA
from .structuredlora import StructuredLoRA as StructuredLoRA
from .svfit import SVFit as SVFit
from .xlora import XLoRA as XLoRA
