"""Warnings on recorded runs: collapse is named within 50 steps, healthy runs and slow starts stay silent."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields

import pytest

from pretrain.config.schema import Config
from pretrain.run.health import LASTING, MIN_IMAGES, RECOVERED, RULES, CollapseWatch

# Runs of configs/demo.yaml (rm: configs/demo_rmlp.yaml), logged every 10 steps; docs/signals.md names them.
STEPS = [0, 10, 20, 30, 40, 50, 60, 90, 120, 150, 200, 250, 300]
NAMES = (
    "prototypes_used",
    "target_information",
    "patch_target_information",
    "teacher_cosine",
    "student_cosine",
)
HEALTHY = {
    "h0": """
        117 275 442 452 465 484 497 510 512 512 512 512 512
        0.41 0.18 0.1 0.097 0.059 0.046 0.026 0.014 0.0088 0.0083 0.0057 0.0066 0.0061
        1.3 1.2 1.1 0.91 0.77 0.55 0.42 0.2 0.13 0.1 0.089 0.073 0.077
        0.7845 0.8152 0.6871 0.5128 0.4085 0.3104 0.3094 0.2156 0.1625 0.1081 0.0762 0.0618 0.0685
        0.7715 0.5402 0.2932 0.1314 0.0893 0.0338 0.0413 0.0491 0.0275 0.0201 0.0066 0.0022 0.0049
    """,
    "sk": """
        512 512 512 512 512 512 512 512 512 512 512 512 512
        0.34 0.39 0.47 0.35 0.25 0.2 0.15 0.072 0.04 0.03 0.024 0.022 0.022
        0.96 0.87 0.71 0.5 0.39 0.3 0.23 0.12 0.076 0.054 0.04 0.037 0.031
        0.7845 0.6156 0.2733 0.1731 0.1517 0.1147 0.1377 0.1109 0.0693 0.0648 0.0578 0.0453 0.0429
        0.7715 0.1161 0.0527 0.0614 0.0354 0.0399 0.0246 0.0262 0.0506 0.0183 0.0049 -0.0002 0.0033
    """,
    "ls": """
        32.4 257 489 494 482 490 499 511 512 512 512 512 512
        2.7e-7 9.8e-7 1.7e-5 0.00024 0.00083 0.0013 0.0012 0.0013 0.0012 0.0013 0.0014 0.0013 0.0013
        1.3 1.2 1.1 0.76 0.6 0.45 0.38 0.25 0.24 0.28 0.16 0.16 0.17
        1 1 0.9999 0.9935 0.9078 0.7382 0.6348 0.2636 0.1 0.0664 0.0421 0.0294 0.0414
        1 0.9983 0.2026 0.0616 0.1008 0.0484 0.0386 0.0434 0.0278 0.0162 0.0084 0.0044 0.002
    """,
    "lsslow": """
        32.4 337 495 487 463 466 487 509 511 512 512
        2.7e-7 4.9e-7 0 3.4e-6 2.1e-5 4.7e-5 6.7e-5 0.0002 0.00044 0.00059 0.00084
        1.3 1.2 1.1 0.97 0.89 0.72 0.59 0.36 0.26 0.26 0.24
        1 1 1 1 0.9999 0.9994 0.9977 0.9478 0.7876 0.7602 0.7302
        1 1 0.9999 0.9733 0.2411 0.1333 0.0509 0.0435 0.0438 0.0423 0.0189
    """,
    "rm": """
        35.5 39.6 37.8 39.9 33.6 44.3 34.2
        3.5 3.6 3.5 3.6 3.4 3.6 3.4
        2.6 2.9 2.6 3 3 2.9 3.1
        0.0544 0.0542 0.0517 0.0668 0.0702 0.0738 0.1344
        0.0224 0.0586 0.2314 0.5283 0.7158 0.7838 0.8339
    """,
}
COLLAPSED = {
    "c0": """
        117 5.26 1 1 1 1 1 1 1 1 1 1 1
        0.41 0.11 0.00011 1.2e-6 1.1e-7 0 0 0 0 0 2e-7 0 0
        1.3 1.2 1.2 0.93 0.8 0.67 0.65 0.58 0.55 0.53 0.54 0.52 0.47
        0.7845 0.8997 0.9595 0.9687 0.9864 0.9894 0.9931 0.9949 0.9971 0.997 0.9989 0.9988 0.9988
        0.7715 0.9803 0.9485 0.999 0.9993 0.9992 0.9986 0.9983 0.9982 0.995 0.9959 0.9931 0.9921
    """,
    "c2": """
        127 2.4 1 1 1 1 1 1
        0.33 0.042 1.7e-5 6.5e-7 3.2e-7 4.2e-7 5.6e-7 2.9e-6
        1.3 1.2 1.2 1.2 1.1 1 1 0.85
        0.8528 0.9126 0.9719 0.973 0.9766 0.9854 0.9883 0.9879
        0.8379 0.9763 0.9666 0.995 0.9972 0.9962 0.9976 0.9926
    """,
    "cls": """
        32.4 1.39 1 1 1 1 1 1 1 1
        2.7e-7 0 0 0 0 0 2.5e-7 0 2.4e-7 1.3e-7
        1.3 1.2 1 0.82 0.75 0.87 0.99 0.87 0.83 0.87
        1 1 1 0.9999 0.9997 0.9992 0.9988 0.9964 0.9944 0.994
        1 0.9999 0.9742 0.9882 0.9908 0.9335 0.9629 0.9888 0.9677 0.9706
    """,
    "k0": """
        117 278 447 460 468 484 497 510 512 512 512 512 512
        0.41 0.11 0.041 0.02 0.0099 0.0046 0.0026 0.00074 0.0003 0.00022 0.00014 0.00016 0.00014
        1.3 1.2 1.1 0.97 0.86 0.63 0.5 0.3 0.23 0.21 0.19 0.17 0.16
        0.7845 0.8973 0.9635 0.9819 0.9858 0.9896 0.9918 0.9945 0.9966 0.9972 0.9983 0.998 0.9982
        0.7715 0.976 0.992 0.9969 0.9977 0.9973 0.9976 0.9986 0.9991 0.998 0.9984 0.9985 0.9986
    """,
    "u0": """
        510 512 512 512 512 512 512 512 512 512 512 512 512
        0.00084 0.00021 9.6e-6 0 4.6e-7 0 0 0 0 4.6e-7 4.6e-7 9.4e-7 4.6e-7
        0.0037 0.0035 0.0029 0.0017 0.00089 0.00056 0.00035 0.00022 0.00014 9.1e-5 6.2e-5 0.0001 6.4e-5
        0.7845 0.887 0.976 0.9913 0.9953 0.9965 0.9979 0.9988 0.9989 0.9989 0.9992 0.9991 0.9991
        0.7715 0.9907 0.998 0.9992 0.9992 0.9992 0.9993 0.9993 0.9993 0.9992 0.9993 0.9992 0.9993
    """,
}
WARMUP = {"rm": 0}
FINE = dict(zip(NAMES, (400.0, 0.1, 0.3, 0.2, 0.1), strict=True))


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


def test_a_method_without_patch_targets_is_judged_by_its_class_tokens() -> None:
    blind = {k: v for k, v in logged(target_information=0.0).items() if "patch" not in k}
    lines = [
        line for _, line in warnings(CollapseWatch(30, 128), ((step, blind) for step in range(0, 400, 10)))
    ]
    assert len(lines) == 1 and "uniform target" in lines[0]


def test_a_teacher_that_lags_behind_is_no_collapse() -> None:
    """With LayerScale 1e-5 all tokens are alike at first; the student's part long before the teacher's."""
    lagging = logged(teacher_cosine=0.9999, student_cosine=0.5)
    assert warnings(CollapseWatch(0, 128), ((step, lagging) for step in range(0, 300, 5))) == []
    alike = logged(teacher_cosine=0.9999, student_cosine=0.999)
    assert len(warnings(CollapseWatch(0, 128), ((step, alike) for step in range(0, 300, 5)))) == 1


def test_a_longer_warm_up_gives_more_time() -> None:
    equal = [(step, logged(teacher_cosine=0.999, student_cosine=0.999)) for step in range(0, 5000, 50)]
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


def test_values_that_are_not_finite_are_no_collapse() -> None:
    nan = dict.fromkeys(logged(), math.nan)
    lines = warnings(CollapseWatch(0, 128), ((step, nan) for step in range(0, 400, 10)))
    assert len(lines) == 1 and "not finite" in lines[0][1]


def test_few_images_may_share_a_prototype() -> None:
    bad = [
        (step, logged(prototypes_used=1.0, teacher_cosine=1.0, student_cosine=1.0))
        for step in range(0, 300, 10)
    ]
    assert warnings(CollapseWatch(0, MIN_IMAGES - 1), iter(bad)) == []
    assert len(warnings(CollapseWatch(0, MIN_IMAGES), iter(bad))) == 2


def test_without_signals_only_the_loss_is_watched() -> None:
    assert warnings(CollapseWatch(0, 128), ((step, {"loss/total": 6.2}) for step in range(0, 300, 10))) == []


def test_the_advice_names_settings_that_exist() -> None:
    sections = {field.name: {key.name for key in fields(field.type)} for field in fields(Config)}
    named = {pair for rule in RULES for pair in re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", rule.advice)}
    assert len(named) >= 8
    assert {pair for pair in named if pair[1] not in sections.get(pair[0], set())} == set()
