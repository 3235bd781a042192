"""Foreground from synthetic tokens whose objects are known."""

import pytest
import torch
from torch import Tensor

from pretrain.analysis.foreground import Foreground, foreground_colours
from pretrain.errors import InputError


def scene(sign: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (4, 8, 8, 16) of objects 3 x 4 patches large, each half of its own, and where they are."""
    generator = torch.Generator().manual_seed(seed)
    axis, part, shift = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:3]
    objects = torch.zeros(4, 8, 8, dtype=torch.bool)
    halves = torch.zeros(4, 8, 8)
    for i in range(4):
        objects[i, 1 + i : 4 + i, 2:6] = True
        halves[i, 1 + i : 4 + i, 2:4], halves[i, 1 + i : 4 + i, 4:6] = 1, -1
    tokens = 5 * shift + sign * 6 * axis * objects.unsqueeze(-1) + part * halves.unsqueeze(-1)
    return tokens + 0.1 * torch.randn(tokens.shape, generator=generator), objects


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_objects_are_found_whichever_way_the_component_points(sign: float) -> None:
    tokens, objects = scene(sign)
    found = Foreground.fit(tokens)
    assert torch.equal(found.mask(tokens), objects)
    others, places = scene(sign, seed=0)
    assert torch.equal(found.mask(others.flip(2)), places.flip(2))  # the basis serves other images too
    values = found.values(tokens)
    assert float(values[objects].mean() - values[~objects].mean()) == pytest.approx(6, abs=0.2)


def test_colours_tell_parts_of_objects_and_nothing_else() -> None:
    tokens, objects = scene(1.0)
    colours, mask = foreground_colours(tokens)
    assert colours.shape == (4, 3, 8, 8) and torch.equal(mask, objects)
    assert (colours.movedim(1, -1)[~objects] == 0).all()
    first = colours[:, 0]  # the halves are what differs most within the objects
    left, right = (
        first[i, 1 + i : 4 + i, columns] for i in range(1) for columns in (slice(2, 4), slice(4, 6))
    )
    assert abs(float(left.mean() - right.mean())) > 0.8


def test_what_has_no_inside_is_refused() -> None:
    with pytest.raises(InputError, match="at least 3 x 3 patches"):
        Foreground.fit(torch.randn(2, 2, 4, 8))
    with pytest.raises(InputError, match="finite tokens"):
        Foreground.fit(torch.full((2, 4, 4, 8), torch.nan))
