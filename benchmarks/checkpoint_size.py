"""Bytes of an adapter folder and of Lightning checkpoints, and the time that it takes to write one.

The small model is a Llama with LoRA on 28 layers, so 56 tensors. PyTorch's checkpoint format adds some 350 bytes for
each tensor, whatever its size; safetensors adds less.

The larger one is a Llama of 124 M parameters with random weights. Its checkpoint, with the state of AdamW, stands
beside the two that users have without this package: that of full fine-tuning, and that of the common recipe, a model
from HF PEFT's ``get_peft_model`` inside a LightningModule, whose whole ``state_dict`` is saved.
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import peft

from benchmarks.row import Row, alternate
from lightning_peft import PEFT, LoRA, save_adapter
from lightning_peft.callbacks.table import trainable_share
from lightning_peft.recipes import CausalLM, SourceCodeData

_SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
_LARGER = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}


class WithHFPEFT(CausalLM):
    """The common recipe: LoRA of HF PEFT inside a LightningModule."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = peft.get_peft_model(self.model, peft.LoraConfig(r=8, target_modules="all-linear"))


def trained(folder: str, module: L.LightningModule, *callbacks: L.Callback, max_steps: int = 1) -> L.Trainer:
    """A Trainer that has taken ``max_steps`` with ``module``."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    steps = {"max_steps": max_steps, "limit_val_batches": 0, "accelerator": "cpu"}
    trainer = L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **steps, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, SourceCodeData(package="asyncio", seq_len=16, batch_size=1, max_bytes=20_000))
    return trainer


def run() -> list[Row]:
    """One training step, then every kind of file."""
    with tempfile.TemporaryDirectory() as folder:
        return [*_beside_what_was_trained(folder), *_beside_the_whole_model(folder)]


def _beside_what_was_trained(folder: str) -> list[Row]:
    module = CausalLM(config={"model_type": "llama", "vocab_size": 256, "num_key_value_heads": 4, **_SMALL})
    path = Path(folder) / "adapter.ckpt"
    trained(folder, module, PEFT(LoRA(r=8), summary=False)).save_checkpoint(path, weights_only=True)
    own = 4 * trainable_share(module)[0]
    goal = f"trained + 16 KiB = {own + 16384:,}"
    saved = sum(file.stat().st_size for file in save_adapter(module, Path(folder) / "adapter").iterdir())
    return [
        Row("adapter folder, beside its trained bytes", saved, own, "bytes", goal),
        Row("Lightning checkpoint of it, weights only", path.stat().st_size, own, "bytes", goal),
    ]


def _beside_the_whole_model(folder: str) -> list[Row]:
    config = {"model_type": "llama", "vocab_size": 50304, "tie_word_embeddings": True, **_LARGER}
    runs = {
        "ours": trained(folder, CausalLM(config=config), PEFT(LoRA(r=8), summary=False)),
        "full fine-tuning": trained(folder, CausalLM(config=config)),
        "HF PEFT in the module": trained(folder, WithHFPEFT(config=config)),
    }
    paths = {name: Path(folder) / f"{name}.ckpt" for name in runs}
    writes = [lambda name=name: runs[name].save_checkpoint(paths[name]) for name in runs]  # type: ignore[misc]
    times = dict(zip(runs, alternate(*writes, rounds=3, repeats=1), strict=True))
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    rows = []
    for name in list(runs)[1:]:
        rows.append(
            Row(f"checkpoint with AdamW, 124 M Llama, LoRA r=8; {name}", sizes["ours"], sizes[name], "bytes", "")
        )
        rows.append(Row(f"time to write it; {name}", times["ours"], times[name], "s", ""))
    return rows
