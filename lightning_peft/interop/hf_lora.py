"""LoRA and its kin, and (IA)^3, in files of HF PEFT."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank, LowRankEmbedding
from lightning_peft.adapters.rescaling import Rescaling
from lightning_peft.engine import Adapter, AdapterFileError, Method, Target
from lightning_peft.interop.hf_format import (
    LORA_KNOWN,
    LORA_PLAIN,
    Found,
    Parts,
    Place,
    Row,
    State,
    Unread,
    own_values,
    ranks_and_alphas,
    read_alphas,
    target_of,
)
from lightning_peft.methods import EVA, IA3, PEGO, DoRA, FFALoRA, LoRA, LoRAGGPO, LoRAPlus, LoRAPro, PiSSA
from lightning_peft.parts.spectrum import svd

TENSOR = re.compile(r"(?P<module>.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?|ia3_l)$")


# LoRA


def tensor_names(path: str, module: nn.Module, adapter: Adapter) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of a tensor of a plain low-rank product -> (key, shape) in a file of HF PEFT, or of diffusers.

    Raises:
        AdapterFileError: HF PEFT has no place for this adapter, or computes something else with it.
    """
    ROWS["LORA"].check_layer(path, module, adapter)
    return {name: (place.key, place.shape) for name, place in _lora_places(path, module, adapter, []).items()}


def _lora_places(path: str, module: Any, adapter: Any, found: Found) -> dict[str, Place]:
    if adapter.site.kind == "conv" and module.groups != 1:
        raise AdapterFileError(f"HF PEFT computes something else for {path}, a convolution with groups.")
    shapes = {name: tuple(t.shape) for name, t in adapter.state_dict().items()}
    spatial = (1,) * (len(shapes["lora_A"]) - 2)
    if isinstance(adapter, LowRankEmbedding):
        keys = {name: Place(f"{path}.lora_embedding_{name[-1]}", shapes[name]) for name in ("lora_A", "lora_B")}
    else:
        keys = {
            "lora_A": Place(f"{path}.lora_A.weight", shapes["lora_A"]),
            "lora_B": Place(f"{path}.lora_B.weight", shapes["lora_B"] + spatial),
        }
    if "magnitude" in shapes:
        vector = (1, *shapes["magnitude"], *spatial) if spatial else shapes["magnitude"]
        keys["magnitude"] = Place(f"{path}.lora_magnitude_vector", vector)
    return keys


def _write_lora(method: LoRA, found: Found, model: nn.Module, state: State) -> dict[str, Any]:
    ranks = {path: adapter.lora_A.shape[0] for path, _, adapter in found}
    scalings = {path: float(adapter.scaling) for path, _, adapter in found}
    settings = ranks_and_alphas(method, ranks, scalings, 0.5 if method.use_rslora else 1)
    return dict(zip(("r", "lora_alpha", "rank_pattern", "alpha_pattern"), settings, strict=True)) | {
        "lora_dropout": method.dropout,
        "use_rslora": method.use_rslora,
        "use_dora": isinstance(method, DoRA),
    }


def lora_method(
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    whole: tuple[str, ...] = (),
    exact: bool = False,
) -> Method:
    """The method of a LoraConfig.

    Args:
        config: its settings.
        ranks: name of each adapted module -> its rank.
        alphas: the same for alpha.
        whole: modules that were trained whole.
        exact: the names are those in the model; else their last parts, for a model inside of another.
    """
    alpha = config.get("lora_alpha", 8)
    names = {name: f"^{re.escape(name)}" if exact else name for name in ranks}
    started = config.get("init_lora_weights") in _STARTS
    return (DoRA if config.get("use_dora") else PiSSA if started else LoRA)(
        r=config["r"],
        alpha=alpha,
        dropout=config.get("lora_dropout", 0.0),
        use_rslora=config.get("use_rslora", False),
        rank_pattern={names[name]: r for name, r in own_values(ranks, config["r"]).items()},
        alpha_pattern={names[name]: a for name, a in own_values(alphas, alpha).items()},
        target_modules=tuple(sorted(names.values())),
        modules_to_save=whole,
    )


def _read_lora(
    config: Mapping[str, Any], found: Parts, whole: tuple[str, ...], model: nn.Module
) -> tuple[Method, Parts]:
    ranks, alphas = {name: len(_down(parts)) for name, parts in found.items()}, read_alphas(config, found)
    for name, parts in found.items():
        _check_product(name, parts, model)
    method = lora_method(config, ranks, alphas, whole)
    start = _STARTS.get(config.get("init_lora_weights", True))
    if start is not None:  # the file is for a weight less the product that training began with
        for name, parts in found.items():
            target = target_of(model, name)
            weight = target.site.get(target.module)[0].detach()
            scaling = alphas[name] / ranks[name] ** (0.5 if config.get("use_rslora") else 1)
            A, B = start(weight.to(torch.promote_types(weight.dtype, torch.float32)), target, ranks[name], scaling)
            parts |= {"adapters.start_A": A, "adapters.start_B": B}
    return method, found


