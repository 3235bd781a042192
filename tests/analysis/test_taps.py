"""Places inside a block are what their names say, and looking at them changes nothing."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu, silu

from pretrain.analysis.taps import POINTS, SCALED, Place, places, pool, pooled_features, tapped, width
from pretrain.models.init import init_weights
from pretrain.models.vit import VisionTransformer
from tests.small import small_model

PLAIN = small_model(embed_dim=32, depth=3, num_heads=4, layer_scale=0.5)
MODELS = {
    "mlp": PLAIN,
    "swiglu-registers": replace(PLAIN, ffn_layer="swiglu", num_register_tokens=4),
    "no-layer-scale": replace(PLAIN, layer_scale=None),
}


@pytest.fixture(params=MODELS)
def backbone(request):
    model = VisionTransformer(MODELS[request.param], "math").eval()
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(parameter))
            )
    return model


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def tokens_of(backbone, images):
    """Whole tokens at every place."""
    seen = {}
    looks = {place: lambda t, place=place: seen.update({place: t.clone()}) for place in places(backbone.cfg)}
    with tapped(backbone, len(images), looks):
        backbone([images])
    return seen


def test_points_are_related_as_in_the_block(backbone, images):
    seen, close = tokens_of(backbone, images), {"atol": 1e-5, "rtol": 1e-5}
    scaled = backbone.cfg.layer_scale is not None
    for i, block in enumerate(backbone.blocks):
        at = {point: seen[Place(i, point)] for point in POINTS if scaled or point not in SCALED}
        before = seen[Place(i - 1, "RC2")] if i else backbone.embed(images)
        attention, ffn = ("MHA_LS", "FC2_LS") if scaled else ("MHA", "FC2")
        torch.testing.assert_close(at["LN1"], block.norm1(before), **close)
        torch.testing.assert_close(at["RC1"], before + at[attention], **close)
        torch.testing.assert_close(at["LN2"], block.norm2(at["RC1"]), **close)
        torch.testing.assert_close(at["RC2"], at["RC1"] + at[ffn], **close)
        if scaled:
            torch.testing.assert_close(at["MHA_LS"], at["MHA"] * block.ls1.gamma, **close)
        if backbone.cfg.ffn_layer == "mlp":
            torch.testing.assert_close(at["Act"], gelu(at["FC1"]), **close)
            torch.testing.assert_close(at["FC2"], block.mlp.fc2(at["Act"]), **close)
        else:
            gate, value = at["FC1"].chunk(2, dim=-1)
            torch.testing.assert_close(at["Act"], silu(gate) * value, **close)
            torch.testing.assert_close(at["FC2"], block.mlp.w3(at["Act"]), **close)


def test_the_last_output_is_what_the_model_norms(backbone, images):
    last = tokens_of(backbone, images)[Place(2, "RC2")]
    features = backbone([images])[0]
    torch.testing.assert_close(backbone.norm(last)[:, 0], features.cls)


def test_pooled_in_the_hook_is_pooled_afterwards(backbone, images):
    wanted, seen = places(backbone.cfg), tokens_of(backbone, images)
    found = pooled_features(backbone, images, wanted)
    assert list(found) == wanted
    registers = backbone.cfg.num_register_tokens
    for place, pooled in found.items():
        assert torch.equal(pooled.cls, seen[place][:, 0])
        assert torch.equal(pooled.patch_mean, seen[place][:, 1 + registers :].mean(dim=1))
        assert pooled.cls.shape == (5, width(backbone.cfg, place.point))


def test_no_tokens_outlive_their_hook(backbone, images):
    """A view of the class token would keep the tokens of every place: 15 GB of a ViT-B's batch."""
    for place, pooled in pooled_features(backbone, images, places(backbone.cfg)).items():
        for kept in pooled:
            assert kept.untyped_storage().nbytes() == 4 * kept.numel(), place


def test_looking_changes_nothing_and_leaves_no_hook(backbone, images):
    before = backbone([images])[0]
    found = pooled_features(backbone, images, places(backbone.cfg))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    after = backbone([images])[0]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    alone = pooled_features(backbone, images[2:3], [Place(1, "Act")])[Place(1, "Act")]
    torch.testing.assert_close(alone.cls, found[Place(1, "Act")].cls[2:3])


def test_there_are_eight_points_a_block_and_two_more_with_layer_scale():
    assert len(places(MODELS["no-layer-scale"])) == 8 * 3
    assert len(places(MODELS["mlp"])) == 10 * 3
    assert str(Place(3, "Act")) == "block03_Act"


def test_a_test_time_register_is_in_no_pool(images):
    model = VisionTransformer(replace(PLAIN, register_neurons=[[1, 3]]), "math").eval()
    init_weights(model, 0)
    seen = tokens_of(model, images)[Place(2, "RC2")]
    found = pooled_features(model, images, [Place(2, "RC2")])[Place(2, "RC2")]
    assert seen.shape[1] == 1 + 1 + 16 and torch.equal(found.patch_mean, seen[:, 2:].mean(dim=1))


def test_registers_are_in_no_pool():
    tokens = torch.zeros(1, 1 + 4 + 9, 2)
    tokens[:, 1:5] = 100
    assert pool(tokens, 5).patch_mean.abs().max() == 0 and pool(tokens, 5).cls.abs().max() == 0
