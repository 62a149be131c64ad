"""Refuses models that are spread over ranks in a way in which adapters would fail, or fall out of step unseen."""

from typing import Any

import torch
from torch import nn

from lightning_peft.engine import AdapterError, adapters_of
from lightning_peft.interop.files import adapted_root

_NO_TENSOR_PARALLEL = (
    "Adapters cannot act there: a layer's ranks see parts of its input or output. Shard by FSDP2 alone "
    "(fully_shard): ModelParallelStrategy(data_parallel_size=<ranks>, tensor_parallel_size=1), or strategy='peft_fsdp'."
)


def check_mesh(strategy: Any) -> None:
    """Raise an `AdapterError` if ``strategy`` has ranks for tensor parallel layers."""
    mesh = getattr(strategy, "_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if mesh is not None and "tensor_parallel" in names and mesh["tensor_parallel"].size() > 1:
        size = mesh["tensor_parallel"].size()
        raise AdapterError(f"PEFT: {type(strategy).__name__} has tensor_parallel_size={size}. {_NO_TENSOR_PARALLEL}")


def check_sharding(strategy: Any, module: nn.Module) -> None:
    """Refuse tensor parallel layers, and adapters whose gradients nobody averages.

    Raises:
        AdapterError: ``module`` has either of them.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    placed = {n: p.placements for n, p in module.named_parameters() if hasattr(p, "placements")}
    fsdp = any(isinstance(m, FSDPModule) for m in module.modules())
    split = [n for n, places in placed.items() if not fsdp or sum(not p.is_replicate() for p in places) > 1]
    if split:
        raise AdapterError(
            f"PEFT: {len(split)} parameters are tensor parallel, among them {split[0]!r}. {_NO_TENSOR_PARALLEL}"
        )
    if placed and not getattr(strategy, "averages_whole_parameters", False):
        adapters = adapters_of(adapted_root(module))
        whole = [path for path, _, a in adapters if not all(hasattr(p, "placements") for p in a.parameters())]
        if whole:
            raise AdapterError(
                f"PEFT: the model was sharded (fully_shard) before adapters came in: {len(whole)} of them are whole, "
                f"among them that on {whole[0]!r}, and {type(strategy).__name__} would not average their gradients, so "
                "that ranks would drift apart. Use strategy='peft_fsdp', or inject(self, method) before fully_shard "
                "in configure_model."
            )
