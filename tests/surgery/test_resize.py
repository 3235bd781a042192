from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from pretrain.errors import InputError
from pretrain.export import read_export, write_export
from pretrain.surgery.architecture import check_complete
from pretrain.surgery.resize import axis_matrix, resize_channels, resize_patch, resize_positions
from tests.golden_files import relative_error
from tests.surgery.backbones import PLAIN, REGISTERS, equal, features, images_for, random_state


def resize_matrix(old, new):
    """Resizing as a matrix on the pixels of a patch."""
    return torch.kron(axis_matrix(old, new), axis_matrix(old, new))


RELEASED = {"plain": PLAIN, "registers": REGISTERS}  # offset 0.1; and offset 0 with antialias


@pytest.mark.parametrize("size", [(70, 70), (98, 98), (42, 42), (56, 112), (112, 28)])
@pytest.mark.parametrize("name", RELEASED)
def test_features_at_the_new_size_are_those_that_the_model_had_there(name, size):
    model = RELEASED[name]
    state = random_state(model)
    resized, section = resize_positions(state, model, size)
    check_complete(resized, section)
    images = images_for(model, size)
    assert torch.equal(features(resized, section, images), features(state, model, images))
    assert equal({**resized, "pos_embed": state["pos_embed"]}, state)


def test_the_two_settings_give_different_positions():
    state = random_state(PLAIN)
    settings = [(0.1, False), (0.0, False), (0.0, True)]
    found = [
        resize_positions(state, replace(PLAIN, pos_embed_offset=o, pos_embed_antialias=a), (42, 42))[0][
            "pos_embed"
        ]
        for o, a in settings
    ]
    assert all(relative_error(found[i], found[j]) > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    grid = state["pos_embed"][:, 1:].unflatten(1, (5, 5)).permute(0, 3, 1, 2)
    expected = interpolate(grid, size=(3, 3), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.equal(found[2][:, 1:], expected)
    assert torch.equal(found[2][:, :1], state["pos_embed"][:, :1])


@pytest.mark.parametrize(("name", "bound"), [("plain", 0.1), ("registers", 0.02)])
def test_a_smooth_grid_comes_back_from_another_size(name, bound):
    """The offset 0.1 shifts a grid by some hundredths of a patch, at each turn."""
    model = replace(RELEASED[name], img_size=14 * 16)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    waves = [torch.cos(k * rows + (dim % 3) * columns) for k in range(4) for dim in range(32)]
    state = {"pos_embed": torch.cat([torch.zeros(1, 1, 128), torch.stack(waves, -1).view(1, 256, 128)], 1)}
    large, there = resize_positions(state, model, (518, 518))
    back, section = resize_positions(large, there, (224, 224))
    assert section == model and large["pos_embed"].shape == (1, 1 + 37 * 37, 128)
    assert relative_error(back["pos_embed"], state["pos_embed"]) < bound
    assert equal(resize_positions(state, model, (224, 224))[0], state)


def test_a_patch_resized_to_its_own_size_is_itself():
    state = random_state(PLAIN)
    resized, model = resize_patch(state, PLAIN, 14)
    assert equal(resized, state) and model == PLAIN


def test_a_larger_patch_embeds_enlarged_images_as_the_old_one_did_the_small_ones():
    state = random_state(PLAIN)
    resized, model = resize_patch(state, PLAIN, 20)
    check_complete(resized, model)
    assert (model.patch_size, model.img_size) == (20, 100)
    patches = torch.randn(7, 3, 14, 14, dtype=torch.float64)
    enlarged = torch.einsum("np,bcp->bcn", resize_matrix(14, 20), patches.flatten(2)).unflatten(2, (20, 20))
    old, new = (s["patch_embed.proj.weight"].double() for s in (state, resized))
    before = torch.einsum("dcij,bcij->bd", old, patches)
    after = torch.einsum("dcij,bcij->bd", new, enlarged)
    assert relative_error(after, before) < 1e-5


def test_a_smaller_patch_is_the_best_of_all_in_the_mean(tmp_path):
    """Least squares over random patches, as in the definition; B is resizing, checked against torch's own."""
    patches = torch.randn(4000, 1, 14, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small = interpolate(patches, size=(10, 10), mode="bicubic", antialias=True).flatten(1)
    assert relative_error(patches.flatten(1) @ resize_matrix(14, 10).T, small) < 1e-12
    state = random_state(PLAIN)
    resized, _ = resize_patch(state, PLAIN, 10)
    weight = state["patch_embed.proj.weight"][:, :1].double()
    targets = patches.flatten(1) @ weight.flatten(1).T
    best = torch.linalg.lstsq(small, targets).solution
    mine = resized["patch_embed.proj.weight"][:, :1].double().flatten(1).T
    residual, least = ((small @ w - targets).square().mean() for w in (mine, best))
    assert residual < 1.05 * least


def test_resized_patches_are_those_of_timm(other_programs):
    from timm.layers import resample_patch_embed

    state = random_state(PLAIN)
    for size in (8, 16, 32):
        resized, _ = resize_patch(state, PLAIN, size)
        theirs = resample_patch_embed(state["patch_embed.proj.weight"], [size, size])
        assert relative_error(resized["patch_embed.proj.weight"], theirs) < 1e-4


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_channels_keep_their_sum_and_grey_images_their_tokens(channels):
    state = random_state(PLAIN)
    resized, model = resize_channels(state, PLAIN, channels)
    check_complete(resized, model)
    before, after = (s["patch_embed.proj.weight"] for s in (state, resized))
    assert relative_error(after.sum(1), before.sum(1)) < 1e-6
    assert channels != 3 or torch.equal(before, after)
    grey = images_for(replace(PLAIN, in_channels=1))
    many, three = (
        features(s, m, grey.expand(-1, m.in_channels, -1, -1)) for s, m in ((resized, model), (state, PLAIN))
    )
    assert relative_error(many, three) < 1e-5
    back, there = resize_channels(resized, model, 3)
    assert there == PLAIN
    assert relative_error(back["patch_embed.proj.weight"].sum(1), before.sum(1)) < 1e-6


def test_wrong_sizes_are_refused():
    state = random_state(PLAIN)
    with pytest.raises(InputError, match=r"--image-size: 225 px .* multiple of the patch size 14; use 224"):
        resize_positions(state, PLAIN, (224, 225))
    with pytest.raises(InputError, match="--image-size: 0 px"):
        resize_positions(state, PLAIN, (0, 14))
    with pytest.raises(InputError, match="--patch-size: 0 must be from 1 to 256"):
        resize_patch(state, PLAIN, 0)
    with pytest.raises(InputError, match="--to: 0 channels must be from 1 to 1024"):
        resize_channels(state, PLAIN, 0)


def test_half_precision_stays_and_is_computed_in_full(tmp_path, surgery):
    state = {n: t.bfloat16() for n, t in random_state(PLAIN).items()}
    source = write_export(tmp_path / "a.safetensors", state, PLAIN, {})
    for verb, option, value in (
        ("interpolate", "--image-size", "56x98"),
        ("resize-patch", "--patch-size", 16),
    ):
        out = tmp_path / f"{verb}.safetensors"
        assert surgery(verb, source, option, value, "--out", out).status == 0
        assert {t.dtype for t in read_export(out).state.values()} == {torch.bfloat16}
    assert read_export(tmp_path / "interpolate.safetensors").model.img_width == 98


def test_a_released_model_goes_to_518_pixels_by_the_tool(tmp_path, surgery):
    source = write_export(tmp_path / "a.safetensors", random_state(REGISTERS), REGISTERS, {})
    out = tmp_path / "b.safetensors"
    done = surgery("interpolate", source, "--image-size", 518, "--out", out, "--antialias", "false")
    assert done.status == 0 and "positions 37 x 37" in done.out and "antialias false" in done.out
    assert np.prod(read_export(out).state["pos_embed"].shape) == (1 + 37 * 37) * 128
