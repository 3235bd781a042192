"""The memory of a probe does not grow with the images, measured by the operating system."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
from functools import partial
from pathlib import Path
import numpy as np
from pretrain.analysis.taps import Place
from pretrain.config.schema import ModelConfig
from pretrain.probing import experiment, store
from pretrain.probing.experiment import Method, Part, Spec, Task
from pretrain.probing.solvers import Solver

kind, folder, width = sys.argv[1], Path(sys.argv[2]), 64
place, generator = Place(0, "RC2"), np.random.default_rng(0)

def part(name, images):
    path = folder / f"{name}{images}"
    path.mkdir()
    labels = generator.integers(3, size=images)
    labels.tofile(path / store.LABELS)
    with (path / f"{place}.f32").open("wb") as file:
        for block in np.split(labels, range(20_000, images, 20_000)):
            rows = generator.random((len(block), 2 * width), np.float32)
            rows[:, :3] += np.eye(3, dtype=np.float32)[block]
            file.write(rows.tobytes())
    return Part(store.FeatureSet(path, store.Contents("", images, 4)), None)

def peak(images):
    test = part("test", 200)
    task = Task("train", "transfer", part("train", images), part("val", 300), {"test": test})
    solver = Solver("torch" if kind == "knn" else kind, max_iterations=2, budget=20 * 2**20, folder=folder)
    method = Method(kind, [1.0], solver, 0)
    (row,) = experiment.run(task, [Spec(place, "cls", "none")], ModelConfig(), method)
    assert row.test["test"].accuracy > 60
    for path in (folder / f"train{images}", folder / "test200", folder / "val300"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

print(peak(80_000), peak(320_000))
"""


@pytest.mark.parametrize("kind", ["torch", "ridge", "knn"])
def test_four_times_the_images_take_the_same_memory(kind: str, tmp_path: Path) -> None:
    """In memory the further rows would take 61 MB in fp32, twice that in fp64."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    few, many = map(float, done.stdout.split())
    assert many - few < 20, f"{few:.0f} MiB for 80,000 images, {many:.0f} MiB for 320,000"
