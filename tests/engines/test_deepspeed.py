"""DeepSpeed's ZeRO on real gloo ranks: the golden run, the single engine's numbers, the teacher, resuming."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.surgery.consolidate import read_deepspeed
from tests.engines.deepspeed_ranks import MORE
from tests.engines.deepspeed_small import BAD_STEP, plain_config, rmlp_config, run
from tests.golden_files import relative_error
from tests.test_golden import key_bias_removed

ROOT = Path(__file__).parents[2]
SECONDS = 300

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def start(mode, stage, folder, ranks):
    """What each rank of a start computed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.engines.deepspeed_ranks", mode, str(stage), str(folder)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    built = folder / "extensions"
    shared |= {"TORCH_EXTENSIONS_DIR": str(built)}
    settings = {**os.environ, **shared, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        env = {**settings, "RANK": str(rank)}
        with (folder / f"{mode}_{ranks}_{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, (folder / f"{mode}_{ranks}_0.log").read_text()[-2_000:]
    assert not built.exists()  # nothing was compiled
    return [torch.load(folder / f"{mode}_{ranks}_{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def single():
    """The same runs on the single engine."""
    plain, built = run(plain_config(), bad=BAD_STEP)
    return {
        "plain": plain,
        "uninterrupted": run(plain_config(), MORE, built=built)[0],
        "rmlp": run(rmlp_config())[0],
    }


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.drill), 3], ids=lambda stage: f"zero{stage}"
)
def trained(request, tmp_path_factory):
    """Stage, folder, and the results of both ranks: one start for all tests of a stage."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    return request.param, folder, start("train", request.param, folder, 2)


def same_numbers(actual, expected, rel):
    for mine, theirs in zip(actual["steps"], expected["steps"], strict=True):
        assert mine["good"] == theirs["good"]
        if mine["good"]:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=rel)
            assert mine["norms"] == pytest.approx(theirs["norms"], rel=10 * rel)
            assert mine["layers"] == pytest.approx(theirs["layers"], rel=10 * rel) or not theirs["layers"]


def weight_error(actual, expected):
    assert actual.keys() == expected.keys()
    pairs = [
        (key_bias_removed(k, actual[k]), key_bias_removed(k, v))
        for k, v in expected.items()
        if not k.startswith("guard.")
    ]
    return max(relative_error(*pair) for pair in pairs)


def test_golden_steps_on_two_ranks(trained):
    _, _, ranks = trained
    for results in ranks:
        assert results["golden"]["losses"] < 1e-5
        assert results["golden"]["norms"] < 1e-5
        assert results["golden"]["weights"] < 1e-4


@pytest.mark.parametrize("name", ["plain", "rmlp", "offloaded"])
def test_two_ranks_equal_the_single_engine(trained, single, name):
    _, _, ranks = trained
    expected = single["plain" if name == "offloaded" else name]
    for results in ranks:
        same_numbers(results[name], expected, rel=1e-5)
        assert weight_error(results[name]["weights"], expected["weights"]) < 1e-4
        assert results[name]["bad_steps"] == expected["bad_steps"]


def test_clipping_and_the_bad_step_were_put_to_the_test(single):
    steps, limit = single["plain"]["steps"], plain_config().optim.clip_grad_norm
    assert [step["good"] for step in steps] == [True, True, False, True]
    assert all(min(step["norms"].values()) > limit for step in steps if step["good"])


def test_the_teachers_forward_is_that_of_its_gathered_weights(trained):
    _, _, ranks = trained
    for results in ranks:
        assert results["teacher"] < 1e-5
        assert results["rmlp_teacher"] < 1e-5


def test_bf16_stays_close_to_fp32(trained):
    _, _, ranks = trained
    for results in ranks:
        assert results["bf16_outputs"] == "torch.bfloat16"
        assert all(value.dtype == torch.float32 for value in results["bf16"]["weights"].values())
        for half, full in zip(results["bf16"]["steps"][:2], results["plain"]["steps"][:2], strict=True):
            assert half["loss"] == pytest.approx(full["loss"], rel=2e-2)
            assert half["loss"] != full["loss"]


def test_resumed_by_as_many_ranks_it_goes_on_bit_for_bit(trained):
    _, _, ranks = trained
    for results in ranks:
        assert results["resumed"]["steps"] == results["uninterrupted"]["steps"]
        for key, value in results["uninterrupted"]["weights"].items():
            assert torch.equal(results["resumed"]["weights"][key], value), key


def test_its_own_folder_merges_into_the_students_weights(trained):
    _, folder, _ = trained
    model = torch.load(folder / "model.pt", weights_only=True)
    merged = read_deepspeed(folder / "optim" / "zero")
    assert {key for key in model if key.startswith("student.backbone.")} <= {
        f"student.{key}" for key in merged
    }
    assert all(torch.equal(value, model[f"student.{key}"]) for key, value in merged.items())


def test_resumed_by_one_rank_it_goes_on_after_conversion(trained, single):
    stage, folder, ranks = trained
    with pytest.raises(AssertionError, match="is of 2 ranks, this run has 1; convert it once with"):
        start("resume", stage, folder, 1)
    tool = [sys.executable, "tools/universal.py", str(folder)]
    subprocess.run(tool, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=SECONDS)
    [alone] = start("resume", stage, folder, 1)
    same_numbers(alone, ranks[0]["uninterrupted"], rel=1e-5)
    assert weight_error(alone["weights"], ranks[0]["uninterrupted"]["weights"]) < 1e-4
