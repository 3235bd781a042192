"""Sharded checkpoints: folders of torch.distributed.checkpoint (DCP), ours and plain ones."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from pretrain.errors import InputError
from pretrain.export.examine import inspect
from pretrain.export.weights import read_weights
from pretrain.run.checkpoint import Checkpoints, load_checkpoint
from pretrain.run.checkpoint_folder import newest_checkpoint
from pretrain.run.tensors import save_tensors
from pretrain.start import check_documents
from tests.fuzz.cases import REFUSED, WORKED, Files
from tests.surgery.backbones import PLAIN, random_state

TINY = replace(PLAIN, embed_dim=64, num_heads=1, depth=1, img_size=28)
CONFIG = """
model: {arch: custom, embed_dim: 64, num_heads: 1, depth: 1, patch_size: 14, img_size: 28, layer_scale: 1.0}
data: {local_crops: {size: 98}}
"""
STEP = 3
DATA = {"seed": 0, "position": 24, "num_samples": 100}
FACTS = {"step": STEP, "global_batch_size": 8}
NUMBERS = (0, 1, -1, 7, 512, 2**31, 2**40, 2**63 - 1, -(2**63), 2**64)
ODD = (None, True, 3, -1, 0.5, "", "a", b"a", (), [], {}, [None], {"a": 1}, torch.Size([1]), torch.float32)
PATHS = ("../harm", "/etc/hostname", "", ".", "missing.distcp", "__0_1.distcp", ".metadata", 3, None)


@cache
def _tensors() -> dict[str, dict[str, Tensor]]:
    """A small model's, as an engine names them."""
    state = random_state(TINY)
    model = {f"teacher.backbone.{name}": tensor for name, tensor in state.items()}
    return {"model": model, "optim": {f"{name}.exp_avg": torch.zeros(3) for name in list(state)[:3]}}


def checkpoint_examples(folder: Path) -> list[Files]:
    """A run with one checkpoint, and a folder of another program."""
    run, plain = folder / "run", folder / "plain"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG)
    with Checkpoints(run / "checkpoints", 3, 0) as checkpoints:
        checkpoints.save(STEP, _tensors(), DATA, FACTS)
    (run / "checkpoints" / "latest").unlink()  # a link, which no case holds
    save_tensors(plain, {f"model.{name}": tensor for name, tensor in random_state(TINY).items()})
    return [_files(run, folder), _files(plain, folder), _files(plain, folder)]  # reading it is faster


def _files(part: Path, folder: Path) -> Files:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in part.rglob("*") if path.is_file()}
    for name in found:
        if name.endswith(".metadata"):
            found[name] = _without_chance(found[name])
    return found


def _without_chance(content: bytes) -> bytes:
    """DCP notes a random number, which would make other examples in each process."""
    metadata = pickle.loads(content)  # our own
    metadata.storage_meta = None
    return pickle.dumps(metadata)


def look_at_checkpoint(folder: Path) -> str:
    """As resuming, and as `tools/surgery.py` reads it."""
    run, other = folder / "run", folder / "plain"
    looks: list[Callable[[], object]] = [partial(inspect, other, spectral=False)]
    if run.is_dir():
        looks, other = [partial(_resume, run)], run / "checkpoints" / f"step_{STEP:08d}"
    looks.append(partial(read_weights, other))
    refused = [_is_refused(look) for look in looks]  # each of them looks, whatever the others say
    return REFUSED if any(refused) else WORKED


def _resume(run: Path) -> None:
    path = newest_checkpoint(run / "checkpoints")
    assert path is not None, "the file COMPLETE is empty, whatever is done to it"
    filled = {part: {name: t.clone() for name, t in named.items()} for part, named in _tensors().items()}
    check_documents(path, *load_checkpoint(path, filled))


def _is_refused(look: Callable[[], object]) -> bool:
    try:
        look()
    except InputError as error:
        assert str(error).strip() and "\n" not in str(error), repr(error)
        return True
    return False


class Harmful:
    """A pickle that runs a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harm",)


def damage_metadata(random: Random, content: bytes) -> bytes:
    """One to three values of DCP's description of a folder, pickled again."""
    try:
        metadata = pickle.loads(content)  # of an example, which is ours
    except Exception:  # other damage came first: there is no description left to change
        return content
    for _ in range(random.choice((1, 1, 2, 3))):
        random.choice((_damage_entry, _damage_entry, _damage_place, _damage_whole))(random, metadata)
    return pickle.dumps(metadata)


def _damage_entry(random: Random, metadata: Metadata) -> None:
    """What is said of one tensor: its name, size, type or parts."""
    entries: dict[Any, Any] = metadata.state_dict_metadata
    if not isinstance(entries, dict) or not entries:
        return
    name = random.choice(list(entries))
    entry = entries[name]
    match random.randrange(7) if hasattr(entry, "chunks") else 0:
        case 0:
            entries[random.choice(("harm", "", 3, None, f"{name}x"))] = entries.pop(name)
        case 1:
            del entries[name]
        case 2:
            entries[name] = random.choice((*ODD, Harmful()))
        case 3:
            entry.size = _size(random)
        case 4:
            entry.chunks = random.choice(([ChunkStorageMetadata(_size(random), _size(random))], *ODD))
        case 5:
            entry.properties = random.choice(ODD)
        case 6 if entry.properties is not None and hasattr(entry.properties, "dtype"):
            entry.properties.dtype = random.choice((torch.float16, torch.int64, torch.complex64, *ODD))


def _size(random: Random) -> Any:
    if random.random() < 0.3:
        return random.choice(ODD)
    numbers = [random.choice(NUMBERS[:-1]) for _ in range(random.randrange(4))]  # 2^64 is no size in torch
    return torch.Size(numbers)


def _damage_place(random: Random, metadata: Metadata) -> None:
    """Where one part of a tensor lies: file, start and length."""
    places: Any = metadata.storage_data
    if not isinstance(places, dict) or not places:
        return
    index = random.choice(list(places))
    match random.randrange(5):
        case 0:
            del places[index]
        case 1:
            places[index] = random.choice((*ODD, Harmful(), places[random.choice(list(places))]))
        case 2 if hasattr(places[index], "relative_path"):
            places[index].relative_path = random.choice(PATHS)
        case _ if hasattr(places[index], "offset"):
            field = random.choice(("offset", "length"))
            setattr(places[index], field, random.choice((*NUMBERS, *ODD, random.randrange(5000))))


def _damage_whole(random: Random, metadata: Metadata) -> None:
    name = random.choice(list(vars(metadata)))
    setattr(metadata, name, random.choice((*ODD, Harmful())))
