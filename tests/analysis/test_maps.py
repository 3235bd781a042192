"""Pictures: one basis through a run, attention equal to the model's own, a sheet that shows what it gets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.analysis.maps import PatchPca, cls_attention
from pretrain.analysis.samples import first_images
from pretrain.analysis.sheet import CELL, GAP, HEADER, HEADS, attention_heat, picture
from pretrain.data.writer import PackedSample, write_shards
from pretrain.errors import InputError
from pretrain.models.init import init_weights
from pretrain.models.vit import VisionTransformer
from tests.data.pictures import encode
from tests.small import small_config

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.5]


def tokens_of(seed: int, n: int = 4, patches: int = 16) -> Tensor:
    """Tokens of width 8 whose variance lies along three known directions, 9 : 4 : 1, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(7))).Q[:, :3]
    values = torch.randn(n, patches, 3, generator=generator) * torch.tensor([3.0, 2, 1])
    return values @ directions.T + 0.01 * torch.randn(n, patches, 8, generator=generator) + 5


def test_the_components_are_the_main_directions_in_order() -> None:
    tokens = tokens_of(0, n=50)
    pca = PatchPca.fit(tokens)
    torch.testing.assert_close(pca.basis.T @ pca.basis, torch.eye(3), atol=1e-5, rtol=0)
    rows = tokens.flatten(0, 1)
    variances = ((rows - rows.mean(0)) @ pca.basis).var(0)
    expected = torch.linalg.eigvalsh(rows.T.cov()).flip(0)[:3]
    torch.testing.assert_close(variances, expected, rtol=1e-4, atol=0)
    assert pca.explained(tokens) == pytest.approx(1, abs=1e-3)
    assert pca.explained(torch.randn(50, 16, 8)) == pytest.approx(3 / 8, abs=0.1)


