"""In which direction tokens become defective, layer by layer, from the weights alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from pretrain.config.derived import vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.sinder.linear_maps import block_maps
from pretrain.surgery.layouts import State


@dataclass(frozen=True)
class LayerDirection:
    """What the blocks up to one do to a token, as a linear map G_i = E_i ... E_0."""

    direction: Tensor  # (D,) float64, leading left singular vector of G_i, |.| = 1; the sign is arbitrary
    gain: float  # leading singular value of this block's own map E_i
    gain_gap: float  # over its second one
    log_growth: float  # natural logarithm of the leading singular value of G_i
    growth_gap: float  # leading over second singular value of G_i


def defect_directions(
    state: State, model: ModelConfig, biases: bool = False, advance: Callable[[int], None] = lambda _: None
) -> list[LayerDirection]:
    """The predicted direction after each block (paper, section 3.2).

    The product is scaled to norm 1 after each block, which changes no direction and overflows at no depth.

    Args:
        state: of the backbone.
        model: of the state.
        biases: the homogeneous variant; the returned directions leave out the last channel.
        advance: told after each block.

    Raises:
        InputError: a weight of the blocks is not finite.
    """
    _refuse_infinite(state)
    dim, depth, _ = vit_shape(model)
    product: Tensor | None = None
    log_scale, layers = 0.0, []
    for index in range(depth):
        block = block_maps(state, model, index, biases).block
        product = block if product is None else block @ product
        norm = torch.linalg.matrix_norm(product).item()
        product, log_scale = product / norm, log_scale + math.log(norm)
        vector, first, second = leading_left(product)
        own, own_second = leading_left(block)[1:]
        direction = vector[:dim] / vector[:dim].norm()
        growth = log_scale + math.log(first)
        layers.append(LayerDirection(direction, own, own / own_second, growth, first / second))
        advance(1)
    return layers


def _refuse_infinite(state: State) -> None:
    for name, tensor in state.items():
        if name.startswith("blocks.") and not tensor.isfinite().all():
            raise InputError(
                f"{name}: holds values that are not finite, so no direction can be predicted; "
                "use weights from before they were damaged"
            )


def leading_left(matrix: Tensor) -> tuple[Tensor, float, float]:
    """Leading left singular vector and the two largest singular values, to machine precision, by Lanczos.

    Args:
        matrix: (n, n) float64, n at least 2; small ones are decomposed whole.
    """
    if min(matrix.shape) < 8:
        left, values, _ = torch.linalg.svd(matrix)
        return left[:, 0], float(values[0]), float(values[1])
    start = torch.ones(min(matrix.shape), dtype=torch.float64).numpy()
    left, values, _ = svds(matrix.numpy(), k=2, v0=start, return_singular_vectors="u")
    order = values.argsort()[::-1]
    vector = torch.from_numpy(left[:, order[0]].copy())
    return vector / vector.norm(), float(values[order[0]]), float(values[order[1]])
