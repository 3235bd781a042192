"""Every shipped config loads, explains itself and survives a round trip; every setting is used."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from pretrain.config.derived import vit_shape
from pretrain.config.docs import configuration_page
from pretrain.config.keys import settings
from pretrain.config.load import config_text, load_config
from pretrain.config.schema import Config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
COMMAND = "python -m pretrain "
READERS = {path for path in (ROOT / "pretrain").rglob("*.py") if path.parent.name != "config"}


def header(path: Path) -> list[str]:
    """The comment lines at the top of a file."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.lstrip("# ") for line in lines[:end]]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    cfg = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config_text(cfg))
    assert load_config(copy) == cfg
    assert cfg.run.dir == f"runs/{path.stem}"  # two recipes never share a folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_gives_commands_data_and_cost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = header(path)
    commands = [shlex.split(line.removeprefix(COMMAND)) for line in lines if line.startswith(COMMAND)]
    assert commands
    for name, *overrides in commands:
        assert ROOT / name == path
        load_config(name, [text for text in overrides if text != "--print-config"])
    assert any(line.startswith("Data: ") for line in lines) and any(
        line.startswith("Cost: ") for line in lines
    )


def test_rmlp_phases_start_from_what_the_first_phases_export() -> None:
    for second, first in {"vitl_rmlp": "vitl_mlp", "vitg_rmlp": "vitg_mlp", "demo_rmlp": "demo"}.items():
        before, after = (load_config(ROOT / "configs" / f"{name}.yaml") for name in (first, second))
        export = f"{before.run.dir}/exports/teacher_step_{before.run.steps:08d}.safetensors"
        assert after.model.init_from == export
        shape = (
            "arch",
            "embed_dim",
            "depth",
            "num_heads",
            "patch_size",
            "img_size",
            "ffn_layer",
            "ffn_ratio",
        )
        assert all(getattr(before.model, name) == getattr(after.model, name) for name in shape)


def test_the_published_fine_tuning_has_the_published_number_of_outputs() -> None:
    cfg = load_config(ROOT / "configs/rmlp_finetune_vits.yaml")
    assert cfg.rmlp.outputs == (2 * vit_shape(cfg.model).embed_dim // 3) ** 2


def test_every_setting_is_read() -> None:
    """By attribute name: a setting that no code outside pretrain/config asks for does nothing."""
    derived = ROOT / "pretrain/config/derived.py"
    trees = [ast.parse(path.read_text()) for path in {*READERS, derived}]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [key for key in settings(Config()) if key.rpartition(".")[2] not in read] == []


def test_every_setting_is_explained() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.*) \|$", configuration_page(), re.MULTILINE)
    assert [key for key, meaning in rows if not meaning.strip()] == []
    assert {key for key, _ in rows} == set(settings(Config()))
