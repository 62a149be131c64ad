"""SSF against its formula, computed by hooks behind the operations; and which operations it takes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import SSF, AdapterError, inject, merge
from lightning_peft.engine import adapters_of
from tests.methods.backbones import backbone, call, moved

# name -> operations that the paper leaves as they are
LEFT_OUT: dict[str, set[str]] = {
    "vit": {"head"},
    "swin": {"layers.1.downsample.reduction", "head.fc"},
    "convnext": {"head.fc"},
    "mixer": {"head"},
    "resnet": {"fc"},
    "bert": {"classifier"},
}
OPERATIONS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_every_operation_is_scaled_and_shifted_along_its_channels(name: str) -> None:
    model, reference = inject(backbone(name), SSF(modules_to_save=())), backbone(name)
    found = {path: adapter for path, _, adapter in adapters_of(moved(model))}
    operations = {path: m for path, m in reference.named_modules() if isinstance(m, OPERATIONS)}
    assert operations.keys() - found.keys() == LEFT_OUT[name]
    assert found.keys() <= operations.keys()

    def behind(adapter: Any, axis: int) -> Any:
        def hook(module: Any, args: Any, y: Tensor) -> Tensor:
            return (y.movedim(axis, -1) * adapter.scale + adapter.shift).movedim(-1, axis)

        return hook

    for path, adapter in found.items():
        layer = operations[path]
        maps = isinstance(layer, nn.Conv2d | nn.BatchNorm2d) or "2d" in type(layer).__name__  # ConvNeXt's LayerNorm2d
        layer.register_forward_hook(behind(adapter, 1 if maps else -1))
    expected = call(name, reference)
    torch.testing.assert_close(call(name, model), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(call(name, merge(model)), expected, rtol=1e-5, atol=1e-6)


def test_the_start_has_the_deviation_of_the_authors_code() -> None:
    model = inject(nn.Sequential(nn.Linear(2, 20_000), nn.LayerNorm(20_000)), SSF(modules_to_save=()))
    for _, _, adapter in adapters_of(model):
        for parameter, mean in ((adapter.scale, 1.0), (adapter.shift, 0.0)):
            assert parameter.mean().item() == pytest.approx(mean, abs=1e-3)
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
    exact = inject(backbone("vit"), SSF(init_std=0.0))
    torch.testing.assert_close(call("vit", exact), call("vit", backbone("vit")))


def test_the_head_is_trained_whole_beside_it() -> None:
    model = inject(backbone("swin"), SSF())
    in_place = {n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n}
    assert in_place == {"head.fc.weight", "head.fc.bias"}


def test_a_norm_without_a_bias_is_taken_by_name_alone_and_does_not_merge() -> None:
    build = lambda: nn.ModuleDict({"up": nn.Linear(3, 4), "norm": nn.RMSNorm(4)})  # noqa: E731
    assert [path for path, _, _ in adapters_of(inject(build(), SSF(modules_to_save=())))] == ["up"]
    model = moved(inject(build(), SSF(target_modules="norm", modules_to_save=())))
    (adapter,) = (adapter for _, _, adapter in adapters_of(model))
    x = torch.randn(2, 4)
    torch.testing.assert_close(model["norm"](x), nn.RMSNorm(4)(x) * adapter.scale + adapter.shift)  # type: ignore[index]
    with pytest.raises(AdapterError, match="no bias that could take the shift"):
        merge(model)


@pytest.mark.parametrize("unbatched", [False, True])
def test_channels_of_a_sequence_and_of_a_map_by_itself(unbatched: bool) -> None:
    for conv, x in ((nn.Conv1d(3, 5, 3), torch.randn(5, 3, 5)), (nn.Conv2d(3, 5, 3), torch.randn(5, 3, 5, 5))):
        x = x[0] if unbatched else x
        y = conv(x)
        model = moved(inject(nn.Sequential(conv), SSF(modules_to_save=())))
        (adapter,) = (adapter for _, _, adapter in adapters_of(model))
        axis = 0 if unbatched else 1
        expected = (y.movedim(axis, -1) * adapter.scale + adapter.shift).movedim(-1, axis)
        torch.testing.assert_close(model(x), expected)


def test_a_deviation_below_zero_is_refused() -> None:
    with pytest.raises(AdapterError, match="SSF: init_std must be .*, got -0.1"):
        SSF(init_std=-0.1)
