"""Modules that transformers has renamed since a file was written, by the tables with which it reads old weights itself.

Version 5 moved the parts of models of images and texts (``language_model.model.layers``, which are
``model.language_model.layers`` now), and keeps the experts of a mixture, which were a layer each, in one parameter.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.engine import AdapterFileError
from lightning_peft.engine.slots import base_parameters, plain_name
from lightning_peft.engine.targets import base_modules
from lightning_peft.interop.hf_format import PREFIX, Parts, ends_of, exactly, selected


def new_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Old -> new name of those of ``names``, of modules and parameters, that ``model`` has under another name alone."""
    there = ends_of(plain_name(name) for name in (*dict(base_modules(model)), *base_parameters(model)))
    lost = [name for name in names if name and name not in there]
    rename = _renaming(model) if lost else None
    return {} if rename is None else {name: new for name in lost if (new := rename(name)) in there}


def under_new_names(
    now: Mapping[str, str], config: Mapping[str, Any], found: Parts, others: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Parts, dict[str, Tensor]]:
    """Config, tensors of adapters and other tensors of a file of HF PEFT, for the names that modules have ``now``.

    Raises:
        AdapterFileError: the file has a module under both names.
    """
    names = {name: now.get(name, name) for name in found}
    keys = {key: PREFIX + now[name] if (name := key.removeprefix(PREFIX)) in now else key for key in others}
    for new, count in Counter([*names.values(), *keys.values()]).items():
        if count > 1:
            raise AdapterFileError(f"the file has {new.removeprefix(PREFIX)!r} under an old name, too: it is damaged.")
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    own = {new: alpha for name, new in names.items() if (alpha := selected(alphas, name)) is not None}
    patterns = {
        "alpha_pattern": {exactly(new, names.values()): alpha for new, alpha in own.items()},
        "rank_pattern": {now.get(key.removesuffix(".lora_E"), key): rank for key, rank in ranks.items()},
    }
    settings = {**config, **{name: value for name, value in patterns.items() if value}}
    renamed = {names[name]: parts for name, parts in found.items()}
    return settings, renamed, {keys[key]: value for key, value in others.items()}


def _renaming(model: nn.Module) -> Callable[[str], str] | None:
    """What transformers makes of an old name; None for a model that is not of it."""
    if "transformers" not in sys.modules:
        return None
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    root = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if root is None:
        return None
    table = get_model_conversion_mapping(root)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    fusions = [entry for entry in table if isinstance(entry, WeightConverter)]
    return lambda name: rename_source_key(f"{name}.weight", renamings, fusions)[0].removesuffix(".weight")
