"""Changes of weights that are small by another structure than one low-rank product."""

from .loha import LoHa as LoHa
from .lokr import LoKr as LoKr
from .miss import MiSS as MiSS
from .paca import PaCA as PaCA
from .salt import SALT as SALT
