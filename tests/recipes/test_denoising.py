"""The denoising recipe against closed forms, and the pictures it is tried on."""

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_peft import PEFT, LoRA
from lightning_peft.recipes import Denoiser, DigitsData, PicturesData
from tests.recipes.test_images import trainer

pytest.importorskip("diffusers")

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
MODELS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        **BLOCKS,
        "num_class_embeds": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DConditionModel": {
        **BLOCKS,
        "cross_attention_dim": 5,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "DiTTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "patch_size": 2,
        "num_embeds_ada_norm": 3,
        "norm_num_groups": 1,
    },
    "SD3Transformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "patch_size": 2,
        "joint_attention_dim": 5,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 5,
        "pos_embed_max_size": 8,
    },
}
FLOW, DIFFUSION = "FlowMatchEulerDiscreteScheduler", "DDPMScheduler"


def denoiser(model: str = "DiTTransformer2DModel", **options: Any) -> Denoiser:
    channels = 2 if model == "DiTTransformer2DModel" else 1  # as DiT does, with a variance
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": channels}
    torch.manual_seed(0)
    return Denoiser(**{"num_classes": 3, "model": model, "model_kwargs": shape | MODELS.get(model, {})} | options)


def digits(**options: Any) -> DigitsData:
    return DigitsData(**{"digits": (0, 1, 2), "signed": True, "batch_size": 64} | options)


class Exact(nn.Module):
    """Predicts as if ``answers`` (classes + 1, 1, 8, 8) were all the pictures that there are."""

    def __init__(self, module: Denoiser, answers: Tensor) -> None:
        super().__init__()
        self.config, self.dtype, self.scheduler = module.model.config, torch.float32, module.scheduler
        self.register_buffer("answers", answers)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        picture = self.answers[class_labels]
        if hasattr(self.scheduler, "sigmas"):
            predicted = (x - picture) / (timestep / 1000).view(-1, 1, 1, 1)
        else:
            signal = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
            predicted = (x - signal.sqrt() * picture) / (1 - signal).sqrt()
        return type("Output", (), {"sample": predicted})


@pytest.mark.parametrize("scheduler", [FLOW, DIFFUSION])
def test_a_perfect_denoiser_samples_the_picture(scheduler: str) -> None:
    module = denoiser(scheduler=scheduler, guidance_scale=1.0, sampling_steps=7)
    answers = torch.rand(4, 1, 8, 8) * 2 - 1
    module.model = Exact(module, answers)
    torch.testing.assert_close(module.sample([2, 0, 2]), answers[[2, 0, 2]], rtol=0, atol=2e-3)
    assert module.sample().shape == (24, 1, 8, 8)


def test_guidance_goes_on_from_no_class_through_the_class() -> None:
    class Constant(Exact):
        def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
            return type("Output", (), {"sample": self.answers[class_labels].expand_as(x)})

    module = denoiser(scheduler=FLOW, guidance_scale=3.0, sampling_steps=5)
    speeds = torch.tensor([0.1, 0.2, 0.3, 0.7]).view(4, 1, 1, 1)
    module.model = Constant(module, speeds)
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    guided = 0.7 + 3 * (speeds[[0, 2]] - 0.7)
    torch.testing.assert_close(module.sample([0, 2], seed=4), (start - guided).clamp(-1, 1), rtol=0, atol=1e-5)


