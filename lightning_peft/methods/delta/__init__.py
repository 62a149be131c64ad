"""Changes of weights that are small by another structure than one low-rank product."""

from .adalora import AdaLoRA as AdaLoRA
from .bone import Bone as Bone
from .loha import LoHa as LoHa
from .lokr import LoKr as LoKr
from .miss import MiSS as MiSS
from .paca import PaCA as PaCA
from .randlora import RandLoRA as RandLoRA
from .salt import SALT as SALT
from .vera import VeRA as VeRA
