import sys
from pathlib import Path

import pytest
import torch

from pretrain.run import environment
from pretrain.run.environment import config_hash, describe


def test_describe_names_versions_and_machine_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-value")
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "not-installed-anywhere"))
    text = describe()
    facts = dict(line.split(": ", 1) for line in text.splitlines())
    assert list(facts) == ["code", "python", "platform", "device", "torch"]
    assert facts["python"] == sys.version.split()[0]
    assert facts["torch"] == torch.__version__
    assert "a-secret-value" not in text


def test_every_dependency_of_the_project_is_described() -> None:
    import re
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]
    required = [*project["dependencies"], *extra.get("deepspeed", []), *extra.get("xformers", [])]
    assert {re.split(r"[<>=;\[ ]", text)[0] for text in required} <= set(environment.PACKAGES)


def test_config_hash_is_short_and_stable() -> None:
    assert config_hash("run:\n  steps: 3\n") == config_hash("run:\n  steps: 3\n") != config_hash("run:\n")
    assert config_hash("") == "e3b0c44298fc1c14"
