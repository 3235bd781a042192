"""The folder of a run's checkpoints: what is complete in it, and how one process writes, replaces and prunes.

    checkpoints/step_00010000/  model/ optim/  data.json  run.json  COMPLETE
    checkpoints/latest -> step_00010000

`step_*.tmp` is being written or removed; `step_*.old` is being replaced by a second save of its step.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from pretrain.errors import InputError
from pretrain.run.durable import sync

COMPLETE = "COMPLETE"  # an empty file, written last


class CheckpointFolder:
    """A run's checkpoints, for the one process that makes, completes and removes them."""

    def __init__(self, path: Path, keep: int, keep_every: int) -> None:
        self.path, self.keep, self.keep_every = path, keep, keep_every

    def prepare(self) -> None:
        """Make the folder, and clean up after a killed save.

        Raises:
            InputError: the folder cannot be made or cleaned.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._clean()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be used for checkpoints ({error}); set run.dir") from error

    def step(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.path / f"step_{step:08d}"

    def begin(self, step: int) -> Path:
        """Make the empty folder into which all ranks write the checkpoint of a step."""
        self._clean()
        temporary = self.step(step).with_suffix(".tmp")
        temporary.mkdir()
        return temporary

    def complete(self, step: int, documents: Mapping[str, str]) -> None:
        """Flush what all ranks have written, publish it under its name, and prune."""
        final = self.step(step)
        temporary = final.with_suffix(".tmp")
        for name, text in documents.items():
            (temporary / name).write_text(text + "\n")
        for path in temporary.rglob("*"):
            sync(path)
        (temporary / COMPLETE).touch()
        sync(temporary / COMPLETE)
        sync(temporary)
        self._publish(temporary, final)
        self._prune(final)

    def failed(self, step: int, error: OSError) -> InputError:
        """One line about a save that failed, after taking back what it left."""
        try:
            self._clean()
        except OSError as again:
            error.add_note(f"cleaning up failed as well: {again}")
        last = newest_checkpoint(self.path)
        rest = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        return InputError(
            f"{self.path}: saving step {step} failed ({error}); {rest}. "
            "Make room or set another run.dir, then start again"
        )

    def _publish(self, temporary: Path, final: Path) -> None:
        """Give a whole checkpoint its name. A kill between the first two renames is undone by `_clean`."""
        replaced = final.with_suffix(".old")
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync(self.path)
        _remove(replaced)
        link = self.path / "latest.tmp"
        link.symlink_to(final.name)
        link.replace(self.path / "latest")
        sync(self.path)

    def _prune(self, written: Path) -> None:
        """Remove all but the newest `keep`, those at multiples of `keep_every`, and the one just written."""
        complete = complete_checkpoints(self.path)
        for path in complete[: max(0, len(complete) - self.keep)]:
            kept_for_good = self.keep_every > 0 and _step(path) % self.keep_every == 0
            if path != written and not kept_for_good:
                # renamed first: a kill halfway must not leave a COMPLETE beside half of the files
                _remove(path.rename(path.with_suffix(".tmp")))

    def _clean(self) -> None:
        """Undo a save or a removal that was killed."""
        for replaced in self.path.glob("step_*.old"):
            final = replaced.with_suffix("")
            if (final / COMPLETE).exists():
                _remove(replaced)
            else:
                _remove(final)
                replaced.rename(final)
        for temporary in self.path.glob("*.tmp"):
            _remove(temporary)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder that have the COMPLETE file, by rising step."""
    found = [path for path in folder.glob("step_*") if _step(path) >= 0 and (path / COMPLETE).is_file()]
    return sorted(found, key=_step)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None; the link `latest` is for people, not trusted."""
    return next(reversed(complete_checkpoints(folder)), None)


def newest_step(folder: Path) -> int:
    """Optimizer steps done in the newest complete checkpoint; 0 without one."""
    newest = newest_checkpoint(folder)
    return _step(newest) if newest else 0


def require_complete(path: Path) -> None:
    """Refuse a folder that is not a complete checkpoint.

    Raises:
        InputError: it has no COMPLETE file.
    """
    if not (path / COMPLETE).is_file():
        raise InputError(
            f"{path}: is not a complete checkpoint; name a step_* folder with a file {COMPLETE} in it"
        )


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
