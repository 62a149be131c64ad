"""Methods that were made for diffusion models."""

from .difffit import DiffFit as DiffFit
from .sara import SaRA as SaRA
