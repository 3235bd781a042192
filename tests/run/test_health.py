# ruff: noqa: E501  (rows of recorded numbers)
"""Warnings on recorded runs: collapse is named within 50 steps, healthy runs and slow starts stay silent."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields

import pytest

from pretrain.config.schema import Config
from pretrain.run.health import LASTING, MIN_IMAGES, RECOVERED, RULES, CollapseWatch

# Runs of configs/demo.yaml (rm: configs/demo_rmlp.yaml), logged every 10 steps; docs/signals.md names them.
STEPS = [0, 10, 20, 30, 40, 50, 60, 80, 100, 120, 140, 160, 180, 200, 250, 300]
NAMES = ("prototypes_used", "target_information", "patch_target_information", "teacher_cosine")
HEALTHY = {
    "h0": """
        117 275 442 452 465 484 497 508 511 512 512 512 512 512 512 512
        0.406 0.179 0.101 0.0973 0.0593 0.0459 0.0255 0.018 0.0116 0.00878 0.0071 0.00718 0.00665 0.00572 0.00655 0.00612
        1.31 1.21 1.14 0.914 0.766 0.55 0.422 0.265 0.162 0.126 0.108 0.0895 0.0872 0.089 0.0731 0.0772
        0.78451 0.8152 0.68715 0.51285 0.40849 0.31042 0.30936 0.22348 0.20146 0.16254 0.12445 0.10184 0.08708 0.07619 0.06177 0.06851
    """,
    "sk": """
        512 512 512 512 512 512 512 512 512 512 512 512 512 512 512 512
        0.338 0.394 0.474 0.349 0.251 0.201 0.154 0.093 0.0561 0.0401 0.0347 0.0312 0.0263 0.0239 0.0215 0.0217
        0.96 0.869 0.71 0.5 0.389 0.303 0.231 0.145 0.0964 0.0758 0.0608 0.046 0.0384 0.0404 0.0366 0.0307
        0.78451 0.61562 0.27335 0.17313 0.15169 0.11467 0.13765 0.12347 0.12244 0.0693 0.05014 0.04917 0.04022 0.05776 0.04531 0.04289
    """,
    "ls": """
        32.4 257 489 494 482 490 499 509 511 512 512 512 512 512 512 512
        2.68e-7 9.84e-7 1.71e-5 0.000237 0.000833 0.00131 0.00125 0.00139 0.00133 0.00124 0.00129 0.00135 0.00134 0.00141 0.00134 0.0013
        1.31 1.21 1.06 0.761 0.605 0.448 0.384 0.298 0.233 0.244 0.227 0.212 0.204 0.162 0.164 0.17
        1 1 0.99991 0.99352 0.90779 0.73816 0.63482 0.35992 0.20882 0.10002 0.07239 0.04653 0.04024 0.0421 0.02944 0.04142
    """,
    "lsv": """
        32.4
        2.68e-7
        1.31
        1
    """,
    "rm": """
        35.5 39.6 37.8 39.9 33.6 44.3 34.2
        3.47 3.58 3.52 3.57 3.41 3.64 3.39
        2.61 2.9 2.62 2.98 2.97 2.91 3.09
        0.05436 0.05422 0.05172 0.06681 0.07024 0.0738 0.13444
    """,
}
COLLAPSED = {
    "c0": """
        117 5.26 1 1 1 1 1 1 1 1 1 1 1 1 1 1
        0.406 0.114 0.000107 1.22e-6 1.09e-7 0 0 0 0 0 0 0 2.09e-7 1.97e-7 0 0
        1.31 1.21 1.19 0.932 0.797 0.672 0.654 0.611 0.58 0.548 0.568 0.526 0.545 0.542 0.522 0.473
        0.78451 0.8997 0.95946 0.96866 0.98643 0.98943 0.99314 0.99099 0.99543 0.99712 0.99712 0.99711 0.99819 0.99893 0.99878 0.99881
    """,
    "c2": """
        127 2.4 1 1 1 1 1 1 1
        0.332 0.0416 1.67e-5 6.53e-7 3.17e-7 4.17e-7 5.6e-7 3.67e-6 6.8e-6
        1.31 1.24 1.21 1.19 1.11 1.01 1.01 0.883 0.792
        0.85281 0.91262 0.97187 0.97303 0.97655 0.98545 0.98828 0.98746 0.98635
    """,
    "cls": """
        32.4 1.39 1 1 1 1 1 1 1 1 1
        2.68e-7 0 0 0 0 0 2.5e-7 0 2.22e-7 2.44e-7 2.23e-7
        1.31 1.23 1.03 0.821 0.753 0.871 0.988 0.911 0.879 0.827 0.899
        1 1 0.99999 0.99992 0.99972 0.99923 0.99883 0.99579 0.99541 0.99438 0.99436
    """,
    "k0": """
        117 278 447 460 468 484 497 508 511 512 512 512 512 512 512 512
        0.406 0.115 0.0406 0.0203 0.00993 0.00459 0.00257 0.00122 0.000442 0.000305 0.000224 0.000164 0.00017 0.000141 0.000157 0.000141
        1.31 1.21 1.15 0.974 0.856 0.633 0.5 0.365 0.266 0.233 0.213 0.171 0.179 0.194 0.174 0.156
        0.78451 0.89731 0.96353 0.9819 0.98579 0.9896 0.99182 0.99227 0.99522 0.99655 0.99695 0.99772 0.99786 0.99828 0.99795 0.99816
    """,
    "u0": """
        510 512 512 512 512 512 512 512 512 512 512 512 512 512 512 512
        0.000845 0.000212 9.55e-6 0 4.59e-7 0 0 4.6e-7 0 0 4.6e-7 4.6e-7 9.37e-7 4.6e-7 9.37e-7 4.6e-7
        0.00373 0.00353 0.0029 0.00167 0.000887 0.000561 0.00035 0.000254 0.000194 0.000141 7.2e-5 7.96e-5 8.72e-5 6.2e-5 0.000101 6.39e-5
        0.78451 0.88698 0.97605 0.99129 0.99533 0.99653 0.99795 0.99798 0.99855 0.99893 0.99897 0.99909 0.99903 0.99917 0.9991 0.99907
    """,
}
WARMUP = {"rm": 0}
FINE = {
    "prototypes_used": 400.0,
    "target_information": 0.1,
    "patch_target_information": 0.3,
    "teacher_cosine": 0.2,
}


def logged(**changes: float) -> dict[str, float]:
    """The values of a log line of a healthy run, with changes."""
    return {f"signal/{name}": value for name, value in (FINE | changes).items()} | {"loss/total": 7.0}


def recorded(table: str) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, logged values) of a recorded run."""
    rows = [[float(word) for word in line.split()] for line in table.split("\n") if line.strip()]
    for step, *values in zip(STEPS, *rows, strict=False):
        yield step, logged(**dict(zip(NAMES, values, strict=True)))


