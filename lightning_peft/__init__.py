"""Parameter-efficient fine-tuning for any LightningModule: ``Trainer(callbacks=[PEFT(LoRA(r=8))])``."""

from lightning_peft.callbacks import PEFT as PEFT
from lightning_peft.engine import AdapterError as AdapterError
from lightning_peft.engine import disabled as disabled
from lightning_peft.engine import get_method as get_method
from lightning_peft.engine import inject as inject
from lightning_peft.engine import list_methods as list_methods
from lightning_peft.engine import merge as merge
from lightning_peft.engine import routed as routed
from lightning_peft.engine import set_active as set_active
from lightning_peft.engine import set_trainable as set_trainable
from lightning_peft.engine import unload as unload
from lightning_peft.engine import unmerge as unmerge
from lightning_peft.interop import HFPEFT as HFPEFT
from lightning_peft.interop import combine as combine
from lightning_peft.interop import load_adapter as load_adapter
from lightning_peft.interop import load_experts as load_experts
from lightning_peft.interop import save_adapter as save_adapter
from lightning_peft.methods import *  # noqa: F403
from lightning_peft.parts.losses import InvertedHingeLoss as InvertedHingeLoss
from lightning_peft.parts.losses import contrastive_denoising_loss as contrastive_denoising_loss
from lightning_peft.strategies import PEFTDDPStrategy as PEFTDDPStrategy
from lightning_peft.strategies import PEFTFederatedStrategy as PEFTFederatedStrategy
from lightning_peft.strategies import PEFTFSDPStrategy as PEFTFSDPStrategy
from lightning_peft.strategies import PEFTOffloadStrategy as PEFTOffloadStrategy

__version__ = "0.1.0"