def test_neither_sign_nor_order_of_the_images_changes_the_colours() -> None:
    tokens = tokens_of(0)
    pca, other = PatchPca.fit(tokens), PatchPca.fit(tokens.flip(0))
    torch.testing.assert_close(pca.basis, other.basis, atol=1e-5, rtol=0)
    largest = pca.basis.gather(0, pca.basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_colours_fill_their_range_and_later_tokens_stay_inside_it() -> None:
    tokens = tokens_of(0)
    pca = PatchPca.fit(tokens)
    colours = pca.project(tokens)
    assert colours.shape == (4, 3, 4, 4) and colours.amin() == 0 and colours.amax() == 1
    inside = ((colours > 0) & (colours < 1)).float().mean()
    assert 0.9 < inside < 1
    assert pca.project(tokens * 100).isfinite().all() and pca.project(tokens * 100).amax() <= 1
    same = pca.project(tokens[2:3])
    torch.testing.assert_close(same, colours[2:3])  # a picture does not depend on its neighbours


def test_a_patch_keeps_its_place() -> None:
    tokens = tokens_of(0, n=1, patches=6)
    pca = PatchPca.fit(tokens)
    colours = pca.project(tokens, grid=(2, 3))
    value = ((tokens[0, 4] - pca.mean) @ pca.basis - pca.low) / (pca.high - pca.low)
    torch.testing.assert_close(colours[0, :, 1, 1], value.clamp(0, 1))


def test_a_resumed_run_keeps_the_basis(tmp_path: Path) -> None:
    path = tmp_path / "run" / "basis.safetensors"
    pca = PatchPca.fit(tokens_of(0))
    pca.save(path)
    loaded = PatchPca.load(path)
    for name in ("mean", "basis", "low", "high"):
        assert torch.equal(getattr(loaded, name), getattr(pca, name))
    torch.testing.assert_close(loaded.project(tokens_of(1)), pca.project(tokens_of(1)), rtol=0, atol=1e-6)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_wrong_files_and_tokens_are_named(tmp_path: Path) -> None:
    path = tmp_path / "basis.safetensors"
    with pytest.raises(InputError, match=str(path)):
        PatchPca.load(path)
    path.write_bytes(b"no basis")
    with pytest.raises(InputError, match="fits a new one"):
        PatchPca.load(path)
    for tokens in (tokens_of(0, n=1, patches=2), tokens_of(0) * torch.nan):
        with pytest.raises(InputError, match="patch tokens"):
            PatchPca.fit(tokens)


def vit(registers: int) -> VisionTransformer:
    cfg = replace(small_config().model, num_register_tokens=registers)
    model = VisionTransformer(cfg).eval()
    init_weights(model, seed=0)
    for parameter in model.parameters():  # larger weights, or attention is close to uniform
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("shape", [(32, 32), (16, 40)])
def test_attention_is_that_of_the_model(registers: int, shape: tuple[int, int]) -> None:
    """The model's own output of the last attention, with values that count tokens, gives the shares away."""
    model, images = vit(registers), torch.randn(3, 3, *shape)
    attention = cls_attention(model, images)
    rows, cols = shape[0] // 8, shape[1] // 8
    assert attention.shape == (3, 2, rows, cols)
    seen: list[tuple[Tensor, Tensor]] = []
    attn = model.blocks[-1].attn
    hook = attn.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model([images])
    hook.remove()
    (x, output), length = seen[0], 1 + registers + rows * cols
    values = attn.qkv(x).reshape(3, length, 3, 2, -1)[:, :, 2]  # (n, N', H, d)
    prefix = 1 + registers
    patches = torch.einsum("nhk,nkhd->nhd", attention.flatten(2), values[:, prefix:])
    rest = full_attention(attn, x.reshape(3, length, -1))[:, :, 0, :prefix]
    others = torch.einsum("nhk,nkhd->nhd", rest, values[:, :prefix])
    torch.testing.assert_close(attn.proj((patches + others).flatten(1)), output.reshape(3, length, -1)[:, 0])
    torch.testing.assert_close(attention.sum((2, 3)) + rest.sum(-1), torch.ones(3, 2))


def full_attention(attn: torch.nn.Module, x: Tensor) -> Tensor:
    """(n, H, N', N') from the block's input (n, N', D), one head and image at a time."""
    q, k, _ = attn.qkv(x).chunk(3, dim=-1)
    width = q.shape[-1] // 2
    maps = [
        [(q[i][:, h : h + width] @ k[i][:, h : h + width].T / width**0.5).softmax(1) for h in (0, width)]
        for i in range(len(x))
    ]
    return torch.stack([torch.stack(heads) for heads in maps])


def test_looking_leaves_the_model_as_it_was() -> None:
    model, images = vit(0), torch.randn(2, 3, 32, 32)
    before = model([images])[0].cls
    assert not cls_attention(model, images).requires_grad
    assert not model.blocks[-1].attn._forward_pre_hooks
    assert torch.equal(model([images])[0].cls, before)
    with pytest.raises(RuntimeError):
        cls_attention(model, torch.randn(2, 5, 32, 32))
    assert not model.blocks[-1].attn._forward_pre_hooks


def test_compiled_blocks_are_looked_into_all_the_same() -> None:
    model, images = vit(2), torch.randn(2, 3, 32, 32)
    expected = cls_attention(model, images)
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        model([images])
    torch.testing.assert_close(cls_attention(model, images), expected)


def cell(sheet: Tensor, row: int, column: int, size: int) -> Tensor:
    top, left = HEADER + row * (size + GAP), column * (size + GAP)
    return sheet[:, top : top + size, left : left + size]


def test_the_sheet_shows_images_colours_and_attention() -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    images = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    pca = torch.rand(2, 3, 4, 4)
    attention = torch.zeros(2, HEADS + 3, 4, 4)
    attention[0, 1, 2, 3], attention[1, :, 0, 0] = 0.5, 0.01
    sheet = picture(images, MEAN, STD, pca, attention)
    size, columns = CELL, 3 + HEADS
    assert sheet.dtype == torch.uint8
    assert sheet.shape == (3, HEADER + 2 * (size + GAP), columns * (size + GAP))
    for row in (0, 1):
        assert torch.equal(cell(sheet, row, 0, size)[:, ::4, ::4], pixels[row].to(torch.uint8))
        colours = cell(sheet, row, 1, size)[:, :: size // 4, :: size // 4]
        assert (colours.float() / 255 - pca[row]).abs().amax() <= 0.5 / 255 + 1e-6
    spot = cell(sheet, 0, 4, size).float().sum(0)  # head 2
    assert spot[2 * 32 + 5, 3 * 32 + 5] > 600 and spot[:60].amax() < 30
    assert cell(sheet, 0, 3, size).amax() < 10  # head 1 of the first image sees nothing
    assert cell(sheet, 1, 2, size).float().sum(0).argmax() == 0
    assert (sheet[:, HEADER + size : HEADER + size + GAP] == 255).all()
    assert sheet[:, :HEADER].amin() < 100  # titles


@pytest.mark.parametrize("channels", [1, 5])
def test_images_without_colours_are_shown_grey(channels: int) -> None:
    pixels = torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    sheet = picture(
        pixels, [0.0] * channels, [1.0] * channels, torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
    )
    expected = (pixels.mean(1) * 255).round().to(torch.uint8)
    for row in (0, 1):
        for band in cell(sheet, row, 0, CELL)[:, ::4, ::4]:
            assert torch.equal(band, expected[row])


def test_large_images_keep_their_size_and_heads_are_few() -> None:
    images, pca, attention = torch.zeros(1, 3, 224, 224), torch.zeros(1, 3, 14, 14), torch.rand(1, 16, 14, 14)
    assert picture(images, MEAN, STD, pca, attention).shape == (3, HEADER + 228, 228 * (3 + HEADS))


def test_brighter_means_more_attention() -> None:
    shares = torch.tensor([0.0, 0.01, 0.1, 0.3, 1.0]).view(1, 1, 1, 5)
    brightness = attention_heat(shares).sum(2).flatten()
    assert (brightness.diff() > 0).all()
    torch.testing.assert_close(attention_heat(shares), attention_heat(shares * 0.2))
    assert attention_heat(torch.zeros(1, 1, 2, 2)).isfinite().all()


def test_first_images_need_no_label(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), np.uint8)
    samples = [
        PackedSample(f"{i}", "png", encode(picture, "PNG"), None, {}) for i, picture in enumerate(pixels)
    ]
    shards = [str(path) for path in write_shards(samples, tmp_path, "x", 2)]
    images = first_images(shards, "log.images.shards", 3, 40, 32, MEAN, STD)
    shown = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    expected = torch.from_numpy(pixels[:3, 4:36, 4:36]).permute(0, 3, 1, 2)
    assert torch.equal((shown * 255).round().to(torch.uint8), expected)
    assert len(first_images(shards, "log.images.shards", 9, 40, 32, MEAN, STD)) == 5
    half = first_images(shards, "log.images.shards", 1, 20, 20, MEAN, STD)
    assert half.shape == (1, 3, 20, 20)
    with pytest.raises(InputError, match=r"log\.images\.shards"):
        first_images([str(tmp_path / "no-*.tar")], "log.images.shards", 3, 40, 32, MEAN, STD)
