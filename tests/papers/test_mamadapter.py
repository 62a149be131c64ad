"""MAM adapter: both halves together are each of them alone, stacked."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft import MAMAdapter, ParallelAdapter, PrefixTuning, inject
from lightning_peft.engine import adapters_of
from tests.methods.backbones import moved, tiny, trainable


def test_it_is_a_prefix_and_a_parallel_adapter() -> None:
    method = MAMAdapter(num_virtual_tokens=3, r=2, scaling=1.5, activation="tanh")
    model, x = moved(inject(tiny(method), method)), torch.randn(2, 13, 7)
    apart = inject(tiny(method), PrefixTuning(num_virtual_tokens=3), name="prefix")
    inject(apart, ParallelAdapter(r=2, scaling=1.5, activation="tanh"), name="beside")
    values = {f"{path}.{name}": p for path, _, a in adapters_of(model) for name, p in a.named_parameters()}
    with torch.no_grad():
        for path, _, adapter in adapters_of(apart):
            for name, parameter in adapter.named_parameters():
                parameter.copy_(values.pop(f"{path}.{name}"))
    assert not values
    assert len(trainable(model)) == 2 * (2 + 4)
    torch.testing.assert_close(model(x), apart(x))
    assert not torch.allclose(model(x), tiny(method)(x), atol=1e-2)


def test_what_is_scaled_before_the_residual_gets_its_branch_behind_the_scale() -> None:
    """The branch reads what the network does, and the residual stream gets it unscaled."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 3, "depth": 2, "num_classes": 5}
    build = lambda: timm.create_model("vit_tiny_patch16_224", init_values=0.1, **sizes).double().eval()  # noqa: E731
    base, model = build(), build()
    base.load_state_dict(model.state_dict())
    moved(inject(model, MAMAdapter(num_virtual_tokens=3, r=2, scaling=1.5)))
    found = {path: adapter for path, _, adapter in adapters_of(model)}
    assert {path for path, a in found.items() if hasattr(a, "up")} == {"blocks.0.ls2", "blocks.1.ls2"}
    inject(base, PrefixTuning(num_virtual_tokens=3))
    for path, _, prefix in adapters_of(base):
        prefix.load_state_dict(found[path].state_dict())
    seen: list[Tensor] = []
    for i, block in enumerate(base.blocks):

        def add(module: Any, args: Any, y: Tensor, a: Any = found[f"blocks.{i}.ls2"]) -> Tensor:
            return y + 1.5 * ((seen.pop() @ a.down.T + a.down_bias).relu() @ a.up.T + a.up_bias)

        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        block.ls2.register_forward_hook(add)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), base(x))
