"""The types of HF PEFT whose change of weights is more than a plain low-rank product.

A row reads a file where a method of ours computes the same function of other numbers, or of the same in another layout.
What is left as it is: VeRA's shared matrices are another draw than ours (written, not read), those of RandLoRA are
paired in another way.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.kronecker import Kronecker
from lightning_peft.engine import AdapterFileError, Method
from lightning_peft.interop.hf_format import (
    LORA_KNOWN,
    LORA_PLAIN,
    Found,
    Parts,
    Place,
    Row,
    State,
    Unread,
    as_given,
    own_values,
    ranks_and_alphas,
    read_alphas,
    target_of,
)
from lightning_peft.methods import AdaLoRA, Bone, LoHa, LoKr, MiSS, VeRA
from lightning_peft.methods.delta.adalora import Triplets
from lightning_peft.methods.delta.bone import BlockAffine
from lightning_peft.methods.delta.loha import Hadamard
from lightning_peft.methods.delta.miss import Folded
from lightning_peft.methods.delta.vera import SharedProduct

_EPSILON = 1e-5  # that HF PEFT adds to a rank before it divides by it


def _as_it_is(path: str, module: Any, adapter: Any, found: Found) -> dict[str, Place]:
    """All parameters under their own names, kernels flattened."""
    shapes = {name: p.shape for name, p in adapter.named_parameters()}
    flat = {n: s if len(s) < 3 or n == "lokr_w2" else (s[0], s[1:].numel()) for n, s in shapes.items()}
    return {name: Place(f"{path}.{name}", tuple(shape)) for name, shape in flat.items()}


# AdaLoRA: delta = lora_alpha / (init_r + epsilon) * B (E * A)


def _triplet_places(path: str, module: Any, adapter: Any, found: Found) -> dict[str, Place]:
    d_out, r = adapter.lora_B.shape
    first = found[0][2]
    if (len(first.lora_z), float(first.scaling)) != (r, float(adapter.scaling)):
        raise AdapterFileError(f"HF PEFT's AdaLoRA begins with one rank and one alpha for all layers ({path}).")
    return {
        "lora_A": Place(f"{path}.lora_A", (r, adapter.lora_A.shape[1:].numel())),
        "lora_B": Place(f"{path}.lora_B", (d_out, r)),
        "lora_z": Place(f"{path}.lora_E", (r, 1), float(adapter.scaling) * (r + _EPSILON) / _alpha(adapter)),
    }


def _alpha(adapter: Any) -> float:
    return as_given(float(adapter.scaling) * len(adapter.lora_z))


def _write_adalora(method: AdaLoRA, found: Found, model: nn.Module, state: State) -> dict[str, Any]:
    tinit, tfinal, r = method.tinit, method.tfinal, len(found[0][2].lora_z)
    return {
        "init_r": r,
        "target_r": method.target_r or max(1, 2 * r // 3),
        "lora_alpha": _alpha(found[0][2]),
        "lora_dropout": method.dropout,
        "tinit": tinit,
        "tfinal": tfinal,
        "deltaT": method.deltaT,
        "beta1": method.beta1,
        "beta2": method.beta2,
        "orth_reg_weight": method.orth_reg_weight,
        "total_step": method.total_steps or tinit + tfinal + 1,  # HF PEFT wants to know
    }


def _read_adalora(
    config: Mapping[str, Any], found: Parts, whole: tuple[str, ...], model: nn.Module
) -> tuple[Method, Parts]:
    r = config["init_r"]
    patterns = {key.removesuffix(".lora_E"): kept for key, kept in (config.get("rank_pattern") or {}).items()}
    parts: Parts = {}
    for name, tensors in found.items():
        kept = torch.tensor(patterns.get(name, [True] * r)).view(-1).bool()
        A, B, E = (tensors[key] for key in ("lora_A", "lora_B", "lora_E"))
        if len(kept) != r or {len(A), B.shape[1], len(E)} != {int(kept.sum())}:
            raise AdapterFileError(
                f"{name!r} has {len(E)} triplets in the file, and its config says {int(kept.sum())} of {len(kept)}: it "
                "is damaged, or of another kind."
            )
        # those that were dropped are not in the file, and act no more
        whole_A, whole_B, whole_E = A.new_zeros(r, A.shape[1]), B.new_zeros(len(B), r), E.new_zeros(r, 1)
        whole_A[kept], whole_B[:, kept], whole_E[kept] = A, B, E
        parts[name] = {"lora_A": whole_A, "lora_B": whole_B, "lora_E": whole_E, "adapters.kept": kept.to(E.dtype)}
    method = AdaLoRA(
        r=r,
        alpha=config["lora_alpha"] if config["lora_alpha"] > 0 else r,  # as it is there
        target_r=min(config.get("target_r", r), r),
        tinit=config.get("tinit", 0),
        tfinal=config.get("tfinal", 0),
        deltaT=config.get("deltaT", 1),
        total_steps=config.get("total_step"),
        beta1=config.get("beta1", 0.85),
        beta2=config.get("beta2", 0.85),
        orth_reg_weight=config.get("orth_reg_weight", 0.5),
        dropout=config.get("lora_dropout", 0.0),
        target_modules=tuple(sorted(found)),
        modules_to_save=whole,
    )
    return method, parts


# LoHa and LoKr


def _write_loha(method: LoHa, found: Found, model: nn.Module, state: State) -> dict[str, Any]:
    _no_dropout(method)
    ranks = {path: len(adapter.hada_w1_b) for path, _, adapter in found}
    scalings = {path: float(adapter.scaling) for path, _, adapter in found}
    settings = ranks_and_alphas(method, ranks, scalings)
    return dict(zip(("r", "alpha", "rank_pattern", "alpha_pattern"), settings, strict=True))


def _read_loha(
    config: Mapping[str, Any], found: Parts, whole: tuple[str, ...], model: nn.Module
) -> tuple[Method, Parts]:
    parts = {
        name: _plain_product(tensors, ("hada_w1", "hada_t1"), ("hada_w2", "hada_t2")) for name, tensors in found.items()
    }
    ranks = {name: len(tensors["hada_w1_b"]) for name, tensors in parts.items()}
    method = LoHa(
        r=config["r"],
        alpha=config["alpha"],
        rank_pattern=own_values(ranks, config["r"]),
        alpha_pattern=own_values(read_alphas(config, found, "alpha"), config["alpha"]),
        target_modules=tuple(sorted(found)),
        modules_to_save=whole,
    )
    return method, parts


def _plain_product(tensors: Mapping[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    """``tensors`` with each product of three factors (a core with the kernel between two) as one of two."""
    plain = dict(tensors)
    for matrix, core in pairs:
        if core in plain:
            t, a, b = plain.pop(core), plain[f"{matrix}_a"], plain[f"{matrix}_b"]  # (r, r, *kernel), (r, k), (r, n)
            plain[f"{matrix}_a"] = a.T
            plain[f"{matrix}_b"] = torch.einsum("ij...,jn->in...", t, b).flatten(1)
    return plain


def _write_lokr(method: LoKr, found: Found, model: nn.Module, state: State) -> dict[str, Any]:
    _no_dropout(method)
    for path, module, adapter in found:
        if isinstance(module, nn.Conv1d) and "lokr_w2" in adapter._parameters:
            raise AdapterFileError(f"HF PEFT makes another change of the same factors for a Conv1d ({path}).")
    return {
        "r": method.r,
        "alpha": method.alpha,
        "decompose_both": method.decompose_both,
        "decompose_factor": method.decompose_factor,
    }


def _read_lokr(
    config: Mapping[str, Any], found: Parts, whole: tuple[str, ...], model: nn.Module
) -> tuple[Method, Parts]:
    folded = next((name for name, tensors in found.items() if tensors.get("lokr_w2", torch.empty(0)).dim() == 3), None)
    if folded is not None:
        raise Unread(f"the file adapts {folded!r}, a Conv1d, for which HF PEFT makes another change of the factors.")
    method = LoKr(
        r=config["r"],
        alpha=config["alpha"],
        decompose_both=config.get("decompose_both", False),
        decompose_factor=config.get("decompose_factor", -1),
        target_modules=tuple(sorted(found)),
        modules_to_save=whole,
    )
    return method, {name: _plain_product(tensors, ("lokr_w2", "lokr_t2")) for name, tensors in found.items()}


def _no_dropout(method: Any) -> None:
    if method.dropout:
        raise AdapterFileError(
            f"HF PEFT's {type(method).__name__} has no dropout of the input, here is dropout={method.dropout}."
        )


# VeRA: the vectors are around one pair of matrices, of the largest widths that occur; ours scale A by each layer's own


def _widest(found: Found) -> tuple[int, int]:
    """The largest (d_out, d_in) of all layers."""
    shapes = [adapter.shape for _, _, adapter in found]
    return max(shape[0] for shape in shapes), max(shape[1:].numel() for shape in shapes)


def _vector_places(path: str, module: Any, adapter: Any, found: Found) -> dict[str, Place]:
    ratio = (_widest(found)[1] / adapter.shape[1:].numel()) ** 0.5
    return {
        "vera_lambda_b": Place(f"{path}.vera_lambda_b", tuple(adapter.vera_lambda_b.shape)),
        "vera_lambda_d": Place(f"{path}.vera_lambda_d", tuple(adapter.vera_lambda_d.shape), ratio),
    }


def _shared_matrices(found: Found, state: State) -> dict[str, Tensor]:
    (d_out, d_in), (path, _, adapter) = _widest(found), found[0]
    like, (A, B) = state[f"{adapter.site.prefix(path)}vera_lambda_d"], adapter.banks
    return {
        "base_model.vera_A": (6 / d_in) ** 0.5 * A.rows(d_in, like).T,
        "base_model.vera_B": (6 / len(like)) ** 0.5 * B.rows(d_out, like),
    }


def _write_vera(method: VeRA, found: Found, model: nn.Module, state: State) -> dict[str, Any]:
    return {
        "r": method.r,
        "d_initial": method.d_initial,
        "vera_dropout": method.dropout,
        "projection_prng_key": method.seed,
        "save_projection": True,
    }


# MiSS, and Bone, which HF PEFT has as a way to start it


def _block_places(path: str, module: Any, adapter: Any, found: Found) -> dict[str, Place]:
    return {"block": Place(f"{path}.miss_block", tuple(adapter.block.shape))}


def _write_miss(method: MiSS | Bone, found: Found, model: nn.Module, state: State) -> dict[str, Any]:
    if isinstance(method, Bone):
        return {"r": method.r, "init_weights": "bat"}
    return {"r": method.r, "miss_dropout": method.dropout, "init_weights": True}


def _read_miss(
    config: Mapping[str, Any], found: Parts, whole: tuple[str, ...], model: nn.Module
) -> tuple[Method, Parts]:
    given: dict[str, Any] = {"r": config["r"], "target_modules": tuple(sorted(found)), "modules_to_save": whole}
    if config.get("init_weights") == "bat":
        return Bone(**given), found
    if config.get("init_weights") == "mini":  # its columns are repeated
        widths = {name: target_of(model, name).d_out for name in found}
        found = {
            name: {key: t.repeat(1, widths[name] // t.shape[1]) for key, t in found[name].items()} for name in found
        }
    return MiSS(dropout=config.get("miss_dropout", 0.0), **given), found


ROWS = {
    "ADALORA": Row(
        names=("lora_A", "lora_B", "lora_E"),
        places={Triplets: _triplet_places},
        methods=(AdaLoRA,),
        write=_write_adalora,
        read=_read_adalora,
        layers=(nn.Linear, nn.Conv2d),
        required=("init_r", "lora_alpha"),
        bias=True,
        plain=LORA_PLAIN,
        known=f"{LORA_KNOWN} target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step",
    ),
    "LOHA": Row(
        names=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        places={Hadamard: _as_it_is},
        methods=(LoHa,),
        write=_write_loha,
        read=_read_loha,
        layers=(nn.Linear, nn.Conv1d, nn.Conv2d),
        transposed=False,
        required=("r", "alpha"),
        training={"rank_dropout": 0.0, "module_dropout": 0.0},
        known="rank_pattern alpha_pattern use_effective_conv2d init_weights",
    ),
    "LOKR": Row(
        names=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        places={Kronecker: _as_it_is},
        methods=(LoKr,),
        write=_write_lokr,
        read=_read_lokr,
        layers=(nn.Linear, nn.Conv1d, nn.Conv2d),
        transposed=False,
        required=("r", "alpha"),
        plain={"rank_pattern": ({}, None), "alpha_pattern": ({}, None)},
        training={"rank_dropout": 0.0, "module_dropout": 0.0},
        known="use_effective_conv2d init_weights decompose_both decompose_factor rank_dropout_scale",
    ),
    "MISS": Row(
        names=("miss_block",),
        places={Folded: _block_places, BlockAffine: _block_places},
        methods=(MiSS, Bone),
        write=_write_miss,
        read=_read_miss,
        layers=(nn.Linear,),
        transposed=False,
        required=("r",),
        bias=True,
        plain={"init_weights": (True, False, "bat", "mini")},
        known="miss_dropout mini_r",
    ),
    "VERA": Row(
        names=("vera_lambda_b", "vera_lambda_d"),
        places={SharedProduct: _vector_places},
        methods=(VeRA,),
        write=_write_vera,
        derived=_shared_matrices,
        because="its matrices that all layers share are in the file, and those of our VeRA follow from a seed.",
        layers=(nn.Linear,),
    ),
    "RANDLORA": Row(
        names=(),
        because="its columns and rows of random numbers are paired in another way than those of our RandLoRA.",
    ),
}
