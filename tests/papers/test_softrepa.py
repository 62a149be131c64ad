"""SoftREPA against base models whose blocks are given longer texts by hooks, as the code of the authors does."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoRA, SoftREPA, contrastive_denoising_loss, disabled, inject, set_active, unload
from lightning_peft.engine import AdapterError, TargetError, adapters_of
from tests.methods.backbones import assert_unchanged, backbone, moved, snapshot, trainable
from tests.papers.denoisers import NOISE, denoise_text, dit, unet

diffusers = pytest.importorskip("diffusers")

STEPS = torch.tensor([3, 505, 999, 250])


def draws(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(model: nn.Module) -> nn.Module:
    """In float64, for evaluation, and with values in all that starts at zero."""
    return moved(model.double().eval(), seed=9)


def built(kind: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return filled(getattr(diffusers, kind)(**options))


def sd3(n_layers: int = 3) -> nn.Module:
    return built(
        "SD3Transformer2DModel",
        sample_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=n_layers,
        attention_head_dim=4,
        num_attention_heads=3,
        joint_attention_dim=6,
        caption_projection_dim=12,
        pooled_projection_dim=5,
        pos_embed_max_size=8,
    )


TEXT, POOLED = draws(4, 5, 6), draws(4, 5, seed=6)


def call_sd3(model: Any, steps: Any = STEPS, text: Tensor = TEXT, **options: Any) -> Tensor:
    given = {"encoder_hidden_states": text, "pooled_projections": POOLED[: len(text)], "timestep": steps}
    return model(NOISE[: len(text)], **given, **options).sample


def call_unet(model: Any, steps: Any = STEPS, text: Tensor = TEXT, **options: Any) -> Tensor:
    return model(NOISE[: len(text)], steps, encoder_hidden_states=text, **options).sample


def by_hooks(
    base: Any, blocks: dict[str, int], tokens: list[Tensor], start: int, n: int, lengths: list[int] | None = None
) -> Any:
    """``base`` whose ``blocks`` see their own of ``tokens`` (B, p, C) behind ``start`` of the last n of their text."""

    def longer(block: nn.Module, args: Any, kwargs: dict[str, Any], row: int) -> Any:
        text = kwargs["encoder_hidden_states"][:, -n:]
        if row >= 0:
            text = torch.cat([text[:, :start], tokens[row].expand(len(text), -1, -1), text[:, start:]], dim=1)
            mask = kwargs.get("encoder_attention_mask")
            if mask is not None:
                new = torch.zeros(*mask.shape[:2], tokens[row].shape[1])
                kwargs["encoder_attention_mask"] = torch.cat([mask[..., :start], new, mask[..., start:]], dim=-1)
        if lengths is not None:
            lengths.append(text.shape[1])
        return args, kwargs | {"encoder_hidden_states": text}

    for name, row in blocks.items():
        block = base.get_submodule(name)
        block.register_forward_pre_hook(lambda *given, row=row: longer(*given, row), with_kwargs=True)
    return base


def leaves(source: Any) -> list[Tensor]:
    """The parameters of an adapter, apart."""
    return [p.detach().clone().requires_grad_() for p in source.parameters()]


def assert_same_gradients(source: Any, parameters: list[Tensor]) -> None:
    for ours, theirs in zip(source.parameters(), parameters, strict=True):
        assert ours.grad.any()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_times", [100, 10, None])
@pytest.mark.parametrize(("n_layers", "lengths"), [(2, [9, 9, 5]), (5, [9, 9, 9])])
def test_sd3_follows_the_code_of_the_authors(n_layers: int, lengths: list[int], num_times: int | None) -> None:
    model = moved(inject(sd3(), SoftREPA(n_layers=n_layers, num_times=num_times)))
    source, K = model.adapters["default"], min(n_layers, 3)
    assert source.table.shape == (K, 4, 6)
    base, parameters, seen = sd3(), leaves(source), []
    tokens = base.context_embedder(parameters[0])[:, None]
    if num_times:
        # of 1000 steps: row int(t) // 10 where there are 100
        tokens = tokens + parameters[1][STEPS // (1000 // num_times)].reshape(4, K, 1, 12).transpose(0, 1)
    blocks = {f"transformer_blocks.{i}": i if i < K else -1 for i in range(3)}
    y, expected = call_sd3(model), call_sd3(by_hooks(base, blocks, list(tokens), 0, 5, seen))
    assert seen == lengths
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert (y - call_sd3(sd3())).abs().max() > 0.01
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(source, parameters)
    assert {name.partition(".")[0] for name in trainable(model)} == {"adapters"}


STAGES: dict[str, dict[str, Any]] = {
    "down": {"down_blocks.1": 0},
    "mid": {"mid_block": 0},
    "up": {"up_blocks.0": 0},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stages", [("down",), ("mid",), ("down", "mid", "up")], ids=["down", "mid", "all"])
def test_a_unet_follows_the_code_of_the_authors(stages: Any, masked: bool) -> None:
    model = moved(inject(unet(), SoftREPA(stages=stages)))
    source = model.adapters["default"]
    assert [tuple(p.shape) for p in source.parameters()] == [(1, 4, 6), (100, 6)]
    base, parameters = unet(), leaves(source)
    tokens = parameters[0] + parameters[1][STEPS // 10][:, None]
    blocks = {name: row for stage in stages for name, row in STAGES[stage].items()}
    mask = (torch.arange(5) < torch.tensor([[3], [5], [1], [2]])).long() if masked else None
    expected = call_unet(by_hooks(base, blocks, [tokens], 1, 5), encoder_attention_mask=mask)
    y = call_unet(model, encoder_attention_mask=mask)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert not masked or (y - call_unet(model)).abs().max() > 1e-4
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(source, parameters)


def test_tokens_of_a_unet_stand_behind_the_beginning_of_the_text() -> None:
    # attention answers the same wherever they stand, so this is looked up
    model, seen = moved(inject(unet(), SoftREPA(num_times=None))), {}
    for name, module in model.named_modules():
        if name.endswith("attn2.to_k"):
            stage = name.partition(".")[0]
            module.register_forward_pre_hook(lambda _, args, stage=stage: seen.update({stage: args[0]}))
    call_unet(model)
    tokens = model.adapters["default"].table.expand(4, -1, -1)
    torch.testing.assert_close(seen["down_blocks"], torch.cat([TEXT[:, :1], tokens, TEXT[:, 1:]], dim=1))
    assert torch.equal(seen["mid_block"], TEXT)
    assert torch.equal(seen["up_blocks"], TEXT)


def pixart() -> nn.Module:
    return built(
        "PixArtTransformer2DModel",
        num_attention_heads=3,
        attention_head_dim=4,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        cross_attention_dim=12,
        caption_channels=6,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
        use_additional_conditions=False,
    )


def call_pixart(model: Any, **options: Any) -> Tensor:
    more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, **options}
    return model(NOISE, encoder_hidden_states=TEXT, timestep=STEPS, **more).sample


def test_blocks_with_cross_attention_see_a_projected_table() -> None:
    model = moved(inject(pixart(), SoftREPA(n_layers=1)))
    source, base = model.adapters["default"], pixart()
    tokens = base.caption_projection(source.table) + source.times[STEPS // 10][:, None]
    mask = (torch.arange(5) < torch.tensor([[3], [5], [1], [2]])).long()
    reference = by_hooks(base, {"transformer_blocks.0": 0}, [tokens], 0, 5)
    expected = call_pixart(reference, encoder_attention_mask=mask)
    torch.testing.assert_close(call_pixart(model, encoder_attention_mask=mask), expected, rtol=1e-6, atol=1e-6)
    assert (expected - call_pixart(pixart(), encoder_attention_mask=mask)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("steps", "row"),
    [(0, 0), (9, 0), (10, 1), (505.9, 50), (torch.tensor(999), 99), (torch.tensor([1000.0]), 99), (-1, 0)],
)
def test_which_row_of_the_table_of_time_a_step_has(steps: Any, row: int) -> None:
    model = inject(unet(), SoftREPA())
    source = model.adapters["default"]
    tokens = source.tokens(TEXT, steps, model)
    torch.testing.assert_close(tokens[0], (source.table + source.times[row]).detach().expand(1, 4, 6))
    one = call_unet(moved(model), steps)  # one step for all samples is the same as each having it
    torch.testing.assert_close(one, call_unet(model, torch.as_tensor(steps).reshape(-1).expand(4)))


def test_a_step_too_many_does_not_touch_those_of_other_samples() -> None:
    source = inject(unet(), SoftREPA()).adapters["default"]
    (tokens,) = source.tokens(TEXT, torch.tensor([1000, 500, 30, 0]), nn.Identity())
    torch.testing.assert_close(tokens, (source.table + source.times[[99, 50, 3, 0]][:, None]).detach())


def test_the_start_is_small_and_random() -> None:
    for model in (inject(sd3(), SoftREPA(n_layers=3, num_virtual_tokens=50)), inject(unet(), SoftREPA())):
        source = model.adapters["default"]
        assert source.times.std().item() == pytest.approx(0.02, rel=0.1)
        assert source.times.mean().abs() < 0.003
        assert source.table.std().item() == pytest.approx(0.02, rel=0.5)
    again = inject(unet(), SoftREPA()).adapters["default"]
    assert torch.equal(again.table, source.table)


def test_count_of_stable_diffusion_3() -> None:
    with torch.device("meta"):
        base = diffusers.SD3Transformer2DModel(
            num_layers=6, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536
        )
    method = SoftREPA()
    assert method.total_trainable(method.targets(base)) == 81_920 + 768_000
    assert sum(p.numel() for p in trainable(inject(base, method)).values()) == 849_920


CALLS = {"sd3": (sd3, call_sd3), "unet": (unet, call_unet)}
every_model = pytest.mark.parametrize(("make", "call"), CALLS.values(), ids=CALLS)


@every_model
def test_activation_checkpoints_see_the_step_of_their_own_call(make: Any, call: Any) -> None:
    start = moved(inject(make(), SoftREPA(num_virtual_tokens=2, stages=("down", "mid", "up"))))

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = copy.deepcopy(start).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        # two calls at other steps and for other texts, before one backward pass
        first, second = call(model), call(model, torch.tensor([900, 40, 350, 777]), draws(4, 5, 6, seed=8))
        (first.square().sum() + second.pow(3).sum()).backward()
        return {name: p.grad for name, p in trainable(model).items()}

    plain, again = gradients(False), gradients(True)
    assert plain["adapters.default.times"].any(1).sum() == 8, "a row for each step"
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-6, atol=1e-8)


def test_a_denoiser_is_traced_as_one_graph() -> None:
    torch._dynamo.reset()
    model = moved(inject(sd3(2), SoftREPA()))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(call_sd3(compiled), call_sd3(model))


@every_model
def test_guidance_gives_each_half_what_it_gets_alone(make: Any, call: Any) -> None:
    model, text = moved(inject(make(), SoftREPA())), torch.cat([torch.zeros_like(TEXT[:2]), TEXT[:2]])

    def part(rows: slice) -> Tensor:
        if call is call_unet:
            return model(NOISE[rows], STEPS[rows], encoder_hidden_states=text[rows]).sample
        more = {"pooled_projections": POOLED[rows], "timestep": STEPS[rows]}
        return model(NOISE[rows], encoder_hidden_states=text[rows], **more).sample

    expected = torch.cat([part(slice(0, 2)), part(slice(2, 4))])
    torch.testing.assert_close(part(slice(None)), expected, rtol=1e-6, atol=1e-6)


@every_model
def test_nothing_is_left_behind(make: Any, call: Any) -> None:
    base = make().requires_grad_(False)  # of weights that train, torch computes some products in another order
    before, expected = snapshot(base), call(base)
    model = moved(inject(base, SoftREPA()))
    assert not torch.equal(call(model), expected)
    assert call(model).shape == expected.shape
    with disabled(model):
        assert torch.equal(call(model), expected)
    assert_unchanged(unload(model), before)
    assert torch.equal(call(model), expected)


def test_layers_that_are_left_out_are_passed_over() -> None:
    model = moved(inject(sd3(), SoftREPA(n_layers=2, num_times=None)))
    source = model.adapters["default"]
    for skipped in ([0], [1]):
        base = sd3()
        tokens = list(base.context_embedder(source.table)[:, None])
        reference = by_hooks(base, {f"transformer_blocks.{i}": (0, 1, -1)[i] for i in range(3)}, tokens, 0, 5)
        expected = call_sd3(reference, skip_layers=skipped)
        torch.testing.assert_close(call_sd3(model, skip_layers=skipped), expected, rtol=1e-6, atol=1e-6)


def test_lora_on_the_projection_changes_the_tokens_with_the_text() -> None:
    model = inject(sd3(), SoftREPA(num_times=None))
    model = moved(inject(model, LoRA(r=2, target_modules="context_embedder"), name="lora"))
    lora, base = model.context_embedder.adapters["lora"], sd3()
    base.context_embedder.weight.data += (lora.scaling * lora.lora_B @ lora.lora_A).detach()
    tokens = list(base.context_embedder(model.adapters["default"].table)[:, None])
    expected = call_sd3(by_hooks(base, {f"transformer_blocks.{i}": i for i in range(3)}, tokens, 0, 5))
    torch.testing.assert_close(call_sd3(model), expected, rtol=1e-6, atol=1e-6)


def test_two_of_them_stand_side_by_side() -> None:
    model = inject(sd3(), SoftREPA(n_layers=1, num_times=None))
    model = moved(inject(model, SoftREPA(n_layers=2, num_virtual_tokens=3, num_times=None), name="second"))
    base, seen = sd3(), []
    first, second = (base.context_embedder(model.adapters[name].table)[:, None] for name in ("default", "second"))
    tokens = [torch.cat([second[0], first[0]], dim=1), second[1]]
    blocks = {f"transformer_blocks.{i}": (0, 1, -1)[i] for i in range(3)}
    expected = call_sd3(by_hooks(base, blocks, tokens, 0, 5, seen))
    assert seen == [12, 8, 5]
    torch.testing.assert_close(call_sd3(model), expected, rtol=1e-6, atol=1e-6)
    set_active(model, "default")
    expected = call_sd3(by_hooks(sd3(), {"transformer_blocks.0": 0}, [first[0]], 0, 5))
    # the text is not cut back here by a hook on the second block
    assert not torch.allclose(call_sd3(model), expected, atol=1e-6)
    blocks = {f"transformer_blocks.{i}": (0, -1, -1)[i] for i in range(3)}
    expected = call_sd3(by_hooks(sd3(), blocks, [first[0]], 0, 5))
    torch.testing.assert_close(call_sd3(model), expected, rtol=1e-6, atol=1e-6)


def test_two_of_them_act_in_the_stages_that_each_has_chosen() -> None:
    model = inject(unet(), SoftREPA(stages=("down",), num_times=None))
    model = moved(inject(model, SoftREPA(stages=("down", "up"), num_times=None), name="second"))
    first, second = (model.adapters[name].table for name in ("default", "second"))
    tokens = [torch.cat([second, first], dim=1), second]
    expected = call_unet(by_hooks(unet(), {"down_blocks.1": 0, "up_blocks.0": 1}, tokens, 1, 5))
    torch.testing.assert_close(call_unet(model), expected, rtol=1e-6, atol=1e-6)


def test_autocast_keeps_the_parameters_and_the_answer() -> None:
    model = moved(inject(sd3().float(), SoftREPA()))

    def call() -> Tensor:
        given = {"encoder_hidden_states": TEXT.float(), "pooled_projections": POOLED.float(), "timestep": STEPS}
        return model(NOISE.float(), **given).sample

    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        y = call()
    assert (y.float() - expected).norm() < 0.05 * expected.norm()  # bfloat16 keeps 8 bits
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in trainable(model).values()} == {torch.float32}


def flux() -> nn.Module:
    return built(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(4, 4, 8),
    )


def test_models_whose_text_takes_no_further_tokens_are_refused() -> None:
    with pytest.raises(TargetError, match=r"DiTTransformer2DModel holds no module that is given a text.*\. Choose a"):
        inject(dit(), SoftREPA())
    with pytest.raises(TargetError, match=r"UNet2DModel holds no module"):
        inject(backbone("unet"), SoftREPA())
    base = flux()
    before = snapshot(base)
    with pytest.raises(TargetError, match=r"'transformer_blocks.0' is given a table of positions \(image_rotary_emb\)"):
        inject(base, SoftREPA())
    assert_unchanged(base, before)


def test_stages_are_some_of_three_that_look_at_a_text() -> None:
    for wrong in ("down", (), ("down", "middle"), ["left"]):
        with pytest.raises(AdapterError, match=r"SoftREPA: stages must be some of 'down', 'mid', 'up', got"):
            SoftREPA(stages=wrong)
    down = ("DownBlock2D", "DownBlock2D")
    base = diffusers.UNet2DConditionModel.from_config({**unet().config, "down_block_types": down})
    with pytest.raises(TargetError, match=r"none of stages=\('down',\) looks at a text. Name .* 'mid', 'up'\."):
        inject(base, SoftREPA())


def test_of_several_denoisers_one_is_named() -> None:
    both = nn.ModuleDict({"unet": unet(), "control": unet(), "vae": nn.Linear(2, 2)})
    with pytest.raises(TargetError, match=r"2 modules look at a text \('unet', 'control'\). Name the denoiser"):
        inject(both, SoftREPA())
    with pytest.raises(TargetError, match=r"module 'unit' is no denoiser.* Did you mean 'unet'\?"):
        inject(both, SoftREPA(module="unit"))
    model = moved(inject(both, SoftREPA(module="unet")))
    assert {path.partition(".")[0] for path, _, _ in adapters_of(model)} == {"unet"}
    assert torch.equal(denoise_text(model["control"]), denoise_text(unet()))
    assert not torch.allclose(denoise_text(model["unet"]), denoise_text(unet()), atol=1e-3)


def test_a_model_that_puts_tokens_of_its_own_beside_the_text_is_refused() -> None:
    base = built(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        in_channels=3,
        out_channels=3,
        num_mmdit_layers=2,
        num_single_dit_layers=1,
        attention_head_dim=4,
        num_attention_heads=3,
        joint_attention_dim=6,
        caption_projection_dim=12,
        pos_embed_max_size=16,
    )
    model = inject(base, SoftREPA())
    with pytest.raises(AdapterError, match=r"was given a text \(4, 13, 12\); expected 5 tokens.*\. Choose"):
        model(NOISE, encoder_hidden_states=TEXT, timestep=STEPS / 1000)


def test_calls_that_do_not_fit_are_refused() -> None:
    model = inject(sd3(), SoftREPA())
    with pytest.raises(AdapterError, match=r"given \(5, 6\) as encoder_hidden_states. Give"):
        call_sd3(model, text=TEXT[0])
    with pytest.raises(AdapterError, match=r"3 time steps for 4 texts. Give one"):
        call_sd3(model, torch.tensor([1, 2, 3]))
    with pytest.raises(AdapterError, match=r"joint_attention_kwargs has an attention_mask.*Leave it out"):
        call_sd3(model, joint_attention_kwargs={"attention_mask": torch.ones(4, 5)})
    with pytest.raises(AdapterError, match=r"block 'transformer_blocks.0' was called without its tokens. Call"):
        model.transformer_blocks[0](NOISE, encoder_hidden_states=TEXT, temb=None)
    small = inject(unet(), SoftREPA())
    with pytest.raises(AdapterError, match=r"'down_blocks.1' was given a text \(4, 5, 7\); expected 5 tokens.* 6 f"):
        call_unet(small, text=draws(4, 5, 7))


def errors_of(model: Any, images: Tensor, texts: Tensor, noise: Tensor, step: int) -> Tensor:
    """(n, n), of each image denoised with each text, of a flow from image to noise."""
    n, sigma = len(images), step / 1000
    x = ((1 - sigma) * images + sigma * noise).repeat_interleave(n, 0)
    more = {"pooled_projections": POOLED[:1].expand(n * n, -1), "timestep": torch.tensor([step]).expand(n * n)}
    v = model(x, encoder_hidden_states=texts.repeat(n, 1, 1), **more).sample
    return (noise - images).repeat_interleave(n, 0).sub(v).square().mean((1, 2, 3)).reshape(n, n)


def test_pairs_are_learnt_to_be_told_apart() -> None:
    model = inject(sd3(), SoftREPA(num_times=None))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    given = (draws(3, 3, 8, 8), TEXT[:3], draws(1, 3, 8, 8, seed=8), 500)
    losses = []
    for _ in range(10):
        errors = errors_of(model, *given)
        loss = contrastive_denoising_loss(errors, temperature=10.0)  # an untrained model has large errors
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def by_loop(errors: Tensor, scale: float, temperature: float, dweight: float) -> float:
    rows, n = errors.tolist(), len(errors)
    total = 0.0
    for i in range(n):
        logits = [scale * math.exp(-rows[i][j] / temperature) for j in range(n)]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[i]
    return total / n + dweight * sum(rows[i][i] for i in range(n)) / n


@pytest.mark.parametrize("options", [{}, {"scale": 2.0, "temperature": 0.3, "dweight": 0.7}], ids=["default", "other"])
def test_the_loss_and_its_gradient_by_hand(options: dict[str, float]) -> None:
    errors = (0.1 * draws(4, 4).abs()).requires_grad_()
    settings = {"scale": 4.0, "temperature": 0.07, "dweight": 0.0, **options}
    loss = contrastive_denoising_loss(errors, **options)
    assert loss.item() == pytest.approx(by_loop(errors, **settings), rel=1e-12)
    assert loss.item() != pytest.approx(by_loop(errors.T, **settings), rel=1e-3), "rows are images"
    loss.backward()
    for i in range(4):
        for j in range(4):
            ends = []
            for step in (1e-6, -1e-6):
                shifted = errors.detach().clone()
                shifted[i, j] += step
                ends.append(by_loop(shifted, **settings))
            # of a difference of 2e-6 in float64, some 1e-16 / 2e-6 is rounding
            assert errors.grad[i, j].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_the_loss_is_single_precision_at_least_and_knows_its_input() -> None:
    errors = torch.full((3, 3), 0.25)
    assert contrastive_denoising_loss(errors.half()).dtype == torch.float32
    assert contrastive_denoising_loss(errors).item() == pytest.approx(math.log(3))
    for wrong in (torch.zeros(1, 1), torch.zeros(2, 3), torch.zeros(4)):
        with pytest.raises(AdapterError, match=r"errors is \(.*\), expected \(n, n\).*\. Denoise each"):
            contrastive_denoising_loss(wrong)
