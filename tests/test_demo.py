"""The judgement of tools/demo.py on what runs have logged; the runs themselves are those of other tests."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pretrain.config.load import load_config
from tests.scripts import load

demo = load("demo")


def run_of(folder: Path, scores: dict[int, tuple[float, float]]) -> Path:
    """A run's folder with k-NN scores at some steps, and lines without any between them."""
    lines: list[dict[str, float]] = []
    for step, (cls, patch_mean) in scores.items():
        lines.append({"step": step, "knn/cls": cls, "knn/patch_mean": patch_mean})
        lines.append({"step": step + 1, "loss/total": 8.5})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("first", "second", "status", "words"),
    [
        ((75.0, 60.0), (74.0, 58.0), 0, "gained 29.0 points over the best of random weights"),
        ((65.0, 90.0), (66.0, 90.0), 1, "gained 19.0 points"),  # of the class token, not of the mean patch
        ((75.0, 60.0), (71.9, 60.0), 1, "then changed by -3.1: NOT as it should be"),
        ((75.0, 60.0), (78.1, 60.0), 1, "then changed by +3.1: NOT as it should be"),
    ],
)
def test_the_last_scores_decide(tmp_path, first, second, status, words):
    runs = (
        run_of(tmp_path / "first", {0: (41.0, 46.0), 25: (99.0, 99.0), 300: first}),
        run_of(tmp_path / "second", {0: (0.0, 0.0), 60: second}),
    )
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    assert demo.verdict(*map(demo.scores, runs), console) == status
    assert words in printed.getvalue()


def test_the_recipes_say_what_the_demo_reads():
    first, second = (load_config(Path(__file__).parents[1] / config) for config in demo.PHASES)
    assert first.log.knn.every > 0  # so that the initial weights are scored
    for cfg in (first, second):
        assert list(cfg.log.knn.test) == [str(demo.DATA / "test-*.tar")]
