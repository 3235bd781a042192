"""The step benchmark at toy size: both sides agree, its figures are there, few packages are needed."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.benchmarks.running import ROOT

ENOUGH = {"torch", "numpy", "omegaconf", "pyyaml"}
IMPORT_NAMES = {"opencv-python-headless": "cv2", "scikit-learn": "sklearn", "pillow": "PIL"}
TOY = "--arch tiny --batch 2 --prototypes 256 --repeats 1 --device cpu"
VARIANTS = {
    "defaults": "--steps 2",
    "others": "--head rmlp --centering softmax --ffn swiglu --patch-size 16 --drop-path 0.3",
}
REFUSE = """
import sys
from importlib.machinery import ModuleSpec


class Refuse:  # a spec is found, for torch asks which packages exist; loading it fails
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in {refused} else None

    def create_module(self, spec):
        raise ModuleNotFoundError(spec.name + " is refused by the test")

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Refuse())
"""
COUNT = """
from pretrain.method.branch import branch_output
from pretrain.method.branch import SSLBranch
from step import configuration, parse
from step_cost import Cost
from step_ours import initial_weights, random_batch
from torch.utils.flop_counter import FlopCounterMode

cfg = configuration(parse())
batch = random_batch(cfg, 0)
branches = SSLBranch(cfg, "teacher", "math").requires_grad_(False), SSLBranch(cfg, "student", "math")
with FlopCounterMode(display=False) as counter:
    for branch in branches:
        branch.load_state_dict(initial_weights(cfg))
        branch.begin_step(0)
        out = branch(batch)
        logits = [projection.logits() for projection in branch_output(out)[1:]]
    sum(part.sum() for part in logits).backward()
print(Cost(cfg, len(batch.mask_indices)).total() / counter.get_total_flops())
"""


def refused_packages() -> set[str]:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in requirements} - ENOUGH
    return {IMPORT_NAMES.get(name, name) for name in names}


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine with the few packages that the benchmark needs, started as there."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(REFUSE.replace("{refused}", repr(refused_packages())))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def python(*arguments, env, cwd=ROOT):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_bare_machine_lacks_what_is_not_needed(bare):
    assert {"webdataset", "cv2", "simplejpeg", "PIL", "sklearn", "rich", "safetensors"} <= refused_packages()
    assert "refused by the test" in python("-c", "import tensorboard", env=bare).stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_sides_agree(variant, bare):
    run = python("benchmarks/step.py", *TOY.split(), *VARIANTS[variant].split(), env=bare)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    for moment in ("losses_of_first_step", "losses_of_last_step"):
        ours, baseline = figures[moment]["ours"], figures[moment]["baseline"]
        assert {"total", "dino_global", "dino_local", "ibot", "koleo", "grad_norm_backbone"} <= set(ours)
        assert ours == pytest.approx(baseline, rel=1e-5)
    for side in ("ours", "baseline"):
        step, parts = figures["step"][side], figures["parts_median_s"][side]
        assert {"images_per_s", "share_of_ceiling_percent", "peak_memory_mib"} < set(step)
        assert step["median_s"] == pytest.approx(sum(parts.values()))  # one turn: its median is itself
    assert figures["matrix_ceiling_gflop_per_s"] > 0
    assert len(figures["speedup_of_each_turn"]) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formula_counts_what_torch_counts(variant, bare):
    run = python("-c", COUNT, *TOY.split(), *VARIANTS[variant].split(), env=bare, cwd=ROOT / "benchmarks")
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("wrong", ["--batch 1", "--patch-size 15", "--arch resnet"])
def test_wrong_input_is_one_line(wrong, bare):
    run = python("benchmarks/step.py", *wrong.split(), env=bare)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
