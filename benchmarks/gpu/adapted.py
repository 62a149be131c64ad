"""Models with adapters whose factors are inputs of the case: ``<layer>.lora_A``, ``<layer>.lora_B``, ``.magnitude``.

Base weights are inputs too, which all peers share. Factors are copied, for a training step changes them.
"""

from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

from benchmarks.gpu.case import Inputs, Machine
from lightning_peft import DoRA, LoRA, PaCA, inject

ALPHA = 32.0
FACTORS = ("lora_A", "lora_B", "magnitude")

Adapt = Callable[[nn.Module, Inputs], list[Tensor]]


def layers(inputs: Inputs) -> list[str]:
    """Names of the layers that have factors, in the order in which gradients are compared."""
    return [name.removesuffix(".lora_A") for name in inputs if name.endswith(".lora_A")]


def rank(inputs: Inputs) -> int:
    """That of the factors."""
    return len(inputs[f"{layers(inputs)[0]}.lora_A"])


def scaling(inputs: Inputs) -> float:
    """alpha / r."""
    return ALPHA / rank(inputs)


def layer(machine: Machine, name: str, d_in: int, d_out: int, r: int) -> Inputs:
    """Weight and factors of a linear layer."""
    return {
        f"{name}.weight": machine.randn(d_out, d_in, scale=d_in**-0.5),
        **factors(machine, name, d_in, d_out, r),
    }


def factors(machine: Machine, name: str, d_in: int, d_out: int, r: int) -> Inputs:
    """Of an adapter; B is not zero, so that everything has a gradient."""
    return {
        f"{name}.lora_A": machine.randn(r, d_in, scale=d_in**-0.5, grad=True),
        f"{name}.lora_B": machine.randn(d_out, r, scale=0.1, grad=True),
    }


def filled(make: Callable[[], nn.Module], inputs: Inputs) -> nn.Module:
    """A model on the weights among the inputs, without memory of its own for them."""
    with torch.device("meta"):
        model = make()
    names = {name for name, _ in model.named_parameters()}
    model.load_state_dict({k: t.detach() for k, t in inputs.items() if k in names}, assign=True, strict=False)
    return model.requires_grad_(False).train()


def by_peft(dtype: torch.dtype | None = None, dropout: float = 0.0) -> Adapt:
    """HF PEFT, with factors in ``dtype``, or that of the inputs."""

    def adapt(model: nn.Module, inputs: Inputs) -> list[Tensor]:
        config = peft.LoraConfig(
            r=rank(inputs),
            lora_alpha=ALPHA,
            lora_dropout=dropout,
            target_modules=layers(inputs),
            use_dora=any(name.endswith(".magnitude") for name in inputs),
        )
        peft.inject_adapter_in_model(config, model)

        def owner(name: str, factor: str) -> tuple[nn.Module, str]:
            folder = "lora_magnitude_vector" if factor == "magnitude" else factor
            return getattr(model.get_submodule(name), folder)["default"], "weight"

        return _set(inputs, dtype, owner)

    return adapt


def by_us(dtype: torch.dtype | None = None, dropout: float = 0.0) -> Adapt:
    """This library, with factors in ``dtype``, or that of the inputs."""

    def adapt(model: nn.Module, inputs: Inputs) -> list[Tensor]:
        cls = DoRA if any(name.endswith(".magnitude") for name in inputs) else LoRA
        names = tuple(layers(inputs))
        inject(model, cls(r=rank(inputs), alpha=ALPHA, dropout=dropout, target_modules=names))
        return _set(inputs, dtype, lambda name, factor: (model.get_submodule(name).adapters["default"], factor))

    return adapt


def by_paca(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Our PaCA, with as many columns of each weight as the factors have ranks."""
    inject(model, PaCA(r=rank(inputs), alpha=ALPHA, target_modules=tuple(layers(inputs))))
    columns = [model.get_submodule(name).adapters["default"].columns for name in layers(inputs)]
    for each, name in zip(columns, layers(inputs), strict=True):
        each.data = each.data.to(inputs[f"{name}.lora_A"].dtype)
    return columns


def _set(inputs: Inputs, dtype: torch.dtype | None, owner: Callable[[str, str], tuple[nn.Module, str]]) -> list[Tensor]:
    """Give every factor its value; the parameters, in the order of the inputs."""
    leaves: list[Tensor] = []
    for key, value in inputs.items():
        name, _, factor = key.rpartition(".")
        if factor in FACTORS:
            module, attribute = owner(name, factor)
            parameter = nn.Parameter(value.detach().clone().to(dtype or value.dtype))
            setattr(module, attribute, parameter)
            leaves.append(parameter)
    return leaves
