"""Experts that were trained one by one, put under a router that shares them out."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_peft.adapters.experts import Experts
from lightning_peft.engine import AdapterError, adapter_state, adapters_of, inject, load_adapter_state, unload
from lightning_peft.engine.record import ModelT, has_record, record_of
from lightning_peft.interop.files import read_adapter, unwrapped
from lightning_peft.interop.hf_experts import factors_of, side_by_side
from lightning_peft.interop.hf_format import BROUGHT, check_brought
from lightning_peft.interop.untrusted import check_names, told_by
from lightning_peft.methods import XLoRA


def load_experts(
    model: ModelT, folders: Sequence[str | Path], method: XLoRA | None = None, name: str = "default"
) -> ModelT:
    """Put the LoRA adapters in ``folders`` into ``model`` as the experts of an X-LoRA, and return the model.

    The experts are frozen, and a new classifier is to be trained, unless ``method`` says otherwise. ``save_adapter``
    writes all of it to one folder; ``PEFT(init_from=folder)`` trains from there.

    Args:
        model: the model that the adapters were made for.
        folders: an adapter folder of each expert: LoRA, of HF PEFT or ours, or what ``as_lora`` wrote. They may have
            other ranks, and sit on other layers.
        method: how they are mixed. How many there are, their ranks and their layers come from the folders.
        name: name that the adapter gets.

    Raises:
        AdapterError: the name is taken.
        AdapterFileError: an expert is no plain LoRA, or was made for another model. Nothing has been changed then.
    """
    if isinstance(folders, str | Path) or not folders:
        raise AdapterError(f"load_experts: expected the folders of several adapters, got {folders!r}.")
    if has_record(model) and name in record_of(model).injections:
        raise AdapterError(f"load_experts: there is an adapter {name!r} already. unload it first, or name another.")
    read = [read_adapter(folder) for folder in folders]
    experts = []
    for folder, (_, config, tensors) in zip(folders, read, strict=True):
        with told_by(folder):
            experts.append(factors_of(config, tensors))
    stacked = side_by_side(experts)
    r = next(iter(stacked.values()))[0].shape[1]
    mixed = dataclasses.replace(
        XLoRA(train_experts=False) if method is None else method,
        num_experts=len(experts),
        r=r,
        alpha=None,
        target_modules=tuple(sorted(stacked)),
    )
    check_names(mixed, model, ", ".join(map(str, folders)))
    inject(model, mixed, name)
    try:
        state = {key: value.detach() for key, value in adapter_state(model, name).items()}
        for path, _, adapter in adapters_of(model, name):
            if isinstance(adapter, Experts):
                A, B = next(both for module, both in stacked.items() if re.search(rf"(^|\.){re.escape(module)}$", path))
                state |= {f"{path}.adapters.lora_A": A, f"{path}.adapters.lora_B": B}
        for _, _, tensors in read:
            check_brought(unwrapped(model, state)[0], tensors, [key for key in tensors if key.endswith(BROUGHT)])
        load_adapter_state(model, state, name)
    except BaseException:
        unload(model, name)
        raise
    return model
