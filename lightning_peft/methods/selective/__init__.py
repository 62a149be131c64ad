"""Methods that choose which of the base's own parameters to train."""

from .bitfit import BitFit as BitFit
from .fullfinetuning import FullFineTuning as FullFineTuning
from .linearprobe import LinearProbe as LinearProbe
