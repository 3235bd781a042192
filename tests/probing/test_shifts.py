"""Measures of shift against direct formulas, nothing without a shift, more with a larger one."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from pretrain.errors import InputError
from pretrain.probing.shifts import frechet_distance, knn_drop, linear_mmd, proxy_a_distance


def rows(number: int, dim: int, seed: int, rank: int | None = None) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((rank or dim, dim))
    return generator.standard_normal((number, rank or dim)) @ mixing + generator.standard_normal(dim)


def test_frechet_is_the_direct_formula() -> None:
    first, second = rows(300, 12, 0), rows(200, 12, 1)
    covariances = [np.cov(part, rowvar=False) for part in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    direct = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(direct, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize(("number", "rank"), [(100, 20), (100, 3), (8, 20)])
def test_frechet_of_equal_sets_is_zero_at_any_rank(number: int, rank: int) -> None:
    part = rows(number, 20, 0, rank)
    scale = part.var(axis=0).sum()
    assert frechet_distance(part, part[::-1]) < 1e-12 * scale
    assert frechet_distance(part, part + 2.0) == pytest.approx(4 * 20, rel=1e-9)
    assert frechet_distance(part, 3 * part) == pytest.approx(
        4 * ((part.mean(0) ** 2).sum() + part.var(axis=0, ddof=1).sum()), rel=1e-9
    )


def test_linear_mmd_is_the_distance_of_means() -> None:
    part = rows(50, 6, 0)
    assert linear_mmd(part, part + np.array([3.0, 4, 0, 0, 0, 0])) == pytest.approx(25)
    kernel = linear_mmd(part, rows(30, 6, 1))
    other = rows(30, 6, 1)
    assert kernel == pytest.approx(
        (part @ part.T).mean() + (other @ other.T).mean() - 2 * (part @ other.T).mean()
    )


def test_a_distance_grows_from_none_to_two() -> None:
    same, shifts = np.random.default_rng(0), [0.0, 1.0, 20.0]
    source = same.standard_normal((800, 8))
    found = [proxy_a_distance(source, same.standard_normal((500, 8)) + shift / 3, 0) for shift in shifts]
    assert abs(found[0]) < 0.3 and 0.3 < found[1] < 1.5 and found[2] == 2
    assert found[0] == proxy_a_distance(source, source, 0) or abs(proxy_a_distance(source, source, 0)) < 0.3
    with pytest.raises(InputError, match="800 and 3 images"):
        proxy_a_distance(source, source[:3], 0)


def test_a_drop_is_in_points() -> None:
    assert knn_drop(80.5, 60.0) == 20.5
