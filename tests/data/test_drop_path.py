import numpy as np

from pretrain.config.derived import kept_rows
from pretrain.data.drop_path import PADDING, drop_subsets
from pretrain.seeding import numpy_stream


def test_equal_rates_fill_the_array() -> None:
    rows = drop_subsets((0.3,) * 4, 20, numpy_stream(0, "drop_path"))
    assert rows is not None and rows.shape == (4, 2, 14) and rows.dtype == np.int64
    for subset in rows.reshape(8, 14):
        assert len(set(subset)) == 14 and subset.min() >= 0 and subset.max() < 20
    assert len({tuple(sorted(subset)) for subset in rows.reshape(8, 14)}) == 8  # independent draws


def test_other_rates_are_padded_behind() -> None:
    rates = (0.0, 0.2, 0.4)
    rows = drop_subsets(rates, 10, numpy_stream(0, "drop_path"))
    assert rows is not None and rows.shape == (3, 2, 10)
    for block, rate in enumerate(rates):
        kept = kept_rows(rate, 10)
        assert kept == (10, 8, 6)[block]
        assert (rows[block, :, :kept] >= 0).all() and (rows[block, :, kept:] == PADDING).all()


def test_at_least_one_row_is_kept() -> None:
    rows = drop_subsets((0.99,), 3, numpy_stream(0, "drop_path"))
    assert rows is not None and rows.shape == (1, 2, 1)


def test_nothing_to_drop() -> None:
    assert drop_subsets((0.0, 0.0), 10, numpy_stream(0, "drop_path")) is None
    assert drop_subsets((0.3, 0.3), 0, numpy_stream(0, "drop_path")) is None


def test_every_row_is_kept_equally_often() -> None:
    counts = np.zeros(10)
    for seed in range(500):
        rows = drop_subsets((0.4,), 10, numpy_stream(seed, "drop_path"))
        assert rows is not None
        counts += np.bincount(rows.ravel(), minlength=10)
    np.testing.assert_allclose(counts / 1000, 0.6, atol=0.07)
