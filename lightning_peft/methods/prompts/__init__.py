"""Trained tokens beside those of the input."""

from .dept import DePT as DePT
from .prefixtuning import PrefixTuning as PrefixTuning
from .prompttuning import PromptTuning as PromptTuning
from .ptuning import PTuning as PTuning
from .vpt import VPT as VPT
