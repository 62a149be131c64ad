"""Which parameters train when: layers drawn anew while training, and subspaces of gradients."""

from .galore import GaLore as GaLore
from .ist import IST as IST
from .lisa import LISA as LISA
from .owlore import OwLore as OwLore
