import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.export import read_export, write_export

MODEL = ModelConfig(arch="custom", embed_dim=8, depth=1, num_heads=2, layer_scale=None, attention="math")
STATE = {"w": torch.randn(3, 4), "b": torch.tensor(2.5)}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def described(path: Path, **changes: object) -> Path:
    """A safetensors file with our description, changed."""
    description = {"format": "pretrain-export-1", "model": {"arch": "vit_small"}, "about": {}, **changes}
    save_file(STATE, path, metadata={"pretrain": json.dumps(description)})
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_export(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_weights_model_and_origin_come_back(tmp_path: Path) -> None:
    state = {
        **STATE,
        "bf16": torch.randn(3).bfloat16(),
        "steps": torch.tensor([2**60]),
        "nan": torch.tensor([float("nan"), -0.0]),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "empty": torch.empty(0, 3),
    }
    about = {"step": 10, "branch": "teacher", "run": {"seed": 0}}
    path = write_export(tmp_path / "exports" / "teacher.safetensors", state, MODEL, about)
    export = read_export(path)
    assert list(export.state) == sorted(state)
    for name, tensor in state.items():
        assert export.state[name].dtype == tensor.dtype
        assert bits(export.state[name]) == bits(tensor)
    assert (export.model, export.about) == (MODEL, about)


def test_the_file_alone_suffices_and_the_sidecar_says_the_same(tmp_path: Path) -> None:
    path = write_export(tmp_path / "a.safetensors", STATE, MODEL, {"step": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors"]
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["format"] == "pretrain-export-1" and sidecar["about"] == {"step": 1}
    assert sidecar["model"]["embed_dim"] == 8
    assert sidecar.pop("bytes") == path.stat().st_size
    assert json.loads(metadata_of(path)["pretrain"]) == sidecar
    (tmp_path / "a.json").unlink()
    assert read_export(path).model == MODEL


def test_views_and_shared_memory_are_stored_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {
        "head": base[:5],
        "overlap": base[2:],
        "same": base,
        "again": base,
        "transposed": base.view(3, 4).t(),
        "expanded": torch.ones(1, 3).expand(4, 3),
    }
    export = read_export(write_export(tmp_path / "a.safetensors", state, MODEL, {}))
    assert all(torch.equal(export.state[name], tensor) for name, tensor in state.items())
    assert torch.equal(base, torch.arange(12.0))


def test_init_from_is_not_passed_on(tmp_path: Path) -> None:
    model = replace(MODEL, init_from="/home/someone/weights.safetensors")
    path = write_export(tmp_path / "a.safetensors", STATE, model, {})
    assert read_export(path).model == MODEL
    assert b"someone" not in path.read_bytes()


def test_an_older_export_gets_defaults_for_keys_it_lacks(tmp_path: Path) -> None:
    assert read_export(described(tmp_path / "a.safetensors")).model == ModelConfig(arch="vit_small")


def test_writing_again_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    (tmp_path / "a.safetensors.tmp").write_text("left by a kill")
    for step in (1, 2):
        write_export(path, STATE, MODEL, {"step": step})
    assert read_export(path).about == {"step": 2}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_write_that_fails_keeps_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_export(tmp_path / "a.safetensors", STATE, MODEL, {"step": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            InputError, match=r"a\.safetensors: the export cannot be written \(.*No space left"
        ):
            write_export(path, STATE, MODEL, {"step": 2})
    assert read_export(path).about == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the export cannot be written"):
        write_export(tmp_path / "file" / "a.safetensors", STATE, MODEL, {})
    with pytest.raises(InputError, match=r"a\.bin: an export is named \*\.safetensors or \*\.pth"):
        write_export(tmp_path / "a.bin", STATE, MODEL, {})


def test_files_that_are_no_export_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert refused(path).startswith("no such file")
    assert refused(tmp_path).startswith("no such file")
    path.write_text("<!DOCTYPE html><html>404</html>")
    assert refused(path).startswith("a web page, not weights")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert refused(path).startswith("a Git LFS pointer")
    path.write_bytes(b"")
    assert refused(path).startswith("not a complete safetensors file")
    torch.save(STATE, path)
    assert refused(path).startswith("not a complete safetensors file")


@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
def test_a_truncated_export_is_refused(tmp_path: Path, share: float) -> None:
    path = write_export(tmp_path / "a.safetensors", STATE, MODEL, {})
    contents = path.read_bytes()
    path.write_bytes(contents[: int(len(contents) * share)])
    assert refused(path).startswith("not a complete safetensors file")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "a.safetensors"
    save_file(STATE, path, metadata=metadata)
    assert "without a description of its model" in refused(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "pretrain-export-2"}, "has the format 'pretrain-export-2'"),
        ({"model": {"arch": "vit_small", "rope": True}}, "rope"),
        ({"model": {"arch": "vit_huge"}}, "vit_huge"),
        ({"model": {"patch_size": "wide"}}, "wide"),
        ({"model": None}, "model section"),
        ({"model": [1]}, "model section"),
    ],
)
def test_a_description_of_another_version_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    assert words in refused(described(tmp_path / "a.safetensors", **changes))


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_a_damaged_description_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(STATE, path, metadata={"pretrain": text})
    assert "description of its model is damaged" in refused(path)
