"""What models see, as pictures side by side: components, attention, norms, artifacts, similarity."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pretrain.analysis import plots
from pretrain.analysis.foreground import foreground_colours
from pretrain.analysis.maps import PatchPca
from pretrain.analysis.marks import marked
from pretrain.analysis.outliers import NORM_THRESHOLD, norm_outliers
from pretrain.analysis.sheet import HEADS, attention_heat
from pretrain.analysis.view import View
from pretrain.errors import InputError

BLOCKS = 4  # shown where none are asked for
COMPONENTS = (
    "Main components of the output patch tokens as colours, one basis for all images of a model. Foreground: "
    "patches whose first component is positive, with the sign by which the border of the images lies lower; "
    "then three components of these patches alone, as in figure 1 of DINOv2. Colours of two models have "
    "nothing to do with each other."
)
ATTENTION = (
    "What the class token attends to, the mean of all heads and the first heads. Each map runs from 0 to its "
    "own maximum, as a square root."
)
NORMS = "Norms of the patch tokens after blocks, dark (0) to bright (the highest of that image and block)."
ARTIFACTS = (
    f"Marked: patches whose norm after the last block is above the image's median by {NORM_THRESHOLD:g} "
    "median absolute deviations. Some in dull places are artifacts, which registers cure (arXiv 2309.16588); "
    "on plain backgrounds whole objects can stand out too."
)
SIMILARITY = (
    "Cosine of all output patch tokens of all images with the marked patch of the first image, from dark (0 "
    "or less) to bright (1)."
)
Columns = dict[str, Tensor]  # title to pictures (n, 3, h, w) from 0 to 1


@dataclass(frozen=True)
class Part:
    """One kind of map, a row for each image."""

    heading: str
    text: str
    columns: Columns  # the first one shows the images


@dataclass(frozen=True)
class Wanted:
    """What is drawn."""

    patch: tuple[int, int] | None = None  # row and column in the first image; None = its middle
    blocks: Sequence[int] = ()  # after which norms are shown; empty = some, evenly spread
    heads: int = HEADS  # shown, the first ones


def gallery(views: Mapping[str, View], pixels: Tensor, wanted: Wanted) -> list[Part]:
    """All parts, models side by side.

    Args:
        views: by the name of the model, of the same images.
        pixels: (n, 3, s, s) the images from 0 to 1.
        wanted: what is drawn.

    Raises:
        InputError: there is no such patch or block.
    """
    return [
        _part("Components", COMPONENTS, views, pixels, _components),
        _part("Attention", ATTENTION, views, pixels, lambda seen: _attention(seen, wanted.heads)),
        _part("Norms", NORMS, views, pixels, lambda seen: _norms(seen, wanted.blocks)),
        _part("Artifacts", ARTIFACTS, views, pixels, lambda seen: _artifacts(seen, pixels)),
        _similarity_part(views, pixels, wanted.patch),
    ]


def _part(
    heading: str, text: str, views: Mapping[str, View], images: Tensor, draw: Callable[[View], Columns]
) -> Part:
    columns = {"image": images}
    for name, seen in views.items():
        prefix = f"{name} " if len(views) > 1 else ""
        columns |= {f"{prefix}{title}": drawn for title, drawn in draw(seen).items()}
    return Part(heading, text, columns)


def _components(seen: View) -> Columns:
    tokens = seen.patches.flatten(1, 2)
    plain = PatchPca.fit(tokens).project(tokens, (seen.patches.shape[1], seen.patches.shape[2]))
    return {"PCA": plain, "foreground": foreground_colours(seen.patches)[0]}


def _attention(seen: View, heads: int) -> Columns:
    maps = torch.cat([seen.attention.mean(1, keepdim=True), seen.attention[:, :heads]], dim=1)
    titles = ["attention", *(f"head {index}" for index in range(maps.shape[1] - 1))]
    return dict(zip(titles, attention_heat(maps).unbind(1), strict=True))


def _norms(seen: View, blocks: Sequence[int]) -> Columns:
    depth = seen.norms.shape[1]
    evenly = sorted({round((depth - 1) * i / (BLOCKS - 1)) for i in range(BLOCKS)})
    wrong = [block for block in blocks if not 0 <= block < depth]
    if wrong:
        raise InputError(f"--blocks {wrong[0]}: the model has blocks 0 to {depth - 1}")
    return {f"block {block}": _in_own_range(seen.norms[:, block]) for block in blocks or evenly}


def _in_own_range(maps: Tensor) -> Tensor:
    """(n, h, w) to (n, 3, h, w), each from 0 to its own maximum."""
    return torch.stack([plots.heat(one, 0, float(one.max())) for one in maps])


def _artifacts(seen: View, pixels: Tensor) -> Columns:
    found = norm_outliers(seen.norms[:, -1])
    return {"outliers": torch.stack(list(map(marked, pixels, found)))}


def _similarity_part(views: Mapping[str, View], pixels: Tensor, patch: tuple[int, int] | None) -> Part:
    grid = next(iter(views.values())).patches.shape[1:3]
    patch = _patch(patch, grid)
    place = torch.zeros(grid, dtype=torch.bool)
    place[patch] = True
    queried = torch.cat([marked(pixels[0], place)[None], pixels[1:]])

    def draw(seen: View) -> Columns:
        row, column = _rescaled(patch, grid, seen.patches.shape[1:3])
        return {"cosine": plots.heat(similarity(seen.patches, 0, row, column), 0, 1)}

    return _part("Similarity", SIMILARITY, views, queried, draw)


def similarity(tokens: Tensor, image: int, row: int, column: int) -> Tensor:
    """Cosines of all patch tokens (n, h, w, D) with one of them, (n, h, w)."""
    unit = normalize(tokens, dim=-1)
    return unit @ unit[image, row, column]


def _patch(patch: tuple[int, int] | None, grid: Sequence[int]) -> tuple[int, int]:
    """The patch that is asked for, on the grid (h, w) of the first model.

    Raises:
        InputError: it lies outside.
    """
    row, column = patch or (grid[0] // 2, grid[1] // 2)
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise InputError(f"--patch {row},{column}: the grid has {grid[0]} rows and {grid[1]} columns, from 0")
    return row, column


def _rescaled(patch: tuple[int, int], grid: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """The patch of another grid that holds the middle of this one."""
    row, column = (int((place + 0.5) * o / g) for place, g, o in zip(patch, grid, other, strict=True))
    return row, column


def outlier_shares(seen: View) -> list[float]:
    """Share of the patches that stand out by their norm after each block."""
    blocks = seen.norms.unbind(1)
    return [float(norm_outliers(norms).float().mean()) for norms in blocks]