def test_flow_matching_mixes_as_the_scheduler_does() -> None:
    module = denoiser(scheduler=FLOW, scheduler_kwargs={"shift": 3.0})
    images = torch.randn(16, 1, 8, 8)
    noisy, times, target = module.noised(images, torch.Generator().manual_seed(1))
    noise = target + images
    torch.testing.assert_close(noisy, module.scheduler.scale_noise(images, times, noise))
    assert len(times.unique()) > 10


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_diffusion_has_the_target_of_the_scheduler(prediction: str) -> None:
    module = denoiser(scheduler_kwargs={"prediction_type": prediction})
    images = torch.randn(16, 1, 8, 8)
    noisy, times, target = module.noised(images, torch.Generator().manual_seed(1))
    signal = module.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    noise = (noisy - signal.sqrt() * images) / (1 - signal).sqrt()
    expected = {
        "epsilon": noise,
        "sample": images,
        "v_prediction": signal.sqrt() * noise - (1 - signal).sqrt() * images,
    }
    # divided by a small root where there is little noise
    torch.testing.assert_close(target, expected[prediction], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheduler", [FLOW, DIFFUSION])
@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_model_trains_with_adapters_and_samples(model: str, scheduler: str) -> None:
    module = denoiser(model, scheduler=scheduler, sampling_steps=2, lr=0.01)
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    fitting = trainer(limit_train_batches=2, callbacks=[PEFT(LoRA(r=2, target_modules=["to_q", "to_v"]))])
    fitting.fit(module, digits())
    assert {"train_loss", "val_loss"} <= fitting.callback_metrics.keys()
    after = dict(module.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(p.detach().any() for name, p in after.items() if name.endswith("lora_B"))
    assert module.sample([0, 1]).shape == (2, 1, 8, 8)
    assert module.training


def test_labels_are_told_as_classes_or_as_text() -> None:
    labels = torch.tensor([2, 3])
    seen: dict[str, Any] = {}
    for model in MODELS:
        module = denoiser(model)
        module.model.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
        module(torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]), labels)
        if "encoder_hidden_states" in seen:
            text = torch.tensor([[[0, 0, 0, 0, 1.0], [0, 0, 1, 0, 0]], [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]]])
            assert torch.equal(seen["encoder_hidden_states"], text)
            assert "pooled_projections" not in seen or torch.equal(seen["pooled_projections"], text[:, 1])
        else:
            assert torch.equal(seen["class_labels"], labels)
        seen.clear()


class Shown(Denoiser):
    def image_embeds(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2]


def test_images_are_shown_but_where_no_class_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = denoiser("UNet2DConditionModel", sampling_steps=1, label_dropout=0.5), []
    module.__class__ = Shown
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    module.model.register_forward_pre_hook(lambda m, args, given: seen.append(given), with_kwargs=True)
    images = torch.arange(1.0, 129).view(2, 1, 8, 8)
    shown = torch.tensor([[1.0, 2], [65, 66]])
    module.sample([1, 2], images=images)
    assert torch.equal(seen[-1]["added_cond_kwargs"]["image_embeds"], torch.cat([torch.zeros(2, 2), shown]))
    module.validation_step((images, torch.tensor([1, 2])), 0)
    assert torch.equal(seen[-1]["added_cond_kwargs"]["image_embeds"], shown)
    torch.manual_seed(2)
    module.training_step((images.repeat(8, 1, 1, 1), torch.tensor([1, 2]).repeat(8)), 0)
    told = seen[-1]["encoder_hidden_states"][:, 1, 3] == 0
    assert 0 < told.sum() < 16
    assert torch.equal(seen[-1]["added_cond_kwargs"]["image_embeds"], shown.repeat(8, 1) * told[:, None])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_labels_are_dropped_as_asked_for(share: float) -> None:
    module, seen = denoiser("UNet2DModel", label_dropout=share), []
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    module.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    module.training_step((torch.zeros(1000, 1, 8, 8), torch.ones(1000, dtype=torch.long)), 0)
    assert set(seen[0].tolist()) <= {1, 3}
    assert abs((seen[0] == 3).float().mean() - share) < 0.05  # three deviations


def test_validation_measures_the_same_noise_each_time() -> None:
    module = denoiser()
    losses = [trainer().validate(module, digits(), verbose=False)[0]["val_loss"] for _ in range(2)]
    assert losses[0] == losses[1]


