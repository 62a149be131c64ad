"""Every method, one file per paper; importing this package fills the registry."""

from lightning_peft.engine import METHODS

from .delta import *  # noqa: F403
from .diffusion import *  # noqa: F403
from .features import *  # noqa: F403
from .lora import *  # noqa: F403
from .prompts import *  # noqa: F403
from .quantized import *  # noqa: F403
from .sampling import *  # noqa: F403
from .selective import *  # noqa: F403
from .side import *  # noqa: F403

__all__ = [cls.__name__ for cls in METHODS.values()]
