"""Gradients of hits: through the search's own forward and through another one, in batches and alone."""

import pytest
import torch

from pretrain.sinder.directions import defect_directions
from pretrain.sinder.hits import Criterion, find_hits, hit_backward
from pretrain.sinder.singular_values import decompose
from tests.golden_files import relative_error
from tests.sinder.planted import BLOCK, MODELS, clean_backbone, noise, plant

CRITERIA = {
    "from the defect on": Criterion(least=2, limit_layers=2, first_block=BLOCK),
    "anywhere": Criterion(threshold=2.5, least=4, limit_layers=2),
    "without a limit": Criterion(threshold=2.5, least=4, limit_layers=100),
}


@pytest.fixture(scope="module")
def defective():
    """A backbone with a planted defect, its trained layers and its directions."""
    backbone = clean_backbone(MODELS["swiglu-registers"])
    plant(backbone)
    directions = [layer.direction.float() for layer in defect_directions(backbone.state_dict(), backbone.cfg)]
    return backbone, decompose(backbone), directions


def gradients(defective, images, hit, criterion, number):
    """Of the loss and of every layer, as one vector; layers without any count as zero."""
    backbone, layers, directions = defective
    for layer in layers.values():
        layer.epsilon.grad = None
    loss = hit_backward(backbone, images, hit, directions, criterion, number)
    found = {name: layer.epsilon.grad for name, layer in layers.items() if layer.epsilon.grad is not None}
    assert {int(name.split(".")[1]) for name in found} == set(range(hit.first, hit.block + 1))
    parts = [found.get(name, torch.zeros_like(layer.epsilon)) for name, layer in layers.items()]
    return torch.cat([torch.tensor([loss]), *parts])


def find(defective, images, criterion):
    backbone, _, directions = defective
    return find_hits(backbone, images, directions, criterion)


@pytest.mark.parametrize("name", CRITERIA)
def test_the_recorded_search_gives_the_gradients_of_another_forward(name, defective):
    criterion, recorded, blocks = CRITERIA[name], 0, set()
    for images in noise(24, seed=3).split(3):
        for hit in find(defective, images, criterion):
            assert hit.block - hit.first < criterion.limit_layers
            blocks.add(hit.block)
            if hit.passes:
                recorded += 1
                again = gradients(defective, images, hit._replace(passes=[]), criterion, 3)
                assert relative_error(gradients(defective, images, hit, criterion, 3), again) < 1e-5
    assert recorded > 3 and (len(blocks) > 1 or criterion.first_block)


@pytest.mark.parametrize("clean", [1, 4])
@pytest.mark.parametrize("name", CRITERIA)
def test_a_batch_gives_the_mean_of_its_images(name, clean, defective):
    """With few clean images the backward goes through all of them, with many it does not."""
    criterion, images = CRITERIA[name], noise(8, seed=4)
    images[:clean] = 0
    hits = find(defective, images, criterion)
    number = sum(len(hit.images) for hit in hits)
    whole = sum(gradients(defective, images, hit, criterion, number) for hit in hits)
    alone = 0.0
    for image in images.split(1):
        for hit in find(defective, image, criterion):
            alone = alone + gradients(defective, image, hit, criterion, number)
    assert number and relative_error(whole, alone) < 1e-4
    if criterion.first_block:
        assert [bool(hit.passes) for hit in hits][:1] == [clean == 1]
