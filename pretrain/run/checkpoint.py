"""Training checkpoints: written whole or not at all; the newest whole one is found after any crash.

    checkpoints/step_00010000/  model/ optim/  data.json  run.json  COMPLETE
    checkpoints/latest -> step_00010000

`step_*.tmp` is being written or removed; `step_*.old` is being replaced by a second save of its step.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.errors import InputError
from pretrain.run.durable import sync
from pretrain.run.tensors import check_tensors, load_tensors, save_tensors

PARTS = ("model", "optim")
COMPLETE = "COMPLETE"  # an empty file, written last


class Checkpoints:
    """The checkpoints that one training process writes and prunes.

    Only that process may make this object: it removes what a killed save left. To look for a checkpoint from
    elsewhere, call `newest_checkpoint`.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int) -> None:
        """Make the folder, and clean up after a killed save.

        Args:
            folder: the run's `checkpoints` folder.
            keep: newest checkpoints kept, at least the one just written.
            keep_every: checkpoints at multiples of this many steps are never removed; 0 = none.

        Raises:
            InputError: the folder cannot be made or cleaned.
        """
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._clean()
        except OSError as error:
            raise InputError(f"{folder}: cannot be used for checkpoints ({error}); set run.dir") from error

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step, or None."""
        return newest_checkpoint(self.folder)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        data: Mapping[str, Any],
        run: Mapping[str, Any],
    ) -> Path:
        """Write the checkpoint of a step, replacing an older one of that step, and prune; returns its folder.

        Args:
            step: optimizer steps done.
            tensors: `{"model": {name: tensor}, "optim": {name: tensor}}`.
            data: position in the data, for data.json.
            run: what else resuming needs or a reader wants to know, for run.json.

        Raises:
            InputError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        documents = {"data.json": json.dumps(data, indent=1), "run.json": json.dumps(run, indent=1)}
        final = self.folder / f"step_{step:08d}"
        try:
            self._clean()
            temporary = final.with_suffix(".tmp")
            _write(temporary, tensors, documents)
            self._publish(temporary, final)
            self._prune(final)
        except OSError as error:
            raise self._failed(step, error) from error
        return final

    def _publish(self, temporary: Path, final: Path) -> None:
        """Give a whole checkpoint its name. A kill between the first two renames is undone by `_clean`."""
        replaced = final.with_suffix(".old")
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync(self.folder)
        _remove(replaced)
        link = self.folder / "latest.tmp"
        link.symlink_to(final.name)
        link.replace(self.folder / "latest")
        sync(self.folder)

    def _prune(self, written: Path) -> None:
        """Remove all but the newest `keep`, those at multiples of `keep_every`, and the one just written."""
        complete = complete_checkpoints(self.folder)
        for path in complete[: max(0, len(complete) - self.keep)]:
            kept_for_good = self.keep_every > 0 and _step(path) % self.keep_every == 0
            if path != written and not kept_for_good:
                # renamed first: a kill halfway must not leave a COMPLETE beside half of the files
                _remove(path.rename(path.with_suffix(".tmp")))

    def _clean(self) -> None:
        """Undo a save or a removal that was killed."""
        for replaced in self.folder.glob("step_*.old"):
            final = replaced.with_suffix("")
            if (final / COMPLETE).exists():
                _remove(replaced)
            else:
                _remove(final)
                replaced.rename(final)
        for temporary in self.folder.glob("*.tmp"):
            _remove(temporary)

    def _failed(self, step: int, error: OSError) -> InputError:
        """One line about a save that failed, after taking back what it left."""
        try:
            self._clean()
        except OSError as again:
            error.add_note(f"cleaning up failed as well: {again}")
        last = self.newest()
        rest = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        return InputError(
            f"{self.folder}: saving step {step} failed ({error}); {rest}. "
            "Make room or set another run.dir, then start again"
        )


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder that have the COMPLETE file, by rising step."""
    found = [path for path in folder.glob("step_*") if _step(path) >= 0 and (path / COMPLETE).is_file()]
    return sorted(found, key=_step)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None; the link `latest` is for people, not trusted."""
    return next(reversed(complete_checkpoints(folder)), None)


def load_checkpoint(
    path: Path, tensors: Mapping[str, Mapping[str, Tensor]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill tensors in place from a checkpoint; returns the contents of its data.json and run.json.

    Args:
        path: a `step_*` folder, or a link to one.
        tensors: as for `Checkpoints.save`; with "model" alone the optimizer's are left out.

    Raises:
        InputError: the folder is not a complete checkpoint, is damaged, or does not hold exactly these names,
            shapes and dtypes. Nothing is filled unless all parts fit.
    """
    if not (path / COMPLETE).is_file():
        raise InputError(
            f"{path}: is not a complete checkpoint; name a step_* folder with a file {COMPLETE} in it"
        )
    documents = _read_json(path / "data.json"), _read_json(path / "run.json")
    for part, named in tensors.items():
        check_tensors(path / part, named)
    for part, named in tensors.items():
        load_tensors(path / part, named)
    return documents


def _write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, str]) -> None:
    folder.mkdir()
    for part in PARTS:
        save_tensors(folder / part, tensors[part])
    for name, text in documents.items():
        (folder / name).write_text(text + "\n")
    for path in folder.rglob("*"):
        sync(path)
    (folder / COMPLETE).touch()
    sync(folder / COMPLETE)
    sync(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); continue from another checkpoint") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path}: is not a JSON object; continue from another checkpoint")
    return contents


def _step(path: Path) -> int:
    """Optimizer steps done in a checkpoint folder, from its name; -1 for another name."""
    match = re.fullmatch(r"step_(\d{8,})", path.name)
    return int(match[1]) if match else -1


def _remove(path: Path) -> None:
    """Remove a file, link or folder; what a network disk does not give up is tried again at the next save."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
