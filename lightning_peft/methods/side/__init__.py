"""Small networks beside a frozen model."""

from .laddersidetuning import LadderSideTuning as LadderSideTuning
from .sidetuning import SideTuning as SideTuning
