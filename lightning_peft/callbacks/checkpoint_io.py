"""Checkpoints that are complete or not there at all, on whatever disk they lie."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_peft.interop.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """What Lightning does by default, but a run that is killed while it writes leaves the former file as it was.

    Lightning itself writes to the folder for temporary files, and moves the result. If that folder is on another disk,
    as on most clusters, moving means writing over the former checkpoint byte by byte.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` beside ``path``, then let it take its place; remote paths are left to Lightning."""
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as stream:
            torch.save(checkpoint, stream)
