"""Against the released code: maps, directions, loss values, on a tiny SwiGLU model with a planted defect."""

import pytest
import torch

from pretrain.config.schema import ModelConfig
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.detection import alignment, defective_by_angle
from pretrain.sinder.directions import defect_directions
from pretrain.sinder.hits import Criterion
from pretrain.sinder.linear_maps import block_maps
from pretrain.sinder.repair import Repair, RepairSettings
from pretrain.sinder.smooth_loss import smooth_loss, smooth_targets
from tests.golden_files import load, relative_error, section

ARRAYS, META = load("sinder_swiglu")
STATE = section(ARRAYS, "state_dict/")
DEPTH = META["cfg"]["depth"]
MODEL = ModelConfig(
    arch="custom",
    embed_dim=META["cfg"]["dim"],
    depth=DEPTH,
    num_heads=META["cfg"]["heads"],
    patch_size=14,
    img_size=META["cfg"]["img"],
    ffn_layer="swiglu",
    layer_scale=1.0,
    drop_path_rate=0.0,
)


@pytest.mark.parametrize("index", range(DEPTH))
def test_maps_of_a_block(index):
    maps = block_maps(STATE, MODEL, index)
    assert relative_error(maps.attention.float(), ARRAYS[f"attention_map/{index}"]) < 1e-6
    assert relative_error(maps.mlp.float(), ARRAYS[f"mlp_map/{index}"]) < 5e-3  # theirs is sampled


def test_directions():
    layers = defect_directions(STATE, MODEL)
    cosines = [layer.direction.float() @ u for layer, u in zip(layers, ARRAYS["directions"], strict=True)]
    assert all(abs(cosine) > 0.999 for cosine in cosines)


def losses():
    return [(3, i) for i in range(DEPTH)] + [(5, i) for i in (1, 2, 3)]


@pytest.mark.parametrize(("kernel", "index"), losses())
def test_smooth_loss_with_their_directions_and_tokens(kernel, index):
    golden = section(ARRAYS, f"loss_kernel{kernel}/{index}/")
    tokens = ARRAYS[f"tokens/{index}"][:, 1:].unflatten(1, (16, 16))
    cosines = alignment(tokens, ARRAYS["directions"][index])
    defective = defective_by_angle(cosines, 4, kernel // 2)
    rows, cols = defective[0].nonzero().T
    border = kernel // 2
    assert torch.equal(rows, golden["defective_rows"]) or torch.equal(rows - border, golden["defective_rows"])
    assert torch.equal(cols, golden["defective_cols"]) or torch.equal(cols - border, golden["defective_cols"])
    assert relative_error(smooth_targets(tokens, cosines, kernel)[0], golden["target"]) < 1e-5
    value = smooth_loss(tokens, cosines, defective, kernel)
    assert value.item() == pytest.approx(golden["value"].item(), rel=1e-5)


def test_thirty_steps_of_repair():
    """The released loop on one image: the trace of losses, and every repaired matrix."""
    sgd = META["sgd"]
    criterion = Criterion(sgd["mask_thr"], sgd["kernel"], sgd["skip_less_than"], sgd["limit_layers"])
    settings = RepairSettings(criterion, sgd["lr"], sgd["momentum"])
    backbone = VisionTransformer(MODEL, "math")
    backbone.load_state_dict(STATE)
    repair = Repair(backbone, list(ARRAYS["directions"]), settings)
    trained = sum(layer.epsilon.numel() for layer in repair.layers.values())
    assert sorted(repair.layers) == sorted({name.rpartition(".")[0] for name in META["trainable"]})
    assert trained == 4 * DEPTH * 64
    for block, loss, defective in META["trace"]:
        step = repair.step(ARRAYS["image"])
        assert (step.first_block, step.defective_patches, step.applied) == (block, defective, True)
        assert step.loss == pytest.approx(loss, rel=1e-5)
    repaired = repair.repaired(STATE)
    for name, tensor in STATE.items():
        if f"repaired/{name}" in ARRAYS:
            assert relative_error(repaired[name], ARRAYS[f"repaired/{name}"]) < 1e-4
        else:
            assert repaired[name] is tensor
    for index in (2, 3):  # beyond the block that shows the defect: the same bits
        assert all(repaired[n] is STATE[n] for n in STATE if n.startswith(f"blocks.{index}."))