def warnings(watch: CollapseWatch, steps: Iterator[tuple[int, dict[str, float]]]) -> list[tuple[int, str]]:
    return [(step, line) for step, values in steps for line in watch.check(step, values)]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_gives_no_warning(name: str) -> None:
    assert warnings(CollapseWatch(WARMUP.get(name, 30), 128), recorded(HEALTHY[name])) == []


@pytest.mark.parametrize("name", ["c0", "c2", "cls"])
def test_a_run_without_centring_is_called_collapsed_within_50_steps(name: str) -> None:
    first, *more = warnings(CollapseWatch(30, 128), recorded(COLLAPSED[name]))
    assert first[0] <= 50 and "on one prototype: 1.00 prototypes in use" in first[1]
    assert "loss.center_momentum" in first[1] and "\n" not in first[1]
    assert not any("one prototype" in line for _, line in more)


def test_equal_features_and_uniform_targets_are_told_apart() -> None:
    lines = [line for _, line in warnings(CollapseWatch(30, 128), recorded(COLLAPSED["k0"]))]
    assert len(lines) == 1 and "in one direction: mean cosine 0.99" in lines[0]
    lines = [line for _, line in warnings(CollapseWatch(30, 128), recorded(COLLAPSED["u0"]))]
    assert len(lines) == 2 and any("uniform target" in line for line in lines)


