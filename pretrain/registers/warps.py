"""Synthetic pairs for correspondence: an image and its known warp.

Coordinates are (x, y) from -1 to 1 over an image's extent.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from pretrain.seeding import numpy_stream

TURN, SCALE, SHEAR, SHIFT = 30.0, 1.25, 0.15, 0.2  # degrees; factor; share; of half a side
CORNER = 0.35  # largest shift of a corner by a homography, of half a side


def random_warp(seed: int, key: str) -> Tensor:
    """Where points of an image go in its warp, (3, 3) fp64; an affine map or a homography, as often."""
    stream = numpy_stream(seed, "registers", "warp", key)
    drawn = _affine(stream) if stream.random() < 0.5 else _homography(stream)
    return torch.from_numpy(drawn)


def _affine(stream: np.random.Generator) -> np.ndarray:
    angle, scale = np.deg2rad(stream.uniform(-TURN, TURN)), SCALE ** stream.uniform(-1, 1)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, stream.uniform(-SHEAR, SHEAR)], [0, 1]])
    whole = np.eye(3)
    whole[:2, :2], whole[:2, 2] = turn, stream.uniform(-SHIFT, SHIFT, size=2)
    return whole


def _homography(stream: np.random.Generator) -> np.ndarray:
    """The map that moves the four corners each by itself."""
    corners = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    moved = corners + stream.uniform(-CORNER, CORNER, size=(4, 2))
    rows = []
    for (x, y), (u, v) in zip(corners, moved, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    return np.append(np.linalg.solve(np.array(rows), moved.flatten()), 1.0).reshape(3, 3)


def moved(warp: Tensor, points: Tensor) -> Tensor:
    """Points (..., 2) by a warp (3, 3)."""
    whole = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1) @ warp.T
    return whole[..., :2] / whole[..., 2:]


def warped(pixels: Tensor, warp: Tensor) -> Tensor:
    """An image (C, S, S) after a warp, bilinear; what lies outside is 0, the mean of normalised pixels."""
    side = pixels.shape[-1]
    grid = affine_grid(torch.eye(2, 3)[None], [1, 1, side, side], align_corners=False).double()
    source = moved(torch.linalg.inv(warp), grid).to(pixels)
    return grid_sample(pixels[None], source, align_corners=False)[0]


def centres(side: int) -> Tensor:
    """Of the patches of a square grid, row by row: (side * side, 2) fp64."""
    line = (2 * torch.arange(side, dtype=torch.float64) + 1) / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
