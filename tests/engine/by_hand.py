"""References that know nothing of slots: the base with its weights changed by hand."""

import copy

import torch
from torch import Tensor, nn

from lightning_peft import LoRA, inject
from lightning_peft.engine import adapters_of
from tests.methods.backbones import moved


def lora(base: nn.Module, **arguments: object) -> tuple[nn.Module, nn.Module]:
    """(``base`` with LoRA off its initial point, a copy of ``base`` whose weights were changed by hand)."""
    arguments = {"r": 2, "alpha": 6.0} | arguments
    reference = copy.deepcopy(base)
    model = moved(inject(base, LoRA(**arguments)))  # type: ignore[arg-type]
    for path, _, adapter in adapters_of(model):
        parameter = reference.get_submodule(path)._parameters[adapter.site.weight]
        delta = 6.0 / 2 * torch.einsum("or,r...->o...", adapter.lora_B, adapter.lora_A)
        with torch.no_grad():
            parameter += delta.T if adapter.site.transposed else delta
    return model, reference


def assert_same(model: nn.Module, reference: nn.Module, *inputs: Tensor, **options: object) -> None:
    """Equal outputs in training and evaluation, with and without gradients; float64 leaves the order of sums."""
    for training in (True, False):
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                ours = model.train(training)(*inputs, **options)
                expected = reference.train(training)(*inputs, **options)
            if not isinstance(ours, tuple):
                ours, expected = (ours,), (expected,)
            for one, other in zip(ours, expected, strict=True):
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
