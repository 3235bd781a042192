"""Weights made to harm: code in pickles, archives that grow, shapes that no file holds. One line each."""

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from pretrain.errors import InputError
from pretrain.export.files import MAX_ENTRIES, open_file
from pretrain.run.checkpoint import read_document
from pretrain.run.tensors import check_tensors, load_tensors, read_tensors, save_tensors
from pretrain.start import check_documents

TENSORS = {"a": torch.arange(16.0).view(4, 4), "b": torch.ones(3)}


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harm",)


@pytest.fixture(autouse=True)
def unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("harm").exists()


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        open_file(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


def saved(contents: object) -> Path:
    torch.save(contents, "x.pth")
    return Path("x.pth")


def test_dicts_that_hold_themselves() -> None:
    contents: dict[str, Any] = {"a": torch.ones(2)}
    contents["again"] = contents
    assert refused(saved(contents)) == "its dicts and lists are nested without end"


def test_lists_that_multiply() -> None:
    """30 lists in a file of 3 kilobytes, with a billion entries."""
    contents: list[Any] = [torch.ones(2)]
    for _ in range(30):
        contents = [contents, contents]
    assert refused(saved(contents)) == f"holds more than {MAX_ENTRIES:,} entries"


def test_an_archive_that_grows() -> None:
    """torch.load itself would unpack 300 MB from a file of 0.3 MB."""
    source = saved({"a": torch.ones(3)})
    with zipfile.ZipFile(source) as plain, zipfile.ZipFile("y.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in plain.infolist():
            more = bytes(300 << 20) if part.filename.endswith("data.pkl") else b""
            packed.writestr(part.filename, plain.read(part) + more)
    assert refused(Path("y.pth")).endswith("bytes when unpacked; torch.save packs nothing")


def test_code_deep_inside() -> None:
    assert "wants to run posix.system" in refused(saved({"a": torch.ones(2), "b": [{"c": (Harmful(),)}]}))


def claims(folder: str, change: Callable[[Metadata], None]) -> Path:
    """A folder of torch.distributed.checkpoint with other metadata than it was written with."""
    save_tensors(Path(folder), TENSORS)
    path = Path(folder, ".metadata")
    found = pickle.loads(path.read_bytes())
    change(found)
    path.write_bytes(pickle.dumps(found))
    return Path(folder)


def larger(found: Metadata) -> None:
    size = torch.Size([1 << 34])
    found.state_dict_metadata["a"].size = size
    found.state_dict_metadata["a"].chunks[0] = ChunkStorageMetadata(torch.Size([0]), size)


def below_zero(found: Metadata) -> None:
    found.state_dict_metadata["a"].size = torch.Size([-4, -4])


def no_size(found: Metadata) -> None:
    found.state_dict_metadata["a"].size = 7


def no_properties(found: Metadata) -> None:
    found.state_dict_metadata["a"].properties = None


def no_chunks(found: Metadata) -> None:
    found.state_dict_metadata["a"].chunks = [None]


def no_name(found: Metadata) -> None:
    found.state_dict_metadata[3] = found.state_dict_metadata.pop("a")


@pytest.mark.parametrize("change", [larger, below_zero, no_size, no_properties, no_chunks, no_name])
def test_metadata_that_describes_no_tensors(change: Callable[[Metadata], None]) -> None:
    folder = claims("x", change)
    with pytest.raises(InputError, match=r"^x: cannot be read .*; continue from another checkpoint$"):
        read_tensors(folder, "")
    with pytest.raises(InputError, match=r"^x: "):
        check_tensors(folder, TENSORS)


def test_objects_beside_tensors_are_never_unpickled() -> None:
    writer = dcp.FileSystemWriter("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        dcp.save({**TENSORS, "harmful": Harmful()}, storage_writer=writer, no_dist=True)
    assert read_tensors(Path("x"), "").keys() == TENSORS.keys()
    with pytest.raises(InputError, match="harmful is stored as a pickle, not as a tensor"):
        load_tensors(Path("x"), {"harmful": torch.ones(1)})


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "\0", "{", ""])
def test_documents_of_a_checkpoint_that_are_none(text: str) -> None:
    Path("run.json").write_text(text)
    with pytest.raises(InputError, match=r"^run\.json: .*; continue from another checkpoint"):
        read_document(Path("run.json"))


@pytest.mark.parametrize("value", [None, "3", -1, 2.5, True, [1]])
def test_a_run_goes_on_from_numbers_only(value: object) -> None:
    data, facts = {"seed": 0, "position": 8, "num_samples": 20}, {"step": 1, "global_batch_size": 8}
    check_documents(Path("c"), data, facts)
    for name, document, key in (("data", data, "position"), ("run", facts, "step")):
        changed = {**document, key: value}
        json.dumps(changed)
        pair = (changed, facts) if name == "data" else (data, changed)
        with pytest.raises(InputError, match=rf"^c/{name}\.json: {key} is .* instead of a number"):
            check_documents(Path("c"), *pair)
