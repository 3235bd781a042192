import numpy as np
import pytest
import torch

from pretrain.config.schema import MaskConfig
from pretrain.data.collate import collate
from pretrain.data.drop_path import drop_subsets
from pretrain.data.masking import group_masks
from pretrain.data.slots import GroupArrays, SlotArrays
from pretrain.seeding import numpy_stream

SIZE, LOCAL, GRID = 3, 4, 4
RATES = (0.0, 0.25, 0.5)


def tagged(kind: int, crops: int, group: int, pixels: int) -> np.ndarray:
    """Crops whose first pixels say what they are: kind, crop, group, image."""
    array = np.zeros((crops, SIZE, 3, pixels, pixels), np.uint8)
    for crop in range(crops):
        for image in range(SIZE):
            array[crop, image, 0, 0, :4] = kind, crop, group, image
    return array


def make_group(index: int, rates: tuple[float, ...] = RATES) -> GroupArrays:
    return GroupArrays(
        global_crops=tagged(1, 2, index, 8),
        local_crops=tagged(2, LOCAL, index, 4),
        masks=group_masks(MaskConfig(), GRID, 2 * SIZE, numpy_stream(index, "mask")),
        drop_global=drop_subsets(rates, 2 * SIZE, numpy_stream(index, "global")),
        drop_local=drop_subsets(rates, LOCAL * SIZE, numpy_stream(index, "local")),
    )


def slot_of(groups: list[GroupArrays]) -> SlotArrays:
    """The groups as workers write them: crops side by side, the rest one after another."""

    def stacked(name: str) -> np.ndarray | None:
        parts = [getattr(group, name) for group in groups]
        return None if parts[0] is None else np.stack(parts)

    return SlotArrays(
        global_crops=np.concatenate([group.global_crops for group in groups], axis=1),
        local_crops=np.concatenate([group.local_crops for group in groups], axis=1),
        masks=np.stack([group.masks for group in groups]),
        drop_global=stacked("drop_global"),
        drop_local=stacked("drop_local"),
    )


GROUPS = [make_group(index) for index in range(2)]
BATCH = collate(slot_of(GROUPS), 100)
IMAGES = 2 * SIZE


def test_rows_are_crop_major_over_the_micro_batch() -> None:
    for kind, crops, tensor in ((1, 2, BATCH.global_crops), (2, LOCAL, BATCH.local_crops)):
        assert tensor.shape[0] == crops * IMAGES and tensor.dtype == torch.uint8 and tensor.is_contiguous()
        for crop in range(crops):
            for image in range(IMAGES):
                tag = tensor[crop * IMAGES + image, 0, 0, :4].tolist()
                assert tag == [kind, crop, image // SIZE, image % SIZE]


def test_masks_stay_with_their_crops() -> None:
    assert BATCH.masks.shape == (2 * IMAGES, GRID * GRID)
    for crop in range(2):
        for image in range(IMAGES):
            expected = GROUPS[image // SIZE].masks[crop * SIZE + image % SIZE]
            np.testing.assert_array_equal(BATCH.masks[crop * IMAGES + image].numpy(), expected)


def test_mask_indices_and_weights() -> None:
    flat = [(r, p) for r in range(2 * IMAGES) for p in range(GRID * GRID) if BATCH.masks[r, p]]
    assert BATCH.mask_indices.tolist() == [row * GRID * GRID + patch for row, patch in flat]
    expected = [1 / int(BATCH.masks[row].sum()) for row, _ in flat]
    torch.testing.assert_close(BATCH.mask_weights, torch.tensor(expected))
    masked_crops = int(BATCH.masks.any(dim=1).sum())
    assert abs(float(BATCH.mask_weights.sum()) - masked_crops) < 1e-4


def test_drop_rows_point_at_the_same_images() -> None:
    for name, crops in (("drop_global", 2), ("drop_local", LOCAL)):
        joined = getattr(BATCH, name)
        for block in range(len(RATES)):
            for branch in range(2):
                expected = []
                for number, group in enumerate(GROUPS):
                    rows = getattr(group, name)[block, branch]
                    expected += [r // SIZE * IMAGES + number * SIZE + r % SIZE for r in rows if r >= 0]
                padding = [-1] * (joined.shape[2] - len(expected))
                assert joined[block, branch].tolist() == expected + padding
                assert max(expected) < crops * IMAGES
        assert (joined[0] >= 0).all() and (joined[2] == -1).any()


def test_no_drop_path_and_no_masks() -> None:
    group = make_group(0, rates=(0.0,))
    batch = collate(slot_of([group._replace(masks=np.zeros_like(group.masks))]), 0)
    assert batch.drop_global is None and batch.drop_local is None
    assert batch.mask_indices.tolist() == [0] and batch.mask_weights.tolist() == [0]  # padding


@pytest.mark.parametrize("bucket", [1, 4, 7, 64])
def test_masked_patches_are_padded_to_whole_buckets(bucket: int) -> None:
    padded = collate(slot_of(GROUPS), 100, bucket)
    number = len(BATCH.mask_indices)
    assert len(padded.mask_indices) == -(-number // bucket) * bucket == len(padded.mask_weights)
    assert torch.equal(padded.mask_indices[:number], BATCH.mask_indices)
    assert torch.equal(padded.mask_weights[:number], BATCH.mask_weights)
    assert not padded.mask_weights[number:].any() and not padded.mask_indices[number:].any()
    unmasked = make_group(0)._replace(masks=np.zeros_like(GROUPS[0].masks))
    assert collate(slot_of([unmasked]), 0, bucket).mask_weights.tolist() == [0] * bucket


def test_position_and_sizes() -> None:
    assert (BATCH.position, BATCH.group_size, BATCH.num_images) == (100, SIZE, IMAGES)
