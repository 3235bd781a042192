"""The grid of linear probes against one classifier after another, fitted by torch's own optimizer."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pretrain.analysis.last_blocks import LastBlocks, last_blocks
from pretrain.analysis.linear_probe import (
    ProbeSettings,
    Setting,
    feature_sets,
    fit_probes,
    held_out_rows,
    linear_probe,
)
from pretrain.errors import InputError
from pretrain.models.init import init_weights
from pretrain.models.vit import VisionTransformer
from pretrain.seeding import torch_stream
from tests.small import small_model

SHORT = ProbeSettings(rates=(0.01, 0.3, 3.0), epochs=3, least_steps=0, batch_size=16, seed=5)


def clusters(number: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows (n, 6) around the centre of their class of three."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (number,), generator=generator)
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    return centres[labels] + noise * torch.randn(number, 6, generator=generator), labels


def labelled(number: int, seed: int, noise: float = 1.0) -> LastBlocks:
    """Four blocks, of which only the last one tells the class."""
    rows, labels = clusters(number, seed, noise)
    others = torch.randn(number, 3, 6, generator=torch.Generator().manual_seed(seed))
    return LastBlocks(torch.cat([others, rows[:, None]], dim=1), torch.zeros(number, 6), labels)


def one_after_another(rows: Tensor, labels: Tensor, rate: float) -> nn.Linear:
    """What a probe of SHORT should become."""
    probe = nn.Linear(6, 3)
    drawn = torch.randn(6, 1, 3, generator=torch_stream(SHORT.seed, "linear probe", "weights"))
    nn.init.zeros_(probe.bias)
    probe.weight.data = 0.01 * drawn[:, 0].T
    optimizer = torch.optim.SGD(probe.parameters(), lr=rate * 16 / 256, momentum=0.9, weight_decay=0)
    per_epoch = len(rows) // 16
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * per_epoch, eta_min=0)
    for epoch in range(3):
        order = torch.randperm(len(rows), generator=torch_stream(SHORT.seed, "linear probe", "order", epoch))
        for batch in order[: 16 * per_epoch].split(16):
            loss = cross_entropy(probe(rows[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe


def test_all_rates_at_once_equal_one_after_another() -> None:
    rows, labels = clusters(70, seed=1)
    probes = fit_probes(rows, labels, 3, SHORT)
    for index, rate in enumerate(SHORT.rates):
        expected = one_after_another(rows, labels, rate)
        torch.testing.assert_close(probes.weight[:, index].T, expected.weight.data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(probes.bias[index], expected.bias.data, atol=1e-5, rtol=1e-4)
        right = expected(rows).argmax(dim=1) == labels
        assert torch.equal(probes.correct(rows, labels)[:, index], right)


def test_a_probe_that_diverges_gets_nothing_right_and_leaves_the_others_alone() -> None:
    rows, labels = clusters(70, seed=1)
    settings = ProbeSettings((0.3, 1e38), 3, 0, 16, seed=5)
    correct = fit_probes(rows, labels, 3, settings).correct(rows, labels)
    assert correct[:, 1].sum() == 0 and correct[:, 0].float().mean() > 0.6


def test_the_choice_is_made_without_the_test_images() -> None:
    train, test = labelled(300, 1, noise=0.5), labelled(100, 2, noise=0.5)
    found = linear_probe(train, test, SHORT)
    assert [point.setting for point in found.grid] == [
        Setting(*features, rate) for features in feature_sets(4) for rate in SHORT.rates
    ]
    best = max(point.validation for point in found.grid)
    assert found.chosen == next(point for point in found.grid if point.validation == best)
    assert found.oracle.test == max(point.test for point in found.grid)
    assert found.chosen.test == pytest.approx(100 * found.correct.double().mean().item()) and best > 80
    wrong = linear_probe(train, LastBlocks(test.cls, test.patch_mean, (test.labels + 1) % 3), SHORT)
    assert wrong.chosen.setting == found.chosen.setting and wrong.chosen.test < 50
    assert [point.validation for point in wrong.grid] == [point.validation for point in found.grid]


def test_held_out_images_are_a_share_of_each_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 2 + [3])
    held = held_out_rows(labels, 0.2, seed=0)
    assert [int(held[labels == label].sum()) for label in range(4)] == [8, 2, 1, 0]
    assert torch.equal(held, held_out_rows(labels, 0.2, seed=0))
    assert not torch.equal(held, held_out_rows(labels, 0.2, seed=1))
    for few in ([0, 0, 0], [0, 1]):
        with pytest.raises(InputError, match="two or more classes, with several images in each"):
            held_out_rows(torch.tensor(few), 0.2, seed=0)


def test_features_are_the_models_own() -> None:
    backbone = VisionTransformer(small_model(depth=5, num_register_tokens=2), "math")
    init_weights(backbone, 0)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = last_blocks(backbone, [(images[:3], torch.tensor([0, 1, 2])), (images[3:], torch.tensor([1, 0]))])
    output = backbone([images])[0]
    torch.testing.assert_close(
        seen.features(1, True), torch.cat([output.cls, output.patches.mean(1)], 1).detach()
    )
    assert seen.labels.tolist() == [0, 1, 2, 1, 0]
    four = seen.features(4, False)
    expected = [found.cls for found in backbone.intermediate_features(images, [1, 2, 3, 4])]
    torch.testing.assert_close(four, torch.cat(expected, dim=1).detach())
    with pytest.raises(InputError, match="check --train and --test"):
        last_blocks(backbone, [])
