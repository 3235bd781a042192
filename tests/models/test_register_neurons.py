"""The test-time register in the backbone: what moves, for whom, and what stays."""

from dataclasses import replace

import pytest
import torch

from pretrain.analysis.maps import cls_attention
from pretrain.config.derived import prefix_tokens
from pretrain.models.init import init_weights
from pretrain.models.packing import pack, unpack
from pretrain.models.register_neurons import move_to_register
from pretrain.models.vit import VisionTransformer
from tests.small import small_config

NEURONS = [[1, 3], [0, 5], [1, 0]]


def build(**changes) -> VisionTransformer:
    model = VisionTransformer(replace(small_config().model, **changes))
    init_weights(model, seed=0)
    with torch.no_grad():  # larger than at the start of training, so that every part matters
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def images(number: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def by_loops(hidden: torch.Tensor, prefix: int, neurons: list[int]) -> torch.Tensor:
    """The same for sequences (n, T, M), value by value."""
    moved = hidden.clone()
    for index, sequence in enumerate(hidden):
        for unit in neurons:
            moved[index, prefix - 1, unit] = max(sequence[:, unit].tolist(), key=abs)
            moved[index, prefix:, unit] = 0
    return moved


@pytest.mark.parametrize("prefix", [2, 5])
def test_moving_is_that_of_loops_over_sequences_of_two_lengths(prefix):
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(n, length, 6, generator=generator) for n, length in ((3, 11), (2, 7))]
    hidden, layout = pack(groups)
    moved = unpack(move_to_register(hidden, layout, prefix, [4, 1]), layout)
    for found, group in zip(moved, groups, strict=True):
        assert torch.equal(found, by_loops(group, prefix, [4, 1]))


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
def test_no_image_sees_another(ffn_layer, registers):
    """Two sizes packed, a batch, and each image alone give the same."""
    model = build(ffn_layer=ffn_layer, num_register_tokens=registers, register_neurons=NEURONS)
    assert prefix_tokens(model.cfg) == 2 + registers
    large, small = images(3, 32, 2), images(4, 16, 3)
    with torch.no_grad():
        packed = model([large, small])
        alone = [model([group[i : i + 1]])[0] for group in (large, small) for i in range(len(group))]
    for group, singles in ((packed[0], alone[:3]), (packed[1], alone[3:])):
        assert group.registers.shape[1] == registers + 1
        for together, parts in zip(group, zip(*singles, strict=True), strict=True):
            torch.testing.assert_close(together, torch.cat(parts), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
def test_no_weight_is_added_and_only_named_blocks_move(ffn_layer):
    plain = build(ffn_layer=ffn_layer, depth=3)
    model = VisionTransformer(replace(plain.cfg, register_neurons=NEURONS))
    model.load_state_dict(plain.state_dict())
    assert [block.register_neurons for block in model.blocks] == [(5,), (3, 0), ()]
    shown = images(2, 32, 2)
    with torch.no_grad():
        tokens = model.embed(shown)
        assert not tokens[:, 1].any()
        assert torch.equal(plain.embed(shown), torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1))
        before, after = plain([shown])[0], model([shown])[0]
    assert (before.patches - after.patches).abs().max() > 0.01


def test_maps_of_attention_leave_the_register_out():
    model = build(num_register_tokens=2, register_neurons=NEURONS)
    shares = cls_attention(model, images(2, 32, 2))
    assert shares.shape[2:] == (4, 4) and (shares.sum(dim=(2, 3)) < 1).all()
