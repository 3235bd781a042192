import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pretrain.analysis.features import extract, knn_scores
from pretrain.config.schema import KnnConfig
from pretrain.errors import InputError


def features(images: Tensor) -> tuple[Tensor, Tensor]:
    """Red channel as CLS token, pixels of the green and blue channels as patch tokens."""
    return images[:, 0].flatten(1), images[:, 1:].flatten(2)


def batches(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_features_come_in_order_in_fp32_with_patches_averaged() -> None:
    images, labels = torch.randn(7, 3, 4, 4), torch.arange(7)
    found = extract(features, batches(images, labels, 3))
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.cls, images[:, 0].flatten(1))
    assert torch.allclose(found.patch_mean, images[:, 1:].flatten(2).mean(1))


def test_no_tokens_outlive_their_batch() -> None:
    """A class token that is a view would keep the tokens of all images."""
    made: list[StorageWeakRef] = []

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        assert all(tokens.expired() for tokens in made[:-1])  # the loop's names hold the batch before
        tokens = images.new_ones(len(images), 64, 8)
        made.append(StorageWeakRef(tokens.untyped_storage()))
        return tokens[:, 0], tokens[:, 1:]

    images, labels = torch.randn(9, 3, 4, 4), torch.arange(9)
    assert extract(features, batches(images, labels, 3)).cls.shape == (9, 8)
    assert len(made) == 3 and all(tokens.expired() for tokens in made)


def test_low_precision_tokens_are_averaged_in_fp32_without_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(()))

    def low(images: Tensor) -> tuple[Tensor, Tensor]:
        cls, patches = features(images)
        return (cls * weight).bfloat16(), (patches.repeat(1, 500, 1) * weight).bfloat16()

    images = torch.rand(4, 3, 4, 4)
    found = extract(low, [(images, torch.zeros(4, dtype=torch.int32))])
    assert found.cls.dtype == found.patch_mean.dtype == torch.float32
    assert found.labels.dtype == torch.int64
    assert not found.cls.requires_grad and weight.grad is None
    exact = images[:, 1:].flatten(2).bfloat16().double().mean(1).float()
    assert torch.allclose(found.patch_mean, exact, atol=1e-6)


def test_scores_tell_the_class_token_from_the_patches() -> None:
    """The label is written in the direction of the green and blue pixels; the red ones are noise."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % 2
        images = torch.randn(n, 3, 4, 4, generator=generator)
        images[:, 1:, 0, 0] += 20 * (2 * labels - 1)[:, None]
        return images, labels

    train, test = batches(*split(200), 16), batches(*split(100), 16)
    scores = knn_scores(features, train, test, KnnConfig(k=5))
    assert list(scores) == ["knn/cls", "knn/patch_mean"]
    assert scores["knn/patch_mean"] == 100
    assert 25 < scores["knn/cls"] < 75


def test_settings_reach_the_vote() -> None:
    split = [(torch.randn(6, 3, 2, 2), torch.arange(6))]
    assert knn_scores(features, split, split, KnnConfig(k=1))["knn/cls"] == 100
    with pytest.raises(InputError, match=r"log\.knn\.k=7: must be 1 to 6"):
        knn_scores(features, split, split, KnnConfig(k=7))


def test_no_images_name_the_settings() -> None:
    with pytest.raises(InputError, match=r"check log\.knn\.train and log\.knn\.test"):
        extract(features, [])
