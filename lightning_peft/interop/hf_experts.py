"""X-LoRA of HF PEFT: a file with the classifier, and a folder for each of the experts, which are LoRA."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.experts import Experts, Router, Seen
from lightning_peft.engine import AdapterFileError, Method
from lightning_peft.interop import hf_lora
from lightning_peft.interop.hf_format import (
    BROUGHT,
    EXPERT,
    LORA_PLAIN,
    PREFIX,
    Found,
    Parts,
    Place,
    Row,
    Unread,
    read_alphas,
)
from lightning_peft.methods import XLoRA

_CLASSIFIER = "internal_xlora_classifier"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?$")

Factors = dict[str, dict[str, Tensor]]  # module -> "A" and "B"


def factors_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Factors:
    """Of the expert in a folder: module -> A (r, d_in) and B (d_out, r), the scaling in B.

    Raises:
        AdapterFileError: it is no plain LoRA on linear layers and embeddings.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"an expert has to be a LoRA of HF PEFT's form, and one of these is {config.get('peft_type')!r}. Write it "
            "again with save_adapter(..., as_lora=True)."
        )
    try:
        _EXPERT.check(config)
    except Unread as reason:
        raise AdapterFileError(f"an expert cannot be mixed: {reason}") from None
    found: Factors = {}
    for key, value in tensors.items():
        if key.endswith(BROUGHT):
            continue
        match = _FACTOR.match(key.removeprefix(PREFIX))
        if match is None or value.dim() != 2:
            raise AdapterFileError(
                f"an expert has {key!r} {tuple(value.shape)}, which is no factor of a linear layer or an embedding. "
                "What was trained whole beside the products, and convolutions, cannot be mixed."
            )
        found.setdefault(match["module"], {})[match["factor"]] = value
    for module, alpha in read_alphas(config, found).items():
        r = len(found[module]["A"])
        found[module]["B"] = found[module]["B"] * (alpha / r ** (0.5 if config.get("use_rslora") else 1))
    return found


def side_by_side(experts: Sequence[Factors]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A (E, r, d_in) and B (d_out, E, r), with zeros up to the largest rank, and where an expert has none.

    Raises:
        AdapterFileError: they were made for other models.
    """
    r = max(len(parts["A"]) for expert in experts for parts in expert.values())
    stacked = {}
    for module in dict.fromkeys(module for expert in experts for module in expert):
        one = next(expert[module] for expert in experts if module in expert)
        none = {key: torch.zeros_like(value) for key, value in one.items()}
        parts = [expert.get(module, none) for expert in experts]
        sizes = {(part["A"].shape[1], part["B"].shape[0]) for part in parts}
        if len(sizes) > 1:
            raise AdapterFileError(f"{module!r} has other sizes in one expert than in another, {sorted(sizes)}.")
        A = torch.stack([F.pad(part["A"], (0, 0, 0, r - len(part["A"]))) for part in parts])
        B = torch.stack([F.pad(part["B"], (0, r - part["B"].shape[1])) for part in parts], dim=1)
        stacked[module] = A, B
    return stacked


def _read(config: Mapping[str, Any], found: Parts, whole: tuple[str, ...], model: nn.Module) -> tuple[Method, Parts]:
    flat = {f"{module}.{name}": tensor for module, parts in found.items() for name, tensor in parts.items()}
    experts = []
    for i, expert in enumerate(config["adapters"]):
        start = EXPERT.format(i)
        experts.append(factors_of(expert, {k.removeprefix(start): t for k, t in flat.items() if k.startswith(start)}))
    stacked = side_by_side(experts)
    own = {k: t for k, t in flat.items() if _CLASSIFIER in k}
    layers = sorted({int(number) for key in own for number in re.findall(r"\.layers\.(\d+)\.", key)})
    if len(layers) != config.get("xlora_depth", 1):
        raise AdapterFileError(
            f"the file has {len(layers)} of the {config.get('xlora_depth', 1)} layers of the classifier. HF PEFT 0.21 "
            "leaves out those that have the number of an expert. Save it again as {k: v for k, v in "
            f"model.state_dict().items() if {_CLASSIFIER!r} in k}}."
        )
    classifier: dict[str, Tensor] = {}
    for key, value in own.items():
        number, name = re.findall(r"\.layers\.(\d+)\.(\w+)$", key)[0]
        classifier[f"{layers.index(int(number))}.{name}"] = value
    first = classifier["0.weight"]
    method = XLoRA(
        num_experts=len(experts),
        r=next(iter(stacked.values()))[0].shape[1],
        alpha=None,
        train_experts=config.get("use_trainable_adapters", False),
        depth=len(layers),
        size=len(first) if len(layers) > 1 else XLoRA.size,
        classifier_dropout=config.get("xlora_dropout_p", 0.2),
        layerwise=config.get("layerwise_scalings", False),
        softmax=config.get("enable_softmax", True),
        temperature=config.get("softmax_temperature", 1.0),
        top_k=config.get("top_k_lora"),
        softmax_top_k=config.get("enable_softmax_topk", False),
        global_scaling_weight=config.get("global_scaling_weight", 1.0),
        target_modules=tuple(sorted(stacked)),
    )
    parts = {module: {"adapters.lora_A": A, "adapters.lora_B": B} for module, (A, B) in stacked.items()}
    return method, parts | {_CLASSIFIER: classifier}


def _router_places(path: str, module: Any, adapter: Any, found: Found) -> dict[str, Place]:
    shapes = {key: tuple(value.shape) for key, value in adapter.layers.state_dict().items()}
    return {f"layers.{key}": Place(f"{_CLASSIFIER}.{key}", shape) for key, shape in shapes.items()}


_EXPERT = dataclasses.replace(
    hf_lora.ROWS["LORA"], plain=LORA_PLAIN | {"use_dora": (False,), "init_lora_weights": hf_lora.PLAIN_STARTS}
)
ROWS = {
    "XLORA": Row(
        names=("weight", "bias", "lora_embedding_A", "lora_embedding_B"),
        places={Router: _router_places, Experts: lambda *_: {}, Seen: lambda *_: {}},
        read=_read,
        known=(
            "adapters hidden_size enable_softmax enable_softmax_topk softmax_temperature layerwise_scalings top_k_lora "
            "xlora_depth xlora_size xlora_dropout_p use_trainable_adapters scaling_pass_value global_scaling_weight"
        ),
    )
}
