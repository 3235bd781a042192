"""Splits are repeatable, in proportion and keep groups whole."""

import numpy as np
import pytest

from pretrain.errors import InputError
from pretrain.probing.selection import check_disjoint, split

LABELS = np.random.default_rng(0).choice(5, size=1003, p=[0.5, 0.3, 0.1, 0.09, 0.01])


def test_it_is_a_function_of_the_seed() -> None:
    first, again, other = split(LABELS, 0.2, 0), split(LABELS, 0.2, 0), split(LABELS, 0.2, 1)
    assert np.array_equal(first.validation, again.validation)
    assert len(np.intersect1d(first.validation, other.validation)) < 100  # 40 expected of 200
    assert np.array_equal(np.sort([*first.train, *first.validation]), np.arange(1003))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.07])
def test_classes_keep_their_proportions(share: float) -> None:
    found = split(LABELS, share, 3)
    inside, whole = np.bincount(LABELS[found.validation]), np.bincount(LABELS)
    assert np.abs(inside - share * whole).max() <= 1
    assert len(found.validation) == round(share * 1003)


def test_small_classes_are_on_both_sides_and_single_images_train() -> None:
    labels = [0] * 40 + [1, 1, 2]
    found = split(labels, 0.05, 0)
    assert sorted(np.asarray(labels)[found.validation]) == [0, 0, 1]


def test_groups_stay_whole_in_proportion() -> None:
    generator = np.random.default_rng(1)
    groups = [f"patient{number}" for number in generator.integers(80, size=1003)]
    for seed in range(5):
        found = split(LABELS, 0.25, seed, groups)
        sides = [{groups[image] for image in side} for side in (found.train, found.validation)]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 80
        inside, whole = np.bincount(LABELS[found.validation], minlength=5), np.bincount(LABELS)
        assert np.abs(inside / whole - 0.25)[:4].max() < 0.1
        check_disjoint(
            [groups[image] for image in found.train], [groups[image] for image in found.validation]
        )
    assert not np.array_equal(split(LABELS, 0.25, 0, groups).train, split(LABELS, 0.25, 1, groups).train)


def test_no_class_leaves_the_training_images_with_its_only_group() -> None:
    labels, groups = [0] * 30 + [1] * 30 + [2] * 10, [*range(30), *range(30), *[99] * 10]
    for seed in range(10):
        found = split(labels, 0.5, seed, groups)
        assert set(np.asarray(labels)[found.train]) == {0, 1, 2}
        assert 99 not in {groups[image] for image in found.validation}


def test_a_leak_names_a_group() -> None:
    check_disjoint(["a", "b"], ["c"])
    with pytest.raises(InputError, match=r"^group 'b' and 1 more: in training and test images"):
        check_disjoint(["a", "b", "c"], ["d", "b", "c", "b"])


def test_what_cannot_be_split_is_one_line() -> None:
    with pytest.raises(InputError, match=r"too few groups \(1\)"):
        split([0, 1] * 5, 0.5, 0, ["only"] * 10)
    with pytest.raises(InputError, match="too few images"):
        split([0, 1, 2], 0.5, 0)
    with pytest.raises(InputError, match=r"share=1\.0"):
        split(LABELS, 1.0, 0)
    with pytest.raises(InputError, match="3 groups for 1003 labels"):
        split(LABELS, 0.5, 0, [1, 2, 3])
