"""Bytes of an adapter folder, and of a weights-only Lightning checkpoint, beside the bytes of what was trained.

The model is a small Llama with LoRA on 28 layers, so 56 tensors. PyTorch's checkpoint format adds some 350 bytes for
each tensor, whatever its size; safetensors adds less.
"""

import tempfile
from pathlib import Path

import lightning as L

from benchmarks.row import Row
from lightning_peft import PEFT, LoRA, save_adapter
from lightning_peft.callbacks.table import trainable_share
from lightning_peft.recipes import CausalLM, SourceCodeData


def run() -> list[Row]:
    """One training step, then ``save_adapter`` and ``save_checkpoint(weights_only=True)``."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    module = CausalLM(config={"model_type": "llama", "vocab_size": 256, "num_key_value_heads": 4, **shape})
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=1,
            limit_val_batches=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[PEFT(LoRA(r=8), summary=False)],
        )
        trainer.fit(module, SourceCodeData(package="asyncio", seq_len=64, max_bytes=100_000))
        path = Path(folder) / "adapter.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        trained = 4 * trainable_share(module)[0]
        goal = f"trained + 16 KiB = {trained + 16384:,}"
        saved = sum(file.stat().st_size for file in save_adapter(module, Path(folder) / "adapter").iterdir())
        return [
            Row("adapter folder, beside its trained bytes", saved, trained, "bytes", goal),
            Row("Lightning checkpoint of it, weights only", path.stat().st_size, trained, "bytes", goal),
        ]
