"""A layer of which singular values are trained: the same function and gradients as its definition."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from pretrain.sinder.singular_values import SingularLinear
from tests.golden_files import relative_error


def trained_layer(rows=24, fixed_rows=0):
    """A layer in the middle of a repair."""
    torch.manual_seed(0)
    layer = SingularLinear(nn.Linear(16, rows).requires_grad_(False), fixed_rows)
    with torch.no_grad():
        layer.epsilon.copy_(0.1 * torch.randn(len(layer.epsilon)))
    return layer


@pytest.mark.parametrize(("rows", "fixed_rows"), [(24, 0), (8, 0), (48, 32)])
def test_gradients_are_those_of_the_recomposed_matrix(rows, fixed_rows):
    layer = trained_layer(rows, fixed_rows)
    x = torch.randn(2, 5, 16, requires_grad=True)
    composed = torch.cat([layer.fixed, layer.u @ torch.diag(layer.s + layer.epsilon) @ layer.vh])
    outputs = layer(x), linear(x, composed, layer.bias)
    assert relative_error(*outputs) < 1e-5
    weights = torch.randn_like(outputs[0])
    ours, plain = (torch.autograd.grad((y * weights).sum(), [x, layer.epsilon]) for y in outputs)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, plain, strict=True))


@torch.no_grad()
def test_the_matrix_is_composed_in_fp32_where_blocks_run_in_bf16():
    """The matrix of the last search is what held-out images see and what may be written."""
    layer, same = trained_layer(), trained_layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 16)).dtype == torch.bfloat16
    assert torch.equal(layer.weight, same.weight)


def test_an_untrained_layer_is_the_original_bit_by_bit():
    plain = nn.Linear(16, 24).requires_grad_(False)
    x = torch.randn(3, 16)
    assert torch.equal(SingularLinear(plain)(x), plain(x))
