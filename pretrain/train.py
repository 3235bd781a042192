"""Pretraining, top to bottom: `main` builds a `Run` from a config, `run_loop` trains it.

The file to read first. The loop owns the order of things, the engine execution, the method mathematics, the
loader the position in the data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from torch import Tensor

from pretrain import distributed
from pretrain.analysis.features import knn_scores
from pretrain.config.derived import micro_batch_size
from pretrain.config.schema import Config, DataConfig, KnnConfig
from pretrain.data.labelled import labelled_batches
from pretrain.data.loader import TrainLoader
from pretrain.engines.base import Engine
from pretrain.engines.single import SingleEngine
from pretrain.errors import TrainingError
from pretrain.export import write_export
from pretrain.method.dinov2 import DinoV2
from pretrain.optim.schedules import Schedules
from pretrain.run.checkpoint import Checkpoints
from pretrain.run.lock import RunLock
from pretrain.run.metrics import Averages, MetricLog, Throughput
from pretrain.run.preemption import STOPPED, Preemption
from pretrain.run.progress import Progress
from pretrain.start import build_branches, load_start, record_run, run_facts

Value = TypeVar("Value", Tensor, float)


@dataclass
class Run:
    """Everything the loop needs, built once."""

    cfg: Config
    folder: Path
    engine: Engine
    method: DinoV2
    loader: TrainLoader
    schedules: Schedules
    checkpoints: Checkpoints
    step: int  # optimizer steps done


def main(cfg: Config) -> int:
    """Train a run to its last step from wherever it stands.

    Returns:
        The process's exit status: 0 when the run is finished, `STOPPED` when a signal ended it after a save.

    Raises:
        InputError: the config, the data or the run folder cannot be used.
        TrainingError: the loss or the gradients were not finite for `optim.max_bad_steps` steps.
    """
    with RunLock(Path(cfg.run.dir)), Preemption() as preemption:
        run = build(cfg)
        if run.step >= cfg.run.steps:
            print(f"{run.folder}: finished at step {run.step}; set run.steps higher to train on")
            return 0
        with Progress(cfg.run.steps, run.step) as progress:
            metrics = MetricLog(run.folder, cfg.log.tensorboard, run.step)
            try:
                run_loop(run, metrics, progress, preemption)
            finally:
                metrics.close()
    return 0 if run.step >= cfg.run.steps else STOPPED


def build(cfg: Config) -> Run:
    """Data, model, engine and folder of a run, in the state that it starts from."""
    device = distributed.pick_device(cfg.engine.device)
    rank, world_size = distributed.rank(), distributed.world_size()
    micro_batch = micro_batch_size(cfg, world_size)
    loader = TrainLoader(cfg, device, micro_batch, rank, world_size)
    student, teacher, method = build_branches(cfg, device, micro_batch)
    engine = SingleEngine(student, teacher, method, cfg.optim, cfg.engine, device)
    folder = Path(cfg.run.dir)
    checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep, cfg.checkpoint.keep_every)
    step = load_start(cfg, engine, checkpoints)
    record_run(cfg, folder)
    return Run(cfg, folder, engine, method, loader, Schedules(cfg), checkpoints, step)


def run_loop(run: Run, metrics: MetricLog, progress: Progress, preemption: Preemption) -> None:
    """The training loop: one optimizer step per turn, over one or several micro-batches."""
    cfg, engine, method = run.cfg, run.engine, run.method
    averages, throughput = Averages(), Throughput()
    if run.step == 0 and cfg.log.knn.every:
        evaluate(run, metrics, progress)

    for step, micro_batches in run.loader.steps(run.step, cfg.run.steps):
        values = run.schedules.at(step)
        engine.begin_step(step, values)

        outputs = [engine.teacher(batch) for batch in micro_batches]
        weights = [batch.mask_weights for batch in micro_batches]
        targets = method.targets(outputs, weights, values.teacher_temp, step)

        parts, last = [], len(micro_batches) - 1
        for i, (batch, target) in enumerate(zip(micro_batches, targets, strict=True)):
            terms = method.losses(engine.student(batch), target, batch)
            engine.backward(terms.total / len(micro_batches), last=i == last)
            parts.append(prefixed("loss", terms.parts))

        result = engine.step()  # a bad step changes nothing: see engines/guard.py
        method.commit(result.good)
        engine.update_teacher(values.momentum)

        for values_by_name in (*parts, prefixed("grad_norm", result.grad_norms)):
            averages.add(values_by_name, result.good)

        run.step = step + 1
        throughput.add(cfg.optim.global_batch_size)
        if due(run, cfg.log.every):
            scalars = averages.means() | prefixed("schedule", asdict(values))  # the loop's only host sync
            scalars["images_per_s"] = throughput.rate()
            metrics.write(run.step, scalars | check_bad_steps(run))
            progress.update(run.step, scalars)
        stop = preemption.requested()
        if stop or due(run, cfg.checkpoint.every):
            save_checkpoint(run)
        if due(run, cfg.checkpoint.export_every):
            export_teacher(run)
        if due(run, cfg.log.knn.every):
            evaluate(run, metrics, progress)
        if stop:
            progress.say(f"step {run.step}: {preemption.reason}; saved, the same command continues")
            break


def prefixed(prefix: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """The values under names like loss/total, which TensorBoard groups by their first part."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


