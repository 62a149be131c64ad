"""Layouts: told by structure, and maps that come back as they went."""

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.engine import AdapterError, TargetError
from lightning_peft.parts.blocks import find_blocks, stage_modules, stages_of
from lightning_peft.parts.layout import (
    as_map,
    channels_first,
    from_map,
    grid_of,
    layers_of,
    own_of,
    own_place,
    resample,
    width_in,
    width_of,
    with_own,
)
from tests.methods.backbones import backbone

# of the last block that is found, and of the blocks before it: (features, channels first)
LAYOUTS = {
    "encoder": (12, False),
    "vit": (12, False),
    "swin": (16, False),
    "convnext": (12, True),
    "mixer": (12, False),
    "llama": (12, False),
    "bert": (12, False),
    "gpt2": (12, False),
    "dit": (12, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_width_and_channels_of_blocks(name: str) -> None:
    model = backbone(name)
    last = find_blocks(model)[-1]
    module = model.get_submodule(last)
    assert (width_of(module, last, "Test"), channels_first(module)) == LAYOUTS[name]
    assert width_in(module, last, "Test") == LAYOUTS[name][0]


def test_a_block_of_convolutions_may_take_other_features_than_it_answers_with() -> None:
    block = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Linear(5, 7))
    assert channels_first(block)
    assert (width_in(block, "block", "Test"), width_of(block, "block", "Test")) == (3, 7)
    assert [name for name, _, _ in layers_of(block)] == ["0", "1", "2"]


def test_a_norm_of_maps_is_known_by_its_name() -> None:
    class LayerNorm2d(nn.LayerNorm):
        pass

    assert channels_first(nn.Sequential(LayerNorm2d(4)))
    assert not channels_first(nn.Sequential(nn.LayerNorm(4), nn.Conv2d(4, 4, 1)))
    assert not channels_first(nn.Sequential(nn.ReLU()))


def test_a_module_without_layers_has_no_width() -> None:
    with pytest.raises(TargetError, match=r"Test: the width of 'act', a ReLU, cannot be told.*\. Name modules"):
        width_of(nn.ReLU(), "act", "Test")


@pytest.mark.parametrize(
    ("tokens", "entered", "expected"),
    [(8, (2, 4), ((2, 4), 0)), (11, (2, 4), ((2, 4), 3)), (2, (2, 4), ((1, 2), 0)), (9, (7,), ((7,), 2))],
)
def test_tokens_lie_as_the_first_layer_left_them(
    tokens: int, entered: tuple[int, ...], expected: tuple[tuple[int, ...], int]
) -> None:
    assert grid_of(torch.zeros(3, tokens, 5), False, entered, "Test") == expected


@pytest.mark.parametrize(("h", "first"), [(torch.zeros(2, 3, 5, 7), False), (torch.zeros(2, 3, 5, 7), True)])
def test_a_map_has_its_own_places(h: torch.Tensor, first: bool) -> None:
    assert grid_of(h, first, (40, 40), "Test") == ((3, 5), 0)
    assert grid_of(torch.zeros(2, 9, 7), True, (40,), "Test") == ((9,), 0)  # a sequence, its channels first


@pytest.mark.parametrize("tokens", [3, 5, 7])
def test_tokens_that_fit_no_grid_are_refused(tokens: int) -> None:
    with pytest.raises(AdapterError, match=rf"Test: {tokens} tokens cannot lie in the grid 2 x 4.*\. Name"):
        grid_of(torch.zeros(3, tokens, 5), False, (2, 4), "Test")


def test_a_grid_that_does_not_divide_is_refused() -> None:
    with pytest.raises(AdapterError, match="4 tokens cannot lie in the grid 5 x 4"):
        grid_of(torch.zeros(3, 4, 5), False, (5, 4), "Test")


def test_tokens_become_a_map_and_come_back() -> None:
    h = torch.randn(2, 3 + 8, 5)
    places, prefix = as_map(h, (2, 4), 3)
    assert places.shape == (2, 5, 2, 4)
    assert prefix is not None
    for row in range(2):
        for column in range(4):
            assert torch.equal(places[:, :, row, column], h[:, 3 + 4 * row + column])
    assert torch.equal(from_map(places, True, prefix), h)
    h = torch.randn(2, 3, 4, 5)
    places, prefix = as_map(h, (3, 4), 0)
    assert torch.equal(places, h.permute(0, 3, 1, 2))
    assert prefix is None
    assert torch.equal(from_map(places, False), h)


def test_resampling_averages_or_interpolates() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(resample(x, (2, 2)), nn.functional.avg_pool2d(x, 2))
    grown = resample(x, (8, 8))
    torch.testing.assert_close(grown.mean(), x.mean())
    assert len(grown.unique()) > 16  # between the values, not copies of them
    assert resample(x, (4, 4)) is x
    assert resample(x[0], (2,)).shape == (1, 4, 2)
    # rows are fewer, columns more: all between the values
    assert resample(torch.tensor([[[[0.0, 8.0], [2.0, 10.0]]]]), (1, 4)).tolist() == [[[[1.0, 3.0, 7.0, 9.0]]]]


def test_stages_and_the_modules_that_hold_them() -> None:
    model = backbone("swin")
    stages = stages_of(find_blocks(model))
    assert stages == [["layers.0.blocks.0"], ["layers.1.blocks.0"]]
    assert stage_modules(model, stages) == ["layers.0", "layers.1"]


def test_the_stream_of_a_block_is_told_from_what_it_returns() -> None:
    from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    flux = {"dim": 8, "num_attention_heads": 2, "attention_head_dim": 4}
    text_first = (
        JointTransformerBlock(8, 2, 4),
        JointTransformerBlock(8, 2, 4, context_pre_only=True),
        FluxTransformerBlock(**flux),
        FluxSingleTransformerBlock(**flux),
    )
    assert [own_place(block) for block in text_first] == [1, 1, 1, 1]
    image_first = (CogVideoXBlock(8, 2, 4, 8), BasicTransformerBlock(8, 2, 4), nn.Linear(2, 3))
    assert [own_place(block) for block in image_first] == [0, 0, 0]
    adapted = inject(nn.ModuleList([text_first[0]]), LoRA(r=2))[0]
    assert own_place(adapted) == 1

    answer = tuple(torch.zeros(n) for n in (1, 2, 3))
    assert len(own_of(answer, 1)) == 2
    assert [len(part) for part in with_own(answer, 1, torch.zeros(7))] == [1, 7, 3]
    assert own_of(answer[2], 1) is answer[2]
    assert len(with_own(answer[2], 1, torch.zeros(7))) == 7
