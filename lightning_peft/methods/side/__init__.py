"""Small networks beside a frozen model."""

from .hierarchicalsidetuning import HierarchicalSideTuning as HierarchicalSideTuning
from .laddersidetuning import LadderSideTuning as LadderSideTuning
from .levi import LEVI as LEVI
from .pyra import PYRA as PYRA
from .sidetuning import SideTuning as SideTuning
from .unipt import UniPT as UniPT
