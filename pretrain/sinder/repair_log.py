"""The course of a repair, for TensorBoard and in metrics.jsonl; it goes on where an interrupted one ended."""

from pathlib import Path

from pretrain.errors import InputError
from pretrain.run.metrics import MetricLog
from pretrain.sinder.held_out import Measure
from pretrain.sinder.repair import Step


class RepairLog:
    """Writes each step at the number of images that it has seen; opened with the first one."""

    def __init__(self, folder: Path | None, goes_on: bool) -> None:
        """Check the folder.

        Args:
            folder: where to write; None = nowhere.
            goes_on: whether it may hold the log of an interrupted repair.

        Raises:
            InputError: there is a log of something else.
        """
        if folder is not None and not goes_on and (folder / "metrics.jsonl").exists():
            raise InputError(f"--log: {folder} holds the log of something else; choose another folder")
        self.folder = folder
        self._log: MetricLog | None = None

    def write(self, step: Step, measure: Measure | None) -> None:
        """Write a step, and what the held-out images show where they were looked at."""
        if self.folder is None:
            return
        if self._log is None:
            self._log = MetricLog(self.folder, tensorboard=True, steps_done=step.images - 1)
        scalars = {
            "loss": step.loss,
            "defective_patches": float(step.defective_patches),
            "clean_images_percent": 100 * step.clean_share,
        }
        if measure is not None:
            scalars["held_out/defective_percent"] = 100 * max(measure.by_both)
            scalars["held_out/cls_cosine"], scalars["held_out/patch_cosine"] = measure.drift
        self._log.write(step.images, scalars)

    def close(self) -> None:
        """Close the files."""
        if self._log is not None:
            self._log.close()
