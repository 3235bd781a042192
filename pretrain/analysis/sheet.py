"""One picture of several images: each with its patch tokens as colours and its class token's attention."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate, pad

CELL = 128  # pixels; smaller images are enlarged to about this
GAP = 4  # pixels between cells
HEADER = 20  # pixels of the line of titles
HEADS = 6  # heads shown, the first ones
PAPER = 255  # grey of gaps and header
HEAT = [(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)]  # dark to bright


def picture(
    images: Tensor, mean: Sequence[float], std: Sequence[float], pca: Tensor, attention: Tensor
) -> Tensor:
    """A contact sheet, a row per image: image, PCA of the patch tokens, attention (mean, then per head).

    Args:
        images: (n, C, S, S) normalised; the mean of the channels is shown unless they are RGB.
        mean: per channel, of pixel / 255, that they were normalised with.
        std: likewise.
        pca: (n, 3, h, w) from 0 to 1.
        attention: (n, H, h, w); see `attention_heat` for its colours.

    Returns:
        (3, height, width) uint8 on the CPU, for `SummaryWriter.add_image`.
    """
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    maps = torch.cat([attention.mean(1, keepdim=True), attention[:, :HEADS]], dim=1).float().cpu()
    titles = ["image", "patch PCA", "attention", *(f"head {i + 1}" for i in range(maps.shape[1] - 1))]
    shown = images.float().cpu() * scale + shift
    if shown.shape[1] != 3:
        shown = shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    columns = [shown, pca.float().cpu(), *attention_heat(maps).unbind(1)]
    return table(columns, titles)


def table(columns: Sequence[Tensor], titles: Sequence[str]) -> Tensor:
    """Columns of pictures, (n, 3, h, w) from 0 to 1, under their titles: (3, height, width) uint8."""
    largest = max(column.shape[-1] for column in columns)
    size = largest * max(1, round(CELL / largest))
    cells = [_cells(column, size) for column in columns]
    return torch.cat([_header(titles, size), torch.cat(cells, dim=2)], dim=1)


def attention_heat(maps: Tensor) -> Tensor:
    """Maps (n, H, h, w) as colours (n, H, 3, h, w) from 0 to 1, dark to bright.

    Each map runs from 0 to its own maximum, as a square root: a few patches often get nearly all attention,
    and the rest would be black.
    """
    colours = torch.tensor(HEAT) / 255
    place = (maps / maps.amax((-2, -1), keepdim=True).clamp(min=1e-12)).sqrt() * (len(HEAT) - 1)
    left = place.long().clamp(max=len(HEAT) - 2)
    share = (place - left).unsqueeze(-1)
    return (colours[left] * (1 - share) + colours[left + 1] * share).movedim(-1, 2)


def _cells(column: Tensor, size: int) -> Tensor:
    """One column of the sheet: (n, 3, h, w) from 0 to 1 to (3, n * (size + GAP), size + GAP) uint8."""
    big = interpolate(column, size=(size, size), mode="nearest")
    pixels = (big.clamp(0, 1) * 255).round().to(torch.uint8)
    spaced = pad(pixels, (0, GAP, 0, GAP), value=PAPER)
    return spaced.movedim(1, 0).flatten(1, 2)


def stacked(parts: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Pictures (3, h, w) uint8 under one another, each below a line of text: (3, height, width) uint8."""
    width = max(drawn.shape[2] for _, drawn in parts)
    wide = [(_line([(2, text)], width), drawn) for text, drawn in parts]
    return torch.cat(
        [pad(band, (0, width - band.shape[2]), value=PAPER) for pair in wide for band in pair], dim=1
    )


def _header(titles: Sequence[str], size: int) -> Tensor:
    """The line of column titles, (3, HEADER, columns * (size + GAP)) uint8."""
    places = [(i * (size + GAP) + 2, title) for i, title in enumerate(titles)]
    return _line(places, len(titles) * (size + GAP))


def _line(texts: Sequence[tuple[int, str]], width: int) -> Tensor:
    """Texts at distances from the left, (3, HEADER, width) uint8."""
    line = Image.new("L", (width, HEADER), PAPER)
    draw, font = ImageDraw.Draw(line), ImageFont.load_default(13)
    for left, text in texts:
        draw.text((left, 2), text, fill=0, font=font)
    return torch.from_numpy(np.array(line)).expand(3, -1, -1)
