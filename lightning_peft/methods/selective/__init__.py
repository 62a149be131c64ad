"""Methods that choose which of the base's own parameters to train."""

from .bitfit import BitFit as BitFit
from .fullfinetuning import FullFineTuning as FullFineTuning
from .hft import HFT as HFT
from .linearprobe import LinearProbe as LinearProbe
from .lpft import LPFT as LPFT
from .telly import Telly as Telly
