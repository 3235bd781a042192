import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from pretrain.errors import InputError
from pretrain.run.tensors import read_tensors, save_tensors


class Attack:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_tensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.ones(2).bool()})
    return path


def test_every_kind_of_tensor_is_described(folder: Path) -> None:
    found = read_tensors(folder, "")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} == {
        "a": (torch.float32, (2, 3)),
        "b": (torch.int64, ()),
        "c": (torch.bool, (2,)),
    }
    assert found["a"].flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_metadata_that_would_run_code_is_refused_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    for harmful in (Attack(target), {"state_dict_metadata": Attack(target)}):
        (folder / ".metadata").write_bytes(pickle.dumps(harmful))
        with pytest.raises(InputError, match=r"it is a pickle that wants to run (posix|nt)\.mkdir"):
            read_tensors(folder, "")
    assert not target.exists()


def test_metadata_of_another_kind_is_refused(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="it holds a dict instead of DCP's metadata"):
        read_tensors(folder, "")


def changed(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_tensor_that_is_not_stored_whole_is_refused(folder: Path) -> None:
    changed(folder, lambda metadata: metadata.state_dict_metadata["a"].chunks.clear())
    with pytest.raises(InputError, match="a is not stored whole"):
        read_tensors(folder, "")


@pytest.mark.parametrize("second", [(0, 0), (0, 1), (1, 0)])
def test_parts_that_overlap_leave_no_memory_unfilled(folder: Path, second: tuple[int, int]) -> None:
    """Their sizes add up to the whole: 2 x 3 values as 1 x 3 and 1 x 3."""
    Part = ChunkStorageMetadata
    first, size = Part(torch.Size((0, 0)), torch.Size((1, 3))), torch.Size((1, 3))

    def split(metadata: Any) -> None:
        metadata.state_dict_metadata["a"].chunks[:] = [first, Part(torch.Size(second), size)]

    changed(folder, split)
    whole = second == (1, 0)  # which fails for another reason: only one part is in the files
    with pytest.raises(InputError, match="cannot be read" if whole else "a is not stored whole") as refused:
        read_tensors(folder, "")
    assert ("not stored whole" in str(refused.value)) != whole


def test_metadata_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    def lead_out(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../outside.distcp"

    changed(folder, lead_out)
    with pytest.raises(InputError, match=r"it names the file '\.\./outside\.distcp' outside of the folder"):
        read_tensors(folder, "")
