"""Changes of hidden features."""

from .adaptformer import AdaptFormer as AdaptFormer
from .compacter import Compacter as Compacter
from .houlsbyadapter import HoulsbyAdapter as HoulsbyAdapter
from .ia3 import IA3 as IA3
from .lofit import LoFiT as LoFiT
from .mamadapter import MAMAdapter as MAMAdapter
from .mosa import MoSA as MoSA
from .paralleladapter import ParallelAdapter as ParallelAdapter
from .pfeifferadapter import PfeifferAdapter as PfeifferAdapter
from .ssf import SSF as SSF
from .zeroi2v import ZeroI2V as ZeroI2V
