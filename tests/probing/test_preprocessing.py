"""Preprocessing against scikit-learn's, in blocks, from files, without touching what it is given."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler, normalize

from pretrain.errors import InputError
from pretrain.probing import preprocessing
from pretrain.probing.preprocessing import Features, fit_preprocessing, from_array, prepare, unit_rows


@pytest.fixture
def rows() -> np.ndarray:
    """(200, 12) with a dead row; before any scaling channel 3 is 0 everywhere."""
    drawn = np.random.default_rng(0).standard_normal((200, 12)) * np.arange(1, 13) + 5
    drawn[:, 3] = 0
    drawn[17] = 0
    return drawn


def test_it_is_scikit_learns_and_changes_nothing_in_place(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "BLOCK", 7 * 12)
    kept = rows.copy()
    train, test = prepare(from_array(rows[:150]), from_array(rows[150:]))
    scaler = StandardScaler().fit(normalize(rows[:150]))
    assert np.allclose(train.read(), scaler.transform(normalize(rows[:150])), atol=1e-12)
    assert np.allclose(test.read(), scaler.transform(normalize(rows[150:])), atol=1e-12)
    assert np.array_equal(rows, kept)
    assert np.isfinite(train.read()).all() and not train.read()[:, 3].any()


def test_a_constant_channel_keeps_its_scale() -> None:
    constant = np.full((50, 2), 0.1, np.float32)
    constant[:, 1] = np.arange(50)
    fitted = fit_preprocessing(from_array(constant), unit_length=False)
    assert fitted.scale[0] == 1 and fitted.scale[1] == pytest.approx(np.arange(50).std())
    assert np.abs(fitted.apply(constant.astype(np.float64))[:, 0]).max() < 1e-12


def test_rows_have_length_one_unless_dead(rows) -> None:
    lengths = np.linalg.norm(unit_rows(rows), axis=1)
    assert lengths[17] == 0 and np.allclose(np.delete(lengths, 17), 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_mapped_files_are_read_by_rows(rows, tmp_path: Path, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "BLOCK", 12 * 16)
    np.save(tmp_path / "place.npy", (rows * 1000).astype(dtype))
    chosen = np.array([3, 100, 17, 199, *range(40, 60)])
    mapped = Features("place", lambda: np.load(tmp_path / "place.npy", mmap_mode="r"), chosen)
    blocks = list(mapped.then(unit_rows).blocks())
    assert [(start, len(block)) for start, block in blocks] == [(0, 16), (16, 8)]
    expected = normalize((rows * 1000).astype(dtype).astype(np.float64))[chosen]  # fp16 squares overflow
    assert np.allclose(np.concatenate([block for _, block in blocks]), expected, rtol=1e-12)
    assert mapped.shape == (24, 12)


def test_what_cannot_be_read_is_one_line(rows) -> None:
    rows[5, 5] = np.nan
    with pytest.raises(InputError, match="block02_Act: the features hold NaN or infinity"):
        fit_preprocessing(from_array(rows, "block02_Act"))
    with pytest.raises(InputError, match="block02_Act: there is no image"):
        fit_preprocessing(from_array(rows, "block02_Act", np.zeros(0, np.int64)))
