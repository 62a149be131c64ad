"""The Lightning side: callbacks that play methods in a Trainer."""

from . import transformers_trainer as _transformers_trainer  # noqa: F401  (registers what it writes)
from .peft import PEFT as PEFT
from .sampling import SampleImages as SampleImages
from .sampling import image_grid as image_grid
from .telemetry import TelemetryPicture as TelemetryPicture
