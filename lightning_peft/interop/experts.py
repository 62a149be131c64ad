"""Experts that were trained one by one, put under a router that shares them out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lightning_peft.engine import AdapterError, adapter_state, inject, load_adapter_state, unload
from lightning_peft.engine.record import ModelT, has_record, record_of
from lightning_peft.interop.files import adapted_root, read_adapter, unwrapped
from lightning_peft.interop.hf_experts import factors_of, side_by_side
from lightning_peft.interop.hf_format import BROUGHT, check_brought
from lightning_peft.interop.untrusted import check_names, check_patterns, told_by
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
    target = adapted_root(model)
    if has_record(target) and name in record_of(target).injections:
        raise AdapterError(f"load_experts: there is an adapter {name!r} already. unload it first, or name another.")
    read = [read_adapter(folder) for folder in folders]
    with told_by(", ".join(map(str, folders))):
        for folder, (_, config, _) in zip(folders, read, strict=True):
            check_patterns(config, str(folder))
        stacked = side_by_side([factors_of(config, tensors) for _, config, tensors in read])
    r = next(iter(stacked.values()))[0].shape[1]
    mixed = dataclasses.replace(
        XLoRA(train_experts=False) if method is None else method,
        num_experts=len(read),
        r=r,
        alpha=None,
        target_modules=tuple(sorted(stacked)),
    )
    check_names(mixed, target, ", ".join(map(str, folders)))
    inject(target, mixed, name)
    try:
        state = {key: value.detach() for key, value in adapter_state(target, name).items()}
        inner, prefix = unwrapped(target, state)
        for module, (A, B) in stacked.items():
            state |= {f"{prefix}{module}.adapters.lora_A": A, f"{prefix}{module}.adapters.lora_B": B}
        for _, _, tensors in read:
            check_brought(inner, tensors, [key for key in tensors if key.endswith(BROUGHT)])
        load_adapter_state(target, state, name)
    except BaseException:
        unload(target, name)
        raise
    return model
