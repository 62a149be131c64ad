"""What the Trainer of transformers writes of a model with adapters, and reads when it goes on.

It calls ``save_pretrained`` for each checkpoint, and loads ``model.safetensors`` of the folder, without asking that all
keys be there, to resume or to go back to the best step. So that file holds what is trained, under the keys that it has
in the model, what methods keep beside it, and nothing of the frozen base. Beside it lie the adapters as `save_adapter`
writes them.
"""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from lightning_peft.callbacks.checkpoints import base_tensors
from lightning_peft.engine.record import record_of
from lightning_peft.engine.saving import SavePretrained, method_states
from lightning_peft.interop.files import replacing, save_adapter

WEIGHTS = "model.safetensors"


def write_checkpoint(model: nn.Module, folder: str | Path) -> None:
    """Write to ``folder`` each adapter of ``model`` (``"default"`` to it, others below it), and what is trained."""
    folder = Path(folder)
    for name in record_of(model).injections:
        save_adapter(model, folder if name == "default" else folder / name, name)
    folder.mkdir(parents=True, exist_ok=True)
    base = base_tensors(model)
    trained = {key: value for key, value in model.state_dict().items() if key not in base} | method_states(model)
    with replacing(folder / WEIGHTS) as file:
        contiguous = {key: value.detach().cpu().contiguous().clone() for key, value in trained.items()}
        save_file(contiguous, file, metadata={"format": "pt"})


SavePretrained.write_checkpoint = staticmethod(write_checkpoint)
