"""Methods that were made for diffusion models."""

from .difffit import DiffFit as DiffFit
from .diffusekrona import DiffuseKronA as DiffuseKronA
from .ipadapter import IPAdapter as IPAdapter
from .sara import SaRA as SaRA
from .softrepa import SoftREPA as SoftREPA
