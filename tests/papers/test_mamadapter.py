"""MAM adapter: both halves together are each of them alone, stacked."""

import torch

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
