"""The memory of a probe does not grow with the images, measured by the operating system."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
from pretrain.analysis.taps import Place
from pretrain.config.schema import ModelConfig
from pretrain.probing import experiment, store
from pretrain.probing.experiment import Method, Part, Spec, Task
from pretrain.probing.solvers import Solver

FOLDER, WIDTH, KINDS = Path(sys.argv[1]), 64, ("torch", "ridge", "knn")
PLACE, MODEL, generator = Place(0, "RC2"), ModelConfig(), np.random.default_rng(0)

def part(name, images):
    path = FOLDER / name
    path.mkdir()
    labels = generator.integers(3, size=images)
    labels.tofile(path / store.LABELS)
    with (path / f"{PLACE}.f32").open("wb") as file:
        for block in np.split(labels, range(20_000, images, 20_000)):
            rows = generator.random((len(block), 2 * WIDTH), np.float32)
            rows[:, :3] += np.eye(3, dtype=np.float32)[block]
            file.write(rows.tobytes())
    return Part(store.FeatureSet(path, store.Contents("", images, 4)), None)

def peak(fit, kind):
    task = Task("train", "transfer", fit, val, {"test": test})
    solver = Solver("torch" if kind == "knn" else kind, max_iterations=2, budget=20 * 2**20, folder=FOLDER)
    (row,) = experiment.run(task, [Spec(PLACE, "cls", "none")], MODEL, Method(kind, [1.0], solver, 0))
    assert row.test["test"].accuracy > 60
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

val, test, few, many = part("val", 300), part("test", 200), part("few", 80_000), part("many", 320_000)
print(*(peak(fit, kind) for fit in (few, many) for kind in KINDS))
"""


def test_four_times_the_images_take_the_same_memory(tmp_path: Path) -> None:
    """By each solver; in memory the further rows would take 61 MB in fp32, twice that in fp64."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # freed memory goes back: holes between arrays are none
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | at_once,
    )
    assert done.returncode == 0, done.stderr
    peaks = [float(peak) for peak in done.stdout.split()]
    assert peaks[-1] - peaks[2] < 25, f"torch, ridge, k-NN of 80,000, then 320,000 images: {peaks} MiB"
