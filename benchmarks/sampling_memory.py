"""Bytes of gradients and optimizer state at their peak: LISA beside its formula, full fine-tuning and LoRA.

A Llama of 10 M parameters in float32 with AdamW. Each parameter that trains costs 4 bytes of gradient and 8 of moments;
by the formula of LISA these are embeddings, final norm, head, and ``n_layers`` blocks.
"""

import tempfile

import lightning as L
import torch
from torch.optim import Optimizer

from benchmarks.checkpoint_size import trained
from benchmarks.row import Row
from lightning_peft import LISA, PEFT, FullFineTuning, LoRA
from lightning_peft.engine import Method
from lightning_peft.recipes import CausalLM

_CONFIG = {"model_type": "llama", "vocab_size": 256, "hidden_size": 256, "intermediate_size": 1024}
_LAYERS = {"num_hidden_layers": 10, "num_attention_heads": 4, "num_key_value_heads": 4}


class Peak(L.Callback):
    """Of the bytes of gradients and of optimizer state, over all steps."""

    def __init__(self) -> None:
        self.bytes = 0
        self.gradients = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """The gradients are complete."""
        self.gradients = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """The moments are as large as they get in this step."""
        tensors = [v for s in trainer.optimizers[0].state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        self.bytes = max(self.bytes, self.gradients + sum(t.nbytes for t in tensors if t.numel() > 1))


def peak(folder: str, method: Method) -> tuple[int, CausalLM]:
    """Bytes at the peak of eight steps, and the module."""
    module, measured = CausalLM(config={**_CONFIG, **_LAYERS}), Peak()
    trained(folder, module, PEFT(method, summary=False), measured, max_steps=8)
    return measured.bytes, module


def run() -> list[Row]:
    """Three runs of eight steps; LISA draws other blocks with each second one."""
    with tempfile.TemporaryDirectory() as folder:
        lisa, module = peak(folder, LISA(n_layers=2, interval_steps=2))
        full, _ = peak(folder, FullFineTuning())
        lora, _ = peak(folder, LoRA(r=8))
    model = module.model
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    always = sum(p.numel() for p in model.parameters()) - 10 * block
    what = "peak bytes of gradients and AdamW state, LISA with 2 of 10 blocks"
    return [
        Row(f"{what}; beside it its formula", lisa, 12 * (always + 2 * block), "bytes", "at most 1.10"),
        Row("the same; beside it full fine-tuning", lisa, full, "bytes", ""),
        Row("the same; beside it LoRA r=8", lisa, lora, "bytes", ""),
    ]