def _check_product(name: str, parts: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise `Unread` if no method of ours makes a product of these factors."""
    down, up = _down(parts), parts.get("lora_embedding_B", parts.get("lora_B.weight"))
    r, is_conv = len(down), down.dim() > 2
    if not is_conv and (up is None or r <= min(len(up), down.shape[1])):  # nearly all
        return
    target = target_of(model, name)
    if r > min(target.d_in, target.d_out):
        raise Unread(f"the file has r={r} for {name!r} ({target.d_out} x {target.d_in}), which cannot use so many.")
    if is_conv and getattr(target.module, "groups", 1) != 1:
        raise Unread(f"the file adapts {name!r}, a convolution with groups, where HF PEFT computes something else.")


def _down(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["lora_embedding_A" if "lora_embedding_B" in parts else "lora_A.weight"]


def _principal(weight: Tensor, target: Target, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A_0 (r, d_in) and B_0 (d_out, r) of PiSSA; the scaled product is the leading part of the weight."""
    U, values, Vh = svd(weight)
    root = (values[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def _triangular(weight: Tensor, target: Target, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The same of OLoRA; HF PEFT decomposes the weight as it is stored."""
    Q, R = torch.linalg.qr(weight.T if target.site.transposed else weight)
    return (Q[:, :r].T, R[:r].T) if target.site.transposed else (R[:r], Q[:, :r])


# those that take a product out of the weight which follows from it; others draw it at random or measure it on data
_STARTS = {"pissa": _principal, "olora": _triangular}
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the weight as it is


def _unlike_lora(config: Mapping[str, Any]) -> str | None:
    start = config.get("init_lora_weights", True)
    if start in PLAIN_STARTS or (start in _STARTS and not config.get("use_dora")):
        return None
    text = f"the file was made with init_lora_weights={start!r}"
    if start in _STARTS:
        return f"{text} and use_dora=True, which is not read here. Merge it with HF PEFT."
    if str(start).startswith(("pissa_niter", "corda", "lora_ga")):
        return (
            f"{text}: it is for a base from which a product was taken that is not in the file and cannot be had again. "
            "Convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...) of HF PEFT."
        )
    return (
        f"{text}, which is not read here (only True is). Merge it with HF PEFT, or convert it to a plain adapter there."
    )


# (IA)^3


def _rescaling_places(path: str, module: Any, adapter: Any, found: Found) -> dict[str, Place]:
    size = len(adapter.scale)
    return {"scale": Place(f"{path}.ia3_l", (1, size) if adapter.on_input else (size, 1))}


def _write_ia3(method: IA3, found: Found, model: nn.Module, state: State) -> dict[str, Any]:
    inner = {path for path, _, adapter in found if adapter.on_input}
    # HF PEFT wants both lists in the same form, and no name of the one in the other
    return {"target_modules": sorted(path for path, _, _ in found), "feedforward_modules": sorted(inner)}


def _read_ia3(
    config: Mapping[str, Any], found: Parts, whole: tuple[str, ...], model: nn.Module
) -> tuple[Method, Parts]:
    inner: list[str] = []
    for name, parts in sorted(found.items()):
        if parts["ia3_l"].dim() != 2:
            raise Unread(f"the file rescales {name!r}, a convolution, and IA3 of lightning_peft is for linear layers.")
        if len(parts["ia3_l"]) == 1 and (parts["ia3_l"].numel() > 1 or target_of(model, name).d_in == 1):
            inner.append(name)
    return IA3(target_modules=tuple(sorted(found)), feedforward_modules=tuple(inner), modules_to_save=whole), found


ROWS = {
    "LORA": Row(
        names=("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
        places={LowRank: _lora_places},
        methods=(LoRA, LoRAPlus, DoRA, FFALoRA, LoRAGGPO, LoRAPro, PEGO, EVA),
        write=_write_lora,
        read=_read_lora,
        layers=(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding),
        bias=True,
        required=("r",),
        plain=LORA_PLAIN,
        unlike=_unlike_lora,
        known=LORA_KNOWN,
    ),
    "IA3": Row(
        names=("ia3_l",),
        places={Rescaling: _rescaling_places},
        methods=(IA3,),
        write=_write_ia3,
        read=_read_ia3,
        known="feedforward_modules init_ia3_weights",
    ),
}
