"""Strategies: methods on several processes. Importing this makes them known to ``Trainer(strategy=...)`` by name."""

from lightning.pytorch.strategies import StrategyRegistry

from .ddp import PEFTDDPStrategy as PEFTDDPStrategy
from .federated import PEFTFederatedStrategy as PEFTFederatedStrategy
from .fsdp import PEFTFSDPStrategy as PEFTFSDPStrategy
from .injecting import InjectingStrategy as InjectingStrategy
from .offload import PEFTOffloadStrategy as PEFTOffloadStrategy

StrategyRegistry.register("peft_ddp", PEFTDDPStrategy, description="data parallel, adapters alone", override=True)
StrategyRegistry.register("peft_federated", PEFTFederatedStrategy, description="ranks are clients", override=True)
StrategyRegistry.register("peft_fsdp", PEFTFSDPStrategy, description="base sharded, adapters whole", override=True)
StrategyRegistry.register("peft_offload", PEFTOffloadStrategy, description="frozen blocks on the host", override=True)
