"""The Lightning side: callbacks that play methods in a Trainer."""

from .peft import PEFT as PEFT
from .telemetry import TelemetryPicture as TelemetryPicture
