"""Pretraining, top to bottom: `main` builds a `Run` from a config, `run_loop` trains it.

The file to read first. The loop owns the order of things, the engine execution, the method mathematics, the
loader the position in the data.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from pretrain import distributed, records
from pretrain.batch import Batch
from pretrain.command_line import STOPPED
from pretrain.config.derived import micro_batch_size
from pretrain.config.schema import Config
from pretrain.data.loader import TrainLoader
from pretrain.data.shards import check_logged_shards
from pretrain.engines.base import Engine, StepResult
from pretrain.engines.ddp import DdpEngine
from pretrain.engines.deepspeed_start import build_deepspeed
from pretrain.engines.fsdp2 import Fsdp2Engine
from pretrain.engines.single import SingleEngine
from pretrain.errors import InputError, TrainingError, first_line
from pretrain.export import write_export
from pretrain.faults import PeerError
from pretrain.method.base import Method
from pretrain.method.branch import SSLBranch
from pretrain.method.outputs import Observation, share_prototypes
from pretrain.optim.schedules import Schedules, StepValues
from pretrain.ranks import check_engine_kind, detect
from pretrain.report import Report
from pretrain.run.checkpoint import Checkpoints
from pretrain.run.garbage import StepwiseCollector
from pretrain.run.lock import RunLock
from pretrain.run.preemption import Preemption
from pretrain.run.profiling import PhaseTimer, StepProfiler
from pretrain.run.watchdog import Watchdog
from pretrain.session import pick_device, session
from pretrain.start import (
    build_branches,
    fill_weights,
    load_start,
    record_run,
    run_facts,
)

Steps = Generator[tuple[int, list[Batch]], None, None]


@dataclass
class Run:
    """Everything the loop needs, built once."""

    cfg: Config
    folder: Path
    engine: Engine
    method: Method
    loader: TrainLoader
    schedules: Schedules
    checkpoints: Checkpoints
    step: int  # optimizer steps done


def main(cfg: Config) -> int:
    """Train a run to its last step from wherever it stands: one process, or one of the ranks of a run.

    Returns:
        The process's exit status: 0 when the run is finished, `STOPPED` when a signal ended it after a save.

    Raises:
        InputError: the config, the data or the run folder cannot be used.
        TrainingError: too many steps in a row were bad, the data cannot be read any more, or a rank is gone.
        SystemExit: another rank failed.
    """
    check_engine_kind(cfg.engine.kind, detect(os.environ).world_size)
    with session(cfg.engine) as device:
        return _train(cfg, device)


def _train(cfg: Config, device: torch.device) -> int:
    lock = RunLock(Path(cfg.run.dir)) if distributed.is_main() else nullcontext()
    with lock, Preemption(cfg.run.preemption_check_every) as preemption:
        records.note_training()
        distributed.barrier()  # nobody touches the folder before rank 0 holds its lock
        try:
            run = build(cfg, device)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"model.arch={cfg.model.arch}: the device's memory is too small for weights and optimizer "
                f"({first_line(error)}); take a smaller model, more devices with engine.kind=fsdp2, or see "
                "what else uses the device"
            ) from error
        if run.step >= cfg.run.steps:
            distributed.say(f"{run.folder}: finished at step {run.step}; set run.steps higher to train on")
            return 0
        try:
            with run.checkpoints, Report(cfg, run.engine, run.step) as report:
                run_loop(run, report, preemption)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the device's memory is full; raise engine.accumulation_steps ({first_line(error)})"
            ) from error
        distributed.barrier()  # the lock covers what the other ranks still write
    return 0 if run.step >= cfg.run.steps else STOPPED


def build(cfg: Config, device: torch.device | None = None) -> Run:
    """Data, model, engine and folder of a run, in the state that it starts from; collective.

    Args:
        cfg: of the run.
        device: of this rank; default: what `engine.device` says of a single process.
    """
    device = device or pick_device(cfg.engine.device)
    rank, world_size = distributed.rank(), distributed.world_size()
    micro_batch = micro_batch_size(cfg, world_size)
    loader = TrainLoader(cfg, device, micro_batch, rank, world_size, Path(cfg.run.dir))
    check_logged_shards(cfg.log)
    on_meta = cfg.engine.kind == "fsdp2"
    student, teacher, method = build_branches(cfg, device, micro_batch, on_meta)
    if not on_meta:
        fill_weights(cfg, student, teacher)
    engine = build_engine(cfg, student, teacher, method, device)
    if on_meta:
        fill_weights(cfg, student, teacher)
    folder = Path(cfg.run.dir)
    options = cfg.checkpoint
    checkpoints = Checkpoints(folder / "checkpoints", options.keep, options.keep_every, options.asynchronous)
    step = load_start(cfg, engine, checkpoints, loader)
    record_run(cfg, folder)
    return Run(cfg, folder, engine, method, loader, Schedules(cfg), checkpoints, step)


def build_engine(
    cfg: Config, student: SSLBranch, teacher: SSLBranch, method: Method, device: torch.device
) -> Engine:
    """The engine of `engine.kind`; all but single need a running process group."""
    match cfg.engine.kind:
        case "single":
            kind: type[SingleEngine] = SingleEngine
        case "ddp":
            kind = DdpEngine
        case "fsdp2":
            kind = Fsdp2Engine
        case "deepspeed":
            return build_deepspeed(student, teacher, method, cfg.optim, cfg.engine, device)
    return kind(student, teacher, method, cfg.optim, cfg.engine, device)


def run_loop(run: Run, report: Report, preemption: Preemption) -> None:
    """The training loop: one optimizer step per turn, and what is due after it; the same on every rank."""
    cfg, timer = run.cfg, report.timer
    if run.step == 0 and cfg.log.knn.every:
        report.evaluate(run.step)
    traced = cfg.log.profile_steps if distributed.is_main() else []
    profiler = StepProfiler(run.folder / "tensorboard", traced, run.step)

    watched, collected = Watchdog(run.folder / "stacks", cfg.engine), StepwiseCollector()
    with profiler, watched as watchdog, collected as collector:
        for step, micro_batches in timer.each("data", read_steps(run)):
            values = run.schedules.at(step)
            result, observation = train_step(run, step, values, micro_batches, timer)
            run.step = step + 1
            report.add(result, observation)
            profiler.step(step)

            if due(run, cfg.log.every):
                report.write(run.step, values, observation, run.loader.counters.means())
            if run.step < cfg.run.steps and preemption.agreed(run.step):
                save_checkpoint(run)
                run.checkpoints.finish()
                report.progress.say(f"step {run.step}: {preemption.reason}; saved, start again to continue")
                break
            if due(run, cfg.checkpoint.export_every):
                export_teacher(run)
            with watchdog.paused():
                if due(run, cfg.log.images.every):
                    report.draw(run.step)
                if due(run, cfg.log.artifacts.every):
                    report.look_for_artifacts(run.step)
                if due(run, cfg.log.knn.every):
                    report.evaluate(run.step)
            if due(run, cfg.checkpoint.every):
                save_checkpoint(run)  # last: a run that is killed before it does what is missing once more
            collector.step(run.step)
            watchdog.step()


def read_steps(run: Run) -> Iterator[tuple[int, list[Batch]]]:
    """The loader's steps, each when all ranks have theirs.

    Where a loader fails, all ranks save the run first: between two steps its state is whole.

    Raises:
        InputError, TrainingError: this rank's loader failed.
        PeerError: another rank's did.
    """
    steps = cast(Steps, run.loader.steps(run.step, run.cfg.run.steps))
    try:
        for _ in range(run.step, run.cfg.run.steps):
            item, error = _next_step(steps)
            if distributed.any_rank(item is None):
                save_checkpoint(run)
                raise error or PeerError("another rank cannot read its data")
            assert item is not None, "no rank is without one"
            yield item
    finally:
        steps.close()


def _next_step(steps: Steps) -> tuple[tuple[int, list[Batch]] | None, Exception | None]:
    """The next step, or why there is none."""
    try:
        return next(steps), None
    except (InputError, TrainingError) as error:
        return None, error


def train_step(
    run: Run, step: int, values: StepValues, micro_batches: Sequence[Batch], timer: PhaseTimer
) -> tuple[StepResult, Observation]:
    """One optimizer step over the micro-batches of a global batch."""
    engine, method = run.engine, run.method
    engine.begin_step(step, values)

    with timer.phase("teacher"):
        outputs = share_prototypes(engine.teacher(batch) for batch in micro_batches)
        weights = [batch.mask_weights for batch in micro_batches]
        targets = method.targets(outputs, weights, values.teacher_temp, step)

    losses, last = [], len(micro_batches) - 1
    for i, (batch, target) in enumerate(zip(micro_batches, targets, strict=True)):
        with timer.phase("forward"):
            student = engine.student(batch)
            terms = method.losses(student, target, batch)
        with timer.phase("backward"):
            engine.backward(terms.total / len(micro_batches), last=i == last)
        losses.append(terms.parts)

    with timer.phase("optimizer"):
        every = run.cfg.log.norms_every
        layer_norms = engine.layer_norms() if every and (step + 1) % every == 0 else {}
        result = engine.step()  # a bad step changes nothing: see engines/guard.py
        method.commit(result.good)
        engine.update_teacher(values.momentum)
    seen = targets[-1].let_go()  # rows of K values would stay through the next step
    return result, Observation(losses, layer_norms, student, outputs[-1], seen, micro_batches[-1])


def due(run: Run, every: int) -> bool:
    """Whether something done every `every` steps is due: then, and after the last step."""
    return run.step == run.cfg.run.steps or (every > 0 and run.step % every == 0)


def save_checkpoint(run: Run) -> None:
    """Save all that an exact continuation needs."""
    data, facts = run.loader.state_dict(run.step), run_facts(run.cfg, run.step)
    run.checkpoints.save(run.step, run.engine.state_dict(), data, facts, run.engine.save_native)


def export_teacher(run: Run) -> None:
    """Write the teacher's backbone as a single file, on rank 0; collective."""
    weights = run.engine.full_state_dict("teacher")
    if not distributed.is_main():
        return
    backbone = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    path = run.folder / "exports" / f"teacher_step_{run.step:08d}.safetensors"
    write_export(path, backbone, run.cfg.model, {"branch": "teacher", **run_facts(run.cfg, run.step)})
