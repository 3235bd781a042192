"""The backbone: packing, attention back ends, drop path, initial weights, sizes of the released models."""

from dataclasses import replace

import pytest
import torch

from pretrain.config.derived import kept_rows
from pretrain.config.schema import ModelConfig
from pretrain.models.attention import attend_math, attend_sdpa, resolve_backend
from pretrain.models.init import init_weights
from pretrain.models.packing import drop_path_subsets, pack, unpack
from pretrain.models.vit import PatchProjection, VisionTransformer
from tests.small import random_batch, small_config


def build(**changes) -> VisionTransformer:
    model = VisionTransformer(replace(small_config().model, **changes))
    init_weights(model, seed=0)
    with torch.no_grad():  # larger than at the start of training, so that every part matters
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_pack_and_unpack_are_inverse():
    groups = [torch.randn(3, 5, 8), torch.randn(4, 2, 8)]
    packed, layout = pack(groups)
    assert packed.shape == (23, 8)
    assert all(torch.equal(a, b) for a, b in zip(unpack(packed, layout), groups, strict=True))


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
def test_one_pass_over_all_crops_equals_one_pass_each(ffn_layer, registers):
    model = build(ffn_layer=ffn_layer, num_register_tokens=registers)
    batch = random_batch(small_config(), 4)
    both = model([batch.global_crops, batch.local_crops], [batch.masks, None])
    alone = model([batch.global_crops], [batch.masks]) + model([batch.local_crops])
    for packed, single in zip(both, alone, strict=True):
        for a, b in zip(packed, single, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_patches_are_projected_as_a_convolution_does():
    projection = PatchProjection(3, 5, kernel_size=4, stride=4)
    images = torch.randn(2, 3, 13, 9)
    expected = torch.nn.functional.conv2d(images, projection.weight, projection.bias, stride=4)
    torch.testing.assert_close(projection(images), expected.flatten(2).transpose(1, 2))


def test_attention_back_ends_agree_in_value_and_gradient():
    inputs = [torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    outputs = [attend_sdpa(*inputs), attend_math(*inputs)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in outputs]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_auto_attention_depends_on_device_and_precision():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_backend("auto", d, bf16) for d, bf16 in ((cpu, True), (cpu, False), (cuda, True))] == [
        "math",
        "sdpa",
        "sdpa",
    ]
    assert resolve_backend("math", cuda, True) == "math"


def naive_drop_path(model, batch, rows_global, rows_local, rates):
    """Block by block, image by image: skipped images keep x, the others get x + count / kept * branch(x)."""
    groups = [model.embed(batch.global_crops, batch.masks), model.embed(batch.local_crops)]
    for index, block in enumerate(model.blocks):
        branches = [
            lambda y, block=block: block.ls1(block.attn(block.norm1(y), pack([y[None]])[1])),
            lambda y, block=block: block.ls2(block.mlp(block.norm2(y))),
        ]
        for which, branch in enumerate(branches):
            for g, rows in enumerate((rows_global, rows_local)):
                kept = kept_rows(rates[index], len(groups[g]))
                chosen = set(rows[index, which, :kept].tolist())
                groups[g] = torch.stack(
                    [
                        x + len(groups[g]) / kept * branch(x) if i in chosen else x
                        for i, x in enumerate(groups[g])
                    ]
                )
    return [model.norm(group) for group in groups]


@pytest.mark.parametrize("uniform", [True, False])
def test_drop_path_equals_a_loop_over_images(uniform):
    cfg = small_config()
    cfg = replace(cfg, model=replace(cfg.model, drop_path_rate=0.4, drop_path_uniform=uniform))
    model = build(drop_path_rate=0.4, drop_path_uniform=uniform)
    batch = random_batch(cfg, 4)
    features = model(
        [batch.global_crops, batch.local_crops], [batch.masks, None], [batch.drop_global, batch.drop_local]
    )
    naive = naive_drop_path(model, batch, batch.drop_global, batch.drop_local, model.drop_path_rates)
    for group, expected in zip(features, naive, strict=True):
        torch.testing.assert_close(group.cls, expected[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(group.patches, expected[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"num_register_tokens": 2, "ffn_layer": "swiglu"}], ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_last_block_on_some_tokens_equals_it_on_all(rate, changes):
    cfg = small_config()
    model = build(drop_path_rate=rate, **changes)
    batch = random_batch(replace(cfg, model=model.cfg), 4)
    inputs = [batch.global_crops, batch.local_crops], [batch.masks, None]
    rows = [batch.drop_global, batch.drop_local] if rate else None
    all_of = model(*inputs, rows, 4 // batch.group_size)
    some = model(*inputs, rows, 4 // batch.group_size, [batch.mask_indices, batch.mask_indices[:0]])
    chosen = all_of[0].patches.flatten(0, 1)[batch.mask_indices]
    expected = [all_of[0].cls, chosen, all_of[1].cls]
    mine = [some[0].cls, some[0].patches, some[1].cls]
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(sum(part.sin().sum() for part in parts), [*model.parameters()], allow_unused=True)
        for parts in (mine, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_drop_path_of_two_shares_keeps_the_rows_of_both():
    rows = torch.arange(12).view(1, 1, 12).repeat(2, 2, 1)[..., :6]
    _, layout = pack([torch.zeros(12, 3, 4)])
    attention, _ = drop_path_subsets([rows], [0.5, 0.5], layout, num_shares=2)[0]
    assert attention.layout.counts == (6,)
    assert attention.tokens.tolist() == list(range(18))
    assert attention.scale.unique().tolist() == [2.0]


def test_layer_scale_and_registers_are_optional():
    plain = build(layer_scale=None)
    assert not any("gamma" in name or "register" in name for name, _ in plain.named_parameters())
    assert build(num_register_tokens=2)([torch.randn(1, 3, 32, 32)])[0].registers.shape == (1, 2, 24)


@pytest.mark.parametrize(
    ("arch", "parameters", "tensors"),
    [("vit_small", 22_056_576, 175), ("vit_base", 86_580_480, 175), ("vit_large", 304_368_640, 343)],
)
def test_sizes_of_the_released_models(arch, parameters, tensors):
    with torch.device("meta"):
        model = VisionTransformer(ModelConfig(arch=arch, patch_size=14, img_size=518))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors


def test_initial_weights_follow_the_recipe():
    cfg = ModelConfig(arch="vit_small", num_register_tokens=4, layer_scale=1e-5)
    model = VisionTransformer(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    init_weights(model, seed=3)
    state = model.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    assert state["blocks.5.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["pos_embed"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["register_tokens"].std().item() == pytest.approx(1e-6, rel=0.1)
    assert state["patch_embed.proj.weight"].abs().max().item() == pytest.approx(
        (3 * 16 * 16) ** -0.5, rel=1e-3
    )
    assert state["blocks.0.ls1.gamma"].eq(1e-5).all()
    assert not state["mask_token"].any()
    assert not state["blocks.0.mlp.fc1.bias"].any()


def test_initial_weights_depend_on_seed_and_name_only():
    small, deep = build(), build(depth=3)
    for name, value in small.state_dict().items():
        assert torch.equal(value, deep.state_dict()[name]), name
    other = VisionTransformer(small.cfg)
    init_weights(other, seed=1)
    again = VisionTransformer(small.cfg)
    init_weights(again, seed=0)
    assert not torch.equal(other.pos_embed, again.pos_embed)


def test_a_grid_that_is_not_square_is_used_as_it_is_where_it_fits_and_interpolated_elsewhere():
    model = build(img_width=48)  # 4 x 6 patches
    assert model.pos_embed.shape == (1, 1 + 4 * 6, 24)
    assert torch.equal(model.positions(32, 48), model.pos_embed)
    turned = model.positions(48, 32)
    assert turned.shape == model.pos_embed.shape and not torch.equal(turned, model.pos_embed)
    features = model([torch.randn(2, 3, 32, 32)])[0]
    assert features.patches.shape == (2, 16, 24) and features.patches.isfinite().all()
