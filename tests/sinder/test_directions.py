"""The closed forms against sampling and automatic differentiation, the iteration against a whole SVD."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu, silu

from pretrain.analysis.outliers import norm_outliers
from pretrain.errors import InputError
from pretrain.sinder.detection import alignment, defective_by_angle
from pretrain.sinder.directions import defect_directions, leading_left
from pretrain.sinder.linear_maps import block_maps, gelu_fit, swiglu_fit
from pretrain.surgery.conversion import read_backbone, write_layout
from tests.golden_files import relative_error
from tests.surgery.backbones import GIANT, MODELS, random_state


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gelu_layer(x, weight, bias):
    return gelu(x @ weight.T + bias)


def swiglu_layer(x, weight, bias):
    gate, value = (x @ weight.T + bias).chunk(2, dim=-1)
    return silu(gate) * value


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(("fit", "layer"), [(gelu_fit, gelu_layer), (swiglu_fit, swiglu_layer)])
def test_the_fit_is_that_of_least_squares_on_many_samples(fit, layer, scale):
    weight, bias = scale * normal(24, 8) / math.sqrt(8), normal(24, seed=1)
    slopes, means = fit(weight, bias)
    half = normal(200_000, 8, seed=2)
    x = torch.cat([half, -half])  # pairs: the constant part does not disturb a fit without intercept
    y = layer(x, weight, bias)
    assert relative_error(slopes, torch.linalg.lstsq(x, y).solution.T) < 0.02
    assert relative_error(means, y.mean(0)) < 0.02


@pytest.mark.parametrize("name", ["mlp", "swiglu-registers", "no-layerscale"])
def test_biases_as_another_channel_give_the_affine_map(name):
    """Checked where the layer is affine: attention of a single token."""
    model = replace(MODELS[name], depth=1)
    state = random_state(model)
    plain, whole = block_maps(state, model, 0), block_maps(state, model, 0, biases=True)
    dim = len(plain.attention)
    for part in ("attention", "mlp"):
        assert torch.equal(getattr(whole, part)[:dim, :dim], getattr(plain, part))
        assert torch.equal(getattr(whole, part)[dim], torch.eye(dim + 1, dtype=torch.float64)[dim])
    x = normal(dim)
    centred = (x - x.mean()) * state["norm1.weight" if "norm1.weight" in state else "blocks.0.norm1.weight"]
    w = {k.removeprefix("blocks.0."): v.double() for k, v in state.items()}
    values = (centred + w["norm1.bias"]) @ w["attn.qkv.weight"].chunk(3)[2].T + w["attn.qkv.bias"].chunk(3)[2]
    update = values @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    expected = x + w.get("ls1.gamma", torch.ones(1)) * update
    found = whole.attention @ torch.cat([x, torch.ones(1)])
    assert relative_error(found[:dim], expected) < 1e-12


def test_the_iteration_is_exact():
    for matrix in (normal(200, 200), normal(6, 6), torch.diag(torch.linspace(1, 2, 50, dtype=torch.float64))):
        left, values, _ = torch.linalg.svd(matrix)
        vector, first, second = leading_left(matrix)
        assert abs(vector @ left[:, 0]) > 1 - 1e-6
        assert (first, second) == pytest.approx((values[0].item(), values[1].item()), rel=1e-9)


def test_directions_are_those_of_the_plain_product_in_every_layout():
    model = replace(GIANT, depth=4)
    state = random_state(model)
    layers = defect_directions(state, model)
    product = torch.eye(128, dtype=torch.float64)
    for index, layer in enumerate(layers):
        product = block_maps(state, model, index).block @ product
        left, values, _ = torch.linalg.svd(product)
        assert abs(layer.direction @ left[:, 0]) > 1 - 1e-6
        assert layer.log_growth == pytest.approx(values[0].log().item(), rel=1e-9)
        assert layer.growth_gap == pytest.approx((values[0] / values[1]).item(), rel=1e-6)
    for target in ("dinov2-chunked", "huggingface", "timm"):
        found = read_backbone(write_layout(state, model, target, 2))
        for mine, theirs in zip(layers, defect_directions(found.state, found.model), strict=True):
            assert torch.equal(mine.direction, theirs.direction)


def test_weights_that_are_not_finite_are_named():
    model = replace(GIANT, depth=2)
    state = random_state(model)
    state["blocks.1.attn.proj.bias"][5] = torch.inf
    with pytest.raises(InputError, match=r"^blocks\.1\.attn\.proj\.bias: holds values that are not finite"):
        defect_directions(state, model)


def test_the_homogeneous_variant_gives_another_direction_of_the_same_width():
    model = replace(GIANT, depth=3)
    state = random_state(model)
    plain, whole = defect_directions(state, model)[-1], defect_directions(state, model, biases=True)[-1]
    assert whole.direction.shape == plain.direction.shape == (128,)
    assert whole.direction.norm().item() == pytest.approx(1.0)
    assert 0.3 < abs(whole.direction @ plain.direction) < 1 - 1e-6


def test_the_angle_criterion_is_relative_to_the_image():
    direction, tokens = normal(32), normal(2, 16, 16, 32, seed=1)
    tokens[0, 5, 7] = 100 * direction
    tokens[0, 0, 3] = -3 * direction
    cosines = alignment(tokens, direction)
    assert cosines[0, 5, 7] == pytest.approx(1.0) and cosines[0, 0, 3] == pytest.approx(1.0)
    assert defective_by_angle(cosines)[0].nonzero().tolist() == [[0, 3], [5, 7]]
    assert defective_by_angle(cosines, border=1)[0].nonzero().tolist() == [[5, 7]]
    assert not defective_by_angle(cosines)[1].any()


def test_the_norm_criterion_finds_what_is_long():
    norms = 10 + 0.1 * normal(2, 12, 12)
    norms[1, 3, 4] = 60
    assert norm_outliers(norms).nonzero().tolist() == [[1, 3, 4]]
