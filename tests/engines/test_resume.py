"""A run that one engine saved is continued by another, on another number of devices.

Every cell is compared with the uninterrupted run of one process: the first half by the engine of the row, the
second by that of the column. Ranks are real processes that run the command line's `main`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.layout_runs import LAYOUTS, STEPS, ZERO3, train, write_config
from tests.rank_processes import ROOT


def metrics(run: Path) -> list[dict[str, float]]:
    """Losses and gradient norms by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k.startswith(("step", "loss/", "grad_norm/"))} for line in lines
    ]


@pytest.fixture(scope="module", params=LAYOUTS)
def continued(
    request: pytest.FixtureRequest,
    shards: Path,
    whole: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, dict[str, Path]]:
    """A layout, and the second halves that it trained, by the layout of the first half."""
    folder, paths = tmp_path_factory.mktemp(request.param), []
    for first, run in whole.items():
        middle = run / "checkpoints" / f"step_{STEPS // 2:08d}"
        settings = f"checkpoint.resume_from={middle}"
        paths.append(write_config(shards, folder / first, request.param, settings))
    train(paths, folder, request.param)
    return request.param, {first: folder / first for first in whole}


@pytest.mark.dist
@pytest.mark.parametrize("first", LAYOUTS)
def test_resume(whole: dict[str, Path], continued: tuple[str, dict[str, Path]], first: str) -> None:
    second, runs = continued
    found, expected = metrics(runs[first]), metrics(whole["single"])[STEPS // 2 :]
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [4, 5, 6]
    for line, reference in zip(found, expected, strict=True):
        assert line == pytest.approx(reference, rel=1e-4)
    if first == second:  # one order of sums: bit for bit
        assert found == metrics(whole[first])[STEPS // 2 :]


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_curve(whole: dict[str, Path], layout: str) -> None:
    for line, reference in zip(metrics(whole[layout]), metrics(whole["single"]), strict=True):
        assert line == pytest.approx(reference, rel=1e-4)


@pytest.mark.dist
@pytest.mark.drill
def test_deepspeed_on_as_many_ranks_and_on_one(
    shards: Path, whole: dict[str, Path], zero3: Path, tmp_path: Path
) -> None:
    middle = tmp_path / f"step_{STEPS // 2:08d}"
    shutil.copytree(zero3 / "checkpoints" / middle.name, middle)  # the conversion writes into it
    settings = (*ZERO3, f"checkpoint.resume_from={middle}")
    train([write_config(shards, tmp_path / "again", "ddp2", *settings)], tmp_path, "ddp2")
    assert metrics(tmp_path / "again") == metrics(zero3)[STEPS // 2 :]

    subprocess.run([sys.executable, "tools/universal.py", str(middle)], cwd=ROOT, check=True)
    train([write_config(shards, tmp_path / "one", "single", *settings)], tmp_path, "single")
    for line, reference in zip(
        metrics(tmp_path / "one"), metrics(whole["single"])[STEPS // 2 :], strict=True
    ):
        assert line == pytest.approx(reference, rel=1e-4)
