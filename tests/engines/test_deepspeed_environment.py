"""What DeepSpeed reads when it is imported."""

import os

import pytest
import torch

from pretrain.engines.deepspeed_environment import prepare_environment


def test_the_accelerator_is_that_of_the_run_and_the_launchers_rank_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    prepare_environment(torch.device("cpu"))
    assert (os.environ["DS_ACCELERATOR"], os.environ["LOCAL_RANK"]) == ("cpu", "3")
    monkeypatch.delenv("LOCAL_RANK")
    prepare_environment(torch.device("cpu"))
    assert os.environ["LOCAL_RANK"] == "0"