def test_uniform_class_targets_alone_are_no_warning() -> None:
    """The healthy runs above come close: their class tokens learn from KoLeo, their patches from iBOT."""
    silent = logged(target_information=0.0, patch_target_information=0.03)
    assert warnings(CollapseWatch(30, 128), ((step, silent) for step in range(0, 400, 10))) == []


def test_the_start_of_a_slow_run_is_no_collapse() -> None:
    """With LayerScale 1e-5 the tokens part from 1e-9 on; a low learning rate only takes longer."""
    watch = CollapseWatch(0, 128)
    parting = ((step, logged(teacher_cosine=1 - 1e-9 * 1.06**step)) for step in range(0, 300, 5))
    assert warnings(watch, parting) == []
    still = ((step, logged(teacher_cosine=1 - 1e-9)) for step in range(0, 300, 5))
    assert len(warnings(CollapseWatch(0, 128), still)) == 1


def test_a_longer_warm_up_gives_more_time() -> None:
    equal = [(step, logged(teacher_cosine=0.999)) for step in range(0, 5000, 50)]
    (short, _), *_ = warnings(CollapseWatch(0, 128), iter(equal))
    (long, _), *_ = warnings(CollapseWatch(1000, 128), iter(equal))
    assert short <= 150 and 2000 < long <= 3100


def test_a_warning_comes_once_until_its_cause_has_gone() -> None:
    watch = CollapseWatch(0, 128)
    bad, good = logged(prototypes_used=1.0), logged()
    spell = [bad] * 10 + [good] * (RECOVERED - 1) + [bad] * 10 + [good] * RECOVERED + [bad] * 10
    found = [step for step, _ in warnings(watch, ((10 * i, values) for i, values in enumerate(spell)))]
    assert found == [LASTING, 10 * (20 + 2 * RECOVERED - 1) + LASTING]


@pytest.mark.parametrize("every", [1, 10, 50])
def test_a_moment_on_one_prototype_is_no_collapse(every: int) -> None:
    """A fresh centre needs some steps to move away from the strongest prototype."""
    watch = CollapseWatch(0, 128)
    start = ((step, logged(prototypes_used=1.0 if step < LASTING else 30.0)) for step in range(0, 200, every))
    assert warnings(watch, start) == []


def test_numbers_that_are_not_finite_are_named_at_once() -> None:
    watch = CollapseWatch(1000, 1)
    values = logged(teacher_cosine=math.nan) | {"loss/total": math.inf, "schedule/lr": 1e-3}
    (line,) = watch.check(1, values)
    assert line.startswith("signal/teacher_cosine, loss/total not finite.") and "optim.lr" in line
    assert watch.check(2, values) == []
    many = {f"loss/{i}": math.nan for i in range(9)}
    assert "loss/3 and 5 more not finite" in CollapseWatch(0, 8).check(1, many)[0]


def test_numbers_that_are_not_finite_hide_no_collapse_and_make_none() -> None:
    nan = dict.fromkeys(logged(), math.nan)
    lines = warnings(CollapseWatch(0, 128), ((step, nan) for step in range(0, 400, 10)))
    assert len(lines) == 1 and "not finite" in lines[0][1]


def test_few_images_may_share_a_prototype() -> None:
    bad = [(step, logged(prototypes_used=1.0, teacher_cosine=1.0)) for step in range(0, 300, 10)]
    assert warnings(CollapseWatch(0, MIN_IMAGES - 1), iter(bad)) == []
    assert len(warnings(CollapseWatch(0, MIN_IMAGES), iter(bad))) == 2


def test_without_signals_only_the_loss_is_watched() -> None:
    assert warnings(CollapseWatch(0, 128), ((step, {"loss/total": 6.2}) for step in range(0, 300, 10))) == []


def test_the_advice_names_settings_that_exist() -> None:
    sections = {field.name: {key.name for key in fields(field.type)} for field in fields(Config)}
    named = {pair for rule in RULES for pair in re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", rule.advice)}
    assert len(named) >= 8
    assert {pair for pair in named if pair[1] not in sections.get(pair[0], set())} == set()