def due(run: Run, every: int) -> bool:
    """Whether something done every `every` steps is due: then, and after the last step."""
    return run.step == run.cfg.run.steps or (every > 0 and run.step % every == 0)


def check_bad_steps(run: Run) -> dict[str, float]:
    """The number of skipped steps, for the log.

    Raises:
        TrainingError: there were too many in a row.
    """
    total, in_a_row = run.engine.bad_steps()
    if in_a_row >= run.cfg.optim.max_bad_steps:
        raise TrainingError(
            f"{run.folder}: {in_a_row} steps in a row up to step {run.step} were skipped, their loss or "
            "gradients not finite or a spike. The weights are still those of step "
            f"{run.step - in_a_row}. Look at the data, lower optim.lr, or continue from an earlier "
            "checkpoint (checkpoint.resume_from)"
        )
    return {"bad_steps": total}


def save_checkpoint(run: Run) -> None:
    """Save all that an exact continuation needs."""
    position = run.step * run.cfg.optim.global_batch_size
    data = {"seed": run.cfg.run.seed, "epoch": position // run.loader.num_samples, "position": position}
    run.checkpoints.save(run.step, run.engine.state_dict(), data, run_facts(run.cfg, run.step))


def export_teacher(run: Run) -> Path:
    """Write the teacher's backbone as a single file."""
    weights = run.engine.full_state_dict("teacher")
    backbone = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    path = run.folder / "exports" / f"teacher_step_{run.step:08d}.safetensors"
    return write_export(path, backbone, run.cfg.model, {"branch": "teacher", **run_facts(run.cfg, run.step)})


def evaluate(run: Run, metrics: MetricLog, progress: Progress) -> None:
    """k-NN accuracy of the teacher on the labelled shards of `log.knn`, when there are any."""
    knn, data = run.cfg.log.knn, run.cfg.data
    if not knn.train:
        return
    train, test = knn_batches(knn, data, "train"), knn_batches(knn, data, "test")

    def tokens(images: Tensor) -> tuple[Tensor, Tensor]:
        features = run.engine.features(images)
        return features.cls, features.patches

    scores = knn_scores(tokens, train, test, knn)
    metrics.write(run.step, scores)
    progress.say(f"step {run.step}: " + "  ".join(f"{name} {value:.1f} %" for name, value in scores.items()))


def knn_batches(
    knn: KnnConfig, data: DataConfig, split: Literal["train", "test"]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of normalised images and labels of one split of `log.knn`."""
    patterns = knn.train if split == "train" else knn.test
    return labelled_batches(
        patterns, f"log.knn.{split}", knn.resize, knn.crop, data.mean, data.std, knn.batch_size
    )
