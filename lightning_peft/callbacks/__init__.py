"""The Lightning side: callbacks that play methods in a Trainer."""

from .peft import PEFT as PEFT
from .sampling import SampleImages as SampleImages
from .sampling import image_grid as image_grid
from .telemetry import TelemetryPicture as TelemetryPicture
