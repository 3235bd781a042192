"""Training checkpoints of any engine and any number of ranks: written whole or not at all.

What a checkpoint is on the disk stands in `checkpoint_folder.py`. Saving and loading are collective when a
process group runs: every rank writes its part, rank 0 the rest, and a failure of one rank is raised by all.
"""

import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from pretrain.distributed import rank, world_size
from pretrain.errors import InputError
from pretrain.run.checkpoint_folder import CheckpointFolder, newest_checkpoint, require_complete
from pretrain.run.staging import Staging, own_share
from pretrain.run.tensors import check_tensors, kinds, load_tensors, save_tensors
from pretrain.run.together import Together

State = Mapping[str, Mapping[str, Tensor]]  # {"model": {name: tensor}, "optim": {name: tensor}}


class Checkpoints:
    """The checkpoints that one run writes and prunes; as a context manager it waits for the last at its exit.

    Only that run may make this object: it removes what a killed save left. To look for a checkpoint from
    elsewhere, call `newest_checkpoint`. All methods are collective.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int, asynchronous: bool = False) -> None:
        """Make the folder, and clean up after a killed save.

        Args:
            folder: the run's `checkpoints` folder.
            keep: newest checkpoints kept, at least the one just written.
            keep_every: checkpoints at multiples of this many steps are never removed; 0 = none.
            asynchronous: a save copies the tensors and returns; a thread writes the copy.

        Raises:
            InputError: the folder cannot be made or cleaned.
        """
        self.folder, self.asynchronous = folder, asynchronous
        self._disk = CheckpointFolder(folder, keep, keep_every)
        self._together, self._staging = Together(), Staging()
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # Python's exit waits for it
        self._pending: Future[None] | None = None
        self._together.first(self._disk.prepare)

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for a save under way. Its failure is raised, beside another error only told."""
        try:
            self.finish()
        except Exception as failure:
            if error is None:
                raise
            print(failure, file=sys.stderr)

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step, or None; rank 0 looks for all."""
        self.finish()
        return self._together.first(lambda: newest_checkpoint(self.folder))

    def save(
        self,
        step: int,
        tensors: State,
        data: Mapping[str, Any],
        run: Mapping[str, Any],
        native: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write the checkpoint of a step, replacing an older one of that step, and prune; returns its folder.

        An asynchronous save first waits for the one before. Its folder appears when it is complete; what is
        written are the values of this call.

        Args:
            step: optimizer steps done.
            tensors: `{"model": {name: tensor}, "optim": {name: tensor}}`, the same names on all ranks: plain
                tensors that are equal on all of them, or distributed ones (DTensor).
            data: position in the data, for data.json; rank 0's counts.
            run: what else resuming needs or a reader wants to know, for run.json; likewise.
            native: writes what only the engine understands into the folder of the optimizer's state.

        Raises:
            InputError: the disk is full or the folder cannot be written, on this or another rank, now or at
                the asynchronous save before; earlier checkpoints are untouched.
        """
        self.finish()
        documents = {"data.json": json.dumps(data, indent=1), "run.json": json.dumps(run, indent=1)}
        if not self._together.same({part: kinds(named) for part, named in tensors.items()}):
            raise RuntimeError("the ranks would save tensors of different names, shapes or types")
        share = {part: own_share(named, rank(), world_size()) for part, named in tensors.items()}
        if self.asynchronous:
            copies = self._together.every(lambda: self._staging.copy(share))
            self._pending = self._thread.submit(self._write, step, copies, documents, native)
        else:
            self._write(step, share, documents, native)
        return self._disk.step(step)

    def finish(self) -> None:
        """Wait for an asynchronous save under way.

        Raises:
            InputError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(
        self,
        step: int,
        tensors: State,
        documents: Mapping[str, str],
        native: Callable[[Path], None] | None,
    ) -> None:
        """Every rank writes its tensors, then rank 0 makes a checkpoint of them."""
        try:
            temporary = self._together.first(lambda: self._disk.begin(step))
            for part, named in tensors.items():
                save_tensors(temporary / part, named, self._together.group)
            if native is not None:
                native(temporary / "optim")
            self._together.first(lambda: self._disk.complete(step, documents))
        except OSError as error:  # raised by all ranks, so all come here
            failure = error
        else:
            return
        raise self._together.first(lambda: self._disk.failed(step, failure)) from failure


def load_checkpoint(path: Path, tensors: State) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill tensors in place from a checkpoint; returns the contents of its data.json and run.json.

    Collective. It does not matter how many ranks wrote it, and which of its tensors were distributed.

    Args:
        path: a `step_*` folder, or a link to one.
        tensors: as for `Checkpoints.save`; with "model" alone the optimizer's are left out.

    Raises:
        InputError: on every rank, when for one of them the folder is not a complete checkpoint, is damaged,
            or does not hold exactly these names, shapes and dtypes. Nothing is filled unless all parts fit.
    """
    together = Together()
    try:
        documents = together.every(lambda: _check(path, tensors))
        together.every(lambda: _fill(path, tensors))
    finally:
        together.close()
    return documents


def _check(path: Path, tensors: State) -> tuple[dict[str, Any], dict[str, Any]]:
    require_complete(path)
    documents = read_document(path / "data.json"), read_document(path / "run.json")
    for part, named in tensors.items():
        check_tensors(path / part, named)
    return documents


def _fill(path: Path, tensors: State) -> None:
    for part, named in tensors.items():
        load_tensors(path / part, named)


def read_document(path: Path) -> dict[str, Any]:
    """One of a checkpoint's JSON files.

    Raises:
        InputError: it cannot be read, or holds something else than an object.
    """
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); continue from another checkpoint") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path}: is not a JSON object; continue from another checkpoint")
    return contents
