import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pretrain.analysis import knn
from pretrain.analysis.knn import knn_accuracy, knn_predict
from pretrain.errors import InputError


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels (n, 64) and labels of real handwritten digits: training and test."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels)
    return x[:1000], y[:1000], x[1000:], y[1000:]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 0.01), (200, 0.07), (1000, 1.0)])
def test_predictions_equal_scikit_learns(digits, k: int, temperature: float) -> None:
    train, train_labels, test, _ = digits
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    reference.fit(train.double().numpy(), train_labels.numpy())
    expected = torch.tensor(reference.predict(test.double().numpy()))
    assert torch.equal(knn_predict(train, train_labels, test, k, temperature), expected)


def test_accuracy_is_the_percentage_of_right_predictions(digits) -> None:
    train, train_labels, test, test_labels = digits
    right = knn_predict(train, train_labels, test) == test_labels
    assert knn_accuracy(*digits) == pytest.approx(100 * right.sum().item() / 797)
    assert knn_accuracy(train, train_labels, train, train_labels, k=1) == 100


def test_chunks_and_scale_change_nothing(digits, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test, _ = digits
    whole = knn_predict(train, labels, test)
    monkeypatch.setattr(knn, "CHUNK", 7 * len(train))
    chunked = knn_predict(train * torch.rand(len(train), 1).add(0.1), labels, test * 1000)
    assert torch.equal(chunked, whole)


def test_nearer_neighbours_weigh_more_the_smaller_the_temperature() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, test = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]])
    # exp(1 / T) against 2 exp(0.8 / T): equal at T = 0.2 / ln 2 = 0.2885
    assert knn_predict(train, labels, test, 3, 0.28).item() == 1
    assert knn_predict(train, labels, test, 3, 0.30).item() == 0
    assert knn_predict(train, labels, test, 3, 1e-4).item() == 1  # exp(1 / T) alone would overflow


def test_low_precision_features_and_labels_unknown_in_training() -> None:
    train, labels = torch.eye(3).bfloat16(), torch.tensor([0, 1, 2], dtype=torch.int32)
    test_labels = torch.tensor([0, 1, 9])
    assert knn_accuracy(train, labels, torch.eye(3).bfloat16(), test_labels, k=1) == pytest.approx(200 / 3)
    assert knn_accuracy(train, labels, torch.eye(3), labels, k=1, num_classes=10) == 100


def test_more_neighbours_than_images_names_the_setting() -> None:
    train, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(InputError, match=r"log\.knn\.k=20: must be 1 to 3, the number of training images"):
        knn_predict(train, labels, train)
    with pytest.raises(InputError, match=r"log\.knn\.k=0"):
        knn_predict(train, labels, train, k=0)
    with pytest.raises(InputError, match=r"log\.knn\.test: holds no images"):
        knn_accuracy(train, labels, torch.empty(0, 3), torch.empty(0), k=1)
