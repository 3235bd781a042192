"""DeepSpeed unpickles what it is given: files that would run code never reach it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.engines.deepspeed_checkpoint import load_optimizer
from pretrain.errors import InputError

ROOT = Path(__file__).parents[2]


class Harmful:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.fixture
def checkpoint(tmp_path):
    """A step's folder of one rank whose optimizer file makes a folder where it is unpickled."""
    zero = tmp_path / "step_00000001" / "optim" / "zero"
    zero.mkdir(parents=True)
    torch.save({"module": {"weight": torch.ones(2)}}, zero / "mp_rank_00_model_states.pt")
    state = {"optimizer_state_dict": {"harm": Harmful(tmp_path / "made")}}
    torch.save(state, zero / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return zero.parent.parent


def test_a_run_does_not_continue_from_it(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"rank_0\S*states\.pt: a pickle that wants to run posix\.mkdir"):
        load_optimizer(None, checkpoint / "optim", ranks=1)
    assert not (tmp_path / "made").exists()


def test_nor_from_a_converted_one(checkpoint, tmp_path):
    converted = checkpoint / "optim" / "universal" / "zero" / "backbone.cls_token"
    converted.mkdir(parents=True)
    torch.save({"param": Harmful(tmp_path / "made")}, converted / "exp_avg.pt")
    with pytest.raises(InputError, match=r"exp_avg\.pt: a pickle that wants to run posix\.mkdir; refused"):
        load_optimizer(None, checkpoint / "optim", ranks=2)
    assert not (tmp_path / "made").exists()


def test_it_is_not_converted(checkpoint, tmp_path):
    tool = [sys.executable, "tools/universal.py", str(checkpoint)]
    done = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and "wants to run posix.mkdir; refused" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "made").exists() and not (checkpoint / "optim" / "universal").exists()
