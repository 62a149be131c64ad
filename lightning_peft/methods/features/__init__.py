"""Changes of hidden features."""

from .ia3 import IA3 as IA3
from .ssf import SSF as SSF
