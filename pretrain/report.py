"""What a run tells while it trains: numbers, signals and warnings, k-NN scores, pictures, defects."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

from rich.console import Console
from torch import Tensor

from pretrain.analysis.features import knn_scores
from pretrain.analysis.maps import PatchPca, cls_attention
from pretrain.analysis.samples import first_images
from pretrain.analysis.sheet import picture
from pretrain.config.derived import micro_batch_size, rmlp_strength, uses_rmlp
from pretrain.config.schema import Config
from pretrain.data.labelled import labelled_batches
from pretrain.distributed import barrier, is_main, world_size
from pretrain.engines.base import Engine, StepResult
from pretrain.errors import InputError, TrainingError
from pretrain.method.outputs import Observation
from pretrain.method.signals import signals
from pretrain.models.vit import VisionTransformer
from pretrain.optim.schedules import StepValues
from pretrain.run.health import CollapseWatch
from pretrain.run.metrics import Averages, MetricLog, Throughput
from pretrain.run.profiling import PhaseTimer
from pretrain.run.progress import Progress
from pretrain.sinder.monitoring import artifact_figures, diagnose_now

Value = TypeVar("Value", Tensor, float)


def prefixed(prefix: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """The values under names like loss/total, which TensorBoard groups by their first part."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


class Report:
    """The voice of one session of a run, as a context manager around its loop.

    Every rank has one and calls it alike, because means and features are collective; rank 0's alone is heard.
    """

    def __init__(self, cfg: Config, engine: Engine, steps_done: int) -> None:
        self.cfg, self.engine, self.folder = cfg, engine, Path(cfg.run.dir)
        self.metrics = MetricLog(self.folder if is_main() else None, cfg.log.tensorboard, steps_done)
        console = Console() if is_main() else Console(quiet=True)
        self.progress = Progress(cfg.run.steps, steps_done, console)
        self.timer = PhaseTimer(engine.device)
        self.averages, self.throughput = Averages(), Throughput()
        self.watch = CollapseWatch(cfg.optim.warmup_steps, micro_batch_size(cfg, world_size()))

    def __enter__(self) -> Self:
        """Show the progress."""
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close files and progress."""
        self.progress.__exit__(kind, error, trace)
        self.metrics.close()

    def add(self, result: StepResult, observation: Observation) -> None:
        """Take in a step; nothing waits for the device."""
        for parts in observation.losses:
            self.averages.add(prefixed("loss", parts), result.good)
        self.averages.add(prefixed("grad_norm", result.grad_norms), result.good)
        self.averages.add(observation.layer_norms)
        self.throughput.add(self.cfg.optim.global_batch_size)

    def write(
        self, step: int, values: StepValues, observation: Observation, loading: Mapping[str, float]
    ) -> None:
        """Write the window that ends with this step, and say what looks wrong: here the host waits.

        Losses, norms and signals are means over the ranks; times and what the loader counted are rank 0's
        own. Its wait for data lasts until every rank has its own: see `train.read_steps`.

        Args:
            step: optimizer steps done.
            values: of the last step.
            observation: of the last step.
            loading: what the loader counted.

        Raises:
            TrainingError: too many steps in a row were bad.
        """
        last = observation
        self.averages.add(signals(last.student, last.teacher, last.targets, last.batch))
        scalars = self.averages.means() | prefixed("schedule", asdict(values))
        if uses_rmlp(self.cfg):
            scalars |= prefixed("schedule/rmlp", rmlp_strength(self.cfg, step - 1)._asdict())
        seconds = self.timer.means()
        scalars |= prefixed("seconds", seconds) | prefixed("loader", loading) | self._bad_steps(step)
        scalars["loader/data_wait_percent"] = 100 * seconds["data"] / max(sum(seconds.values()), 1e-9)
        scalars["images_per_s"] = self.throughput.rate()
        self.metrics.write(step, scalars)
        self.progress.update(step, scalars)
        for warning in self.watch.check(step, scalars):
            self.progress.say(f"step {step}: WARNING: {warning}")

    def _bad_steps(self, step: int) -> dict[str, float]:
        total, in_a_row = self.engine.bad_steps()
        if in_a_row >= self.cfg.optim.max_bad_steps:
            raise TrainingError(
                f"{self.folder}: {in_a_row} steps in a row up to step {step} were skipped, their loss or "
                f"gradients not finite or a spike. The weights are still those of step {step - in_a_row}. "
                "Look at the data, lower optim.lr, or continue from an earlier checkpoint "
                "(checkpoint.resume_from)"
            )
        return {"bad_steps": total}

    def evaluate(self, step: int) -> None:
        """k-NN accuracy of the teacher on the labelled shards of `log.knn`, when there are any.

        Every rank takes the features of all images: a sharded teacher needs all ranks for each of them.
        """
        if not self.cfg.log.knn.train:
            return

        def tokens(images: Tensor) -> tuple[Tensor, Tensor]:
            features = self.engine.features(images)
            return features.cls, features.patches

        scores = knn_scores(tokens, self._labelled("train"), self._labelled("test"), self.cfg.log.knn)
        self.metrics.write(step, scores)
        line = "  ".join(f"{name} {value:.1f} %" for name, value in scores.items())
        self.progress.say(f"step {step}: {line}")

    def _labelled(self, split: Literal["train", "test"]) -> Iterator[tuple[Tensor, Tensor]]:
        knn, data = self.cfg.log.knn, self.cfg.data
        patterns = knn.train if split == "train" else knn.test
        name = f"log.knn.{split}"
        sizes, scaling = (knn.resize, knn.crop), (data.mean, data.std)
        return labelled_batches(patterns, name, *sizes, *scaling, knn.batch_size, data.channels, data.decode)

    def draw(self, step: int) -> None:
        """A sheet of the images of `log.images`: each with its patch tokens as colours and its attention."""
        cfg, data = self.cfg.log.images, self.cfg.data
        if not cfg.shards:
            return
        images = self._first_images(cfg.shards, "log.images.shards", cfg.number)
        tokens = self.engine.features(images).patches.float().cpu()
        attention = cls_attention(self.engine.teacher_backbone(), images.to(self.engine.device)).cpu()
        if not is_main():
            return
        colours = self._pca(tokens).project(tokens)
        self.metrics.picture(step, "images", picture(images, data.mean, data.std, colours, attention))

    def _first_images(self, shards: Sequence[str], key_name: str, number: int) -> Tensor:
        """(n, C, S, S) at the size of the global crops."""
        data, size = self.cfg.data, self.cfg.data.global_crops.size
        scaling = (data.mean, data.std)
        return first_images(shards, key_name, number, size, size, *scaling, data.channels, data.decode)

    def _pca(self, tokens: Tensor) -> PatchPca:
        """One basis through the run, so that a colour means the same at every step."""
        path = self.folder / "patch_pca.safetensors"
        if not path.exists():
            PatchPca.fit(tokens).save(path)
        return PatchPca.load(path)

    def look_for_artifacts(self, step: int) -> None:
        """Singular defects of the teacher on the images of `log.artifacts`, when there are any.

        Every rank takes part in gathering a sharded teacher. Rank 0 then looks at it alone, as the cores of a
        machine predict the directions only once; the others wait here, where no watchdog counts.
        """
        if not self.cfg.log.artifacts.shards:
            return
        backbone = self.engine.teacher_backbone()
        if is_main():
            self._diagnose(step, backbone)
        barrier()

    def _diagnose(self, step: int, backbone: VisionTransformer) -> None:
        cfg = self.cfg.log.artifacts
        images = self._first_images(cfg.shards, "log.artifacts.shards", cfg.number)
        try:
            found = diagnose_now(backbone, images)
        except InputError as error:  # nothing to plot is no reason to end a run
            self.progress.say(f"step {step}: log.artifacts: {error}")
            return
        patches = (images.shape[-1] // backbone.patch_size) ** 2
        self.metrics.write(step, artifact_figures(found.layers, patches))
        if found.verdict != "clean":
            self.progress.say(f"step {step}: patch tokens stand out: {found.reason}")
