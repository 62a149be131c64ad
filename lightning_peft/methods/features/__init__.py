"""Changes of hidden features."""

from .adaptformer import AdaptFormer as AdaptFormer
from .houlsbyadapter import HoulsbyAdapter as HoulsbyAdapter
from .ia3 import IA3 as IA3
from .paralleladapter import ParallelAdapter as ParallelAdapter
from .pfeifferadapter import PfeifferAdapter as PfeifferAdapter
from .ssf import SSF as SSF