def test_sampling_leaves_random_numbers_and_modes_alone() -> None:
    module = denoiser(sampling_steps=2).eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = module.sample([1], seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert not module.training
    assert torch.equal(module.sample([1], seed=5), first)
    assert not torch.equal(module.sample([1], seed=6), first)
    module.noised(torch.zeros(2, 1, 8, 8))
    assert torch.equal(module.sample([1], seed=5), first)


def test_half_precision_samples(tmp_path: Any) -> None:
    module = denoiser("UNet2DConditionModel", sampling_steps=2)
    trainer(max_steps=1, precision="bf16-true", callbacks=[PEFT(LoRA(r=2))]).fit(module, digits())
    assert module.model.conv_in.weight.dtype == torch.bfloat16
    assert module.sample([1]).isfinite().all()


def test_weights_come_from_a_folder_of_diffusers(tmp_path: Any) -> None:
    module = denoiser("UNet2DConditionModel", sampling_steps=2)
    module.model.save_pretrained(tmp_path)
    loaded = Denoiser(num_classes=3, pretrained=str(tmp_path), sampling_steps=2)
    assert torch.equal(loaded.sample([1]), module.sample([1]))
    assert all(part.training for part in loaded.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": "somewhere"}, "give either model or pretrained"),
        ({"model": None}, "give either model or pretrained"),
        ({"num_classes": 4}, r"room for 4 different class_labels, and 4 classes need 5\. Build it larger"),
        ({"model": "UNet3"}, r"diffusers has no class 'UNet3'\. Take one"),
        ({"model": "AutoencoderKL", "model_kwargs": {}}, "AutoencoderKL takes no condition"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoiser(**options)


def test_text_needs_room_for_its_begin() -> None:
    with pytest.raises(ValueError, match="room for 5 different encoder_hidden_states, and 4 classes need 6"):
        denoiser("UNet2DConditionModel", num_classes=4)


def everything(data: L.LightningDataModule) -> tuple[Tensor, Tensor]:
    data.setup("fit")
    splits = [split.tensors for split in data.splits.values()]  # type: ignore[attr-defined]
    return torch.cat([images for images, _ in splits]), torch.cat([labels for _, labels in splits])


def as_set(images: Any) -> set[bytes]:
    return {np.ascontiguousarray(image).tobytes() for image in images}


def test_patches_are_those_of_the_pictures_and_none_overlap() -> None:
    from skimage import data

    images, labels = everything(PicturesData(pictures=("rocket", "coffee"), size=50))
    assert images.shape[1:] == (3, 50, 50)
    for label, name in enumerate(("rocket", "coffee")):
        picture = getattr(data, name)()
        rows, columns = (n // 50 for n in picture.shape[:2])
        expected = [
            picture[50 * i : 50 * i + 50, 50 * j : 50 * j + 50].transpose(2, 0, 1)
            for i in range(rows)
            for j in range(columns)
        ]
        found = ((images[labels == label] + 1) * 127.5).round().to(torch.uint8).numpy()
        assert len(found) == len(expected)
        assert as_set(found) == as_set(expected)


def test_shrunken_patches_are_means_of_squares() -> None:
    from skimage import data

    images, _ = everything(PicturesData(pictures=("astronaut",), size=64, shrink=4))
    mean = data.astronaut().reshape(128, 4, 128, 4, 3).mean((1, 3)).transpose(2, 0, 1) / 127.5 - 1
    corner = torch.from_numpy(mean[:, :64, 64:]).float()
    assert (images - corner).abs().amax((1, 2, 3)).min() < 1e-5


def test_pictures_go_by_their_seed() -> None:
    one, same, other = (everything(PicturesData(seed=seed))[1] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert sorted(one.tolist()) == sorted(other.tolist())


@pytest.mark.parametrize("pictures", [("astronaut", "monalisa"), ()])
def test_unknown_pictures_are_refused(pictures: Any) -> None:
    with pytest.raises(ValueError, match=r"must be of astronaut, chelsea, .*, got (monalisa|none)"):
        PicturesData(pictures=pictures)


def test_too_large_patches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chelsea has 300 x 451 pixels, fewer than a patch of 128 x 4\. Take"):
        PicturesData(pictures=("chelsea",), size=128, shrink=4).setup()


def test_thick_strokes_and_sizes_of_digits() -> None:
    ink = load_digits().images / 16
    thick = np.stack([ndimage.grey_dilation(picture, size=3) for picture in ink])
    images, _ = everything(digits(digits=tuple(range(10)), thick=True))
    assert as_set(images.numpy()) == as_set((2 * thick - 1).astype(np.float32))
    large, _ = everything(digits(size=16))
    small, _ = everything(digits())
    assert large.shape[1:] == (1, 16, 16)
    assert large.min() >= -1
    assert large.max() <= 1
    # a picture that was enlarged has the means of the small one, but for the overshoot that was cut
    assert (nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.1
