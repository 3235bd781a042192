"""`--dry-run`: what a run needs and how long it takes, from a few steps on noise.

Reads no data and writes nothing. Model, method and engine are those of training; loader, checkpoints and logs
are left out. A micro-batch that would not fit the memory or take too long is replaced by a smaller one, and
the table says so.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pretrain import distributed
from pretrain.batch import Batch
from pretrain.config.derived import micro_batch_size, shard_settings
from pretrain.config.schema import Config, Recomputed
from pretrain.data.remote import is_remote
from pretrain.data.shards import shard_names
from pretrain.data.synthetic import noise_batch
from pretrain.dry_run_table import (
    caution_rows,
    choice_rows,
    model_rows,
    recipe_rows,
    size_text,
    step_rows,
)
from pretrain.engines.kept_memory import kept_memory
from pretrain.engines.single import SingleEngine
from pretrain.errors import InputError
from pretrain.optim.schedules import Schedules
from pretrain.run.ceiling import matrix_ceiling
from pretrain.run.fastest_setting import USABLE, Kept, can_choose, choose
from pretrain.run.flops import flops_per_image
from pretrain.run.footprint import Footprint, crop_bytes, footprint, peak_memory, used_memory
from pretrain.run.profiling import PhaseTimer
from pretrain.run.trial import PER_STEP, Trial
from pretrain.session import pick_device
from pretrain.start import build_branches, fill_weights

STEPS = 3  # of each size; the first is warm-up
MAX_SECONDS = 30.0  # of a measured step
MAX_MICRO_BATCHES = 2  # of a measured step; more of them would repeat the second
MODES: tuple[Recomputed, ...] = ("none", "selective", "full")


def dry_run(cfg: Config) -> int:
    """Build everything, run a few steps on noise, print what they say about the recipe; returns 0.

    Raises:
        InputError: the model's state or its smallest step does not fit the memory.
    """
    device = pick_device(cfg.engine.device)
    cfg = _without_missing_export(cfg)
    _say(_shards_line(cfg))
    memory = _refuse_impossible(cfg, device)
    dtype = torch.bfloat16 if cfg.engine.precision == "bf16" else torch.float32
    _say("measuring the device's matrix products")
    ceiling = matrix_ceiling(device, dtype)
    free = distributed.free_memory(device)
    trainer, trials, note = _measure(cfg, device, memory, free)
    choice = choose(cfg, trials, _kept(cfg, trainer, trials[-1]), memory, free)
    rows = [
        *model_rows(cfg, device, memory),
        *step_rows(cfg, device, trials[-1], note),
        *recipe_rows(cfg, trials[-1], ceiling),
        *choice_rows(cfg, choice, trials, free),
        *caution_rows(device),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(["", *(f"{name:{width}}  {text}" for name, text in rows)]))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _without_missing_export(cfg: Config) -> Config:
    """The config with random weights where `model.init_from` does not exist (yet); says which it is."""
    path = cfg.model.init_from
    if not path:
        return cfg
    if Path(path).exists():
        _say(f"model.init_from: {path} exists")
        return cfg
    _say(f"model.init_from: {path} does not exist; random weights take its place here")
    return replace(cfg, model=replace(cfg.model, init_from=""))


def _shards_line(cfg: Config) -> str:
    settings = shard_settings(cfg.data)
    try:
        names = [name for key, patterns in settings.items() for name in shard_names(patterns, key)]
    except InputError as error:
        return f"{error}; noise takes their place here"
    remote = sum(map(is_remote, names))
    found = f"{len(names) - remote} shards exist" + (
        f", {remote} are remote (not looked at)" if remote else ""
    )
    return f"{', '.join(settings)}: {found}; noise takes their place here"


def _refuse_impossible(cfg: Config, device: torch.device) -> Footprint:
    """The memory that the run's state takes."""
    memory, free = footprint(cfg), distributed.free_memory(device)
    if memory.total > free:
        raise InputError(
            f"model.arch={cfg.model.arch}: weights, gradients, AdamW's moments and teacher take "
            f"{size_text(memory.total)}, {size_text(free)} are free; choose a smaller model or a larger "
            "device"
        )
    return memory


class Trainer:
    """Student, teacher, method and engine as in training, and one training step."""

    def __init__(self, cfg: Config, device: torch.device, images: int) -> None:
        student, teacher, self.method = build_branches(cfg, device, images)
        fill_weights(cfg, student, teacher)
        self.engine = SingleEngine(student, teacher, self.method, cfg.optim, cfg.engine, device)
        self.schedules = Schedules(cfg)

    def step(self, number: int, batches: Sequence[Batch], timer: PhaseTimer) -> float:
        """What `train.run_loop` does in a step, in its order; the loss."""
        engine, method, values = self.engine, self.method, self.schedules.at(number)
        with timer.phase("draw"):
            engine.begin_step(number, values)
        with timer.phase("teacher"):
            outputs = [engine.teacher(batch) for batch in batches]
            weights = [batch.mask_weights for batch in batches]
            targets = method.targets(outputs, weights, values.teacher_temp, number)
        losses = []
        for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            with timer.phase("forward"):
                terms = method.losses(engine.student(batch), target, batch)
            with timer.phase("backward"):
                engine.backward(terms.total / len(batches), last=i == len(batches) - 1)
            losses.append(terms.parts["total"])
        with timer.phase("optimizer"):
            method.commit(engine.step().good)
            engine.update_teacher(values.momentum)
        return torch.stack(losses).mean().item()


def _measure(
    cfg: Config, device: torch.device, memory: Footprint, free: int
) -> tuple[Trainer, list[Trial], str]:
    """Trials of `_sizes` as far as they can be run, and why the next cannot ("" at the recipe's own)."""
    before, sizes = used_memory(device), _sizes(cfg)
    _say("building student, teacher and optimizer")
    trainer, trials = Trainer(cfg, device, sizes[0]), list[Trial]()
    for images in sizes:
        if trials and (refusal := _refusal(cfg, trials[-1], images, free)):
            return trainer, trials, refusal
        try:
            trials.append(_try(trainer, cfg, images, memory, before))
        except torch.OutOfMemoryError as error:
            if not trials:
                raise InputError(f"model.arch={cfg.model.arch}: the device's memory is too small") from error
            return trainer, trials, f"{images:,} do not fit the memory: raise engine.accumulation_steps"
    return trainer, trials, ""


def _kept(cfg: Config, trainer: Trainer, trial: Trial) -> Kept:
    """Bytes of an image that the blocks keep, for each checkpointing that the engine could have."""
    if not can_choose(cfg):
        return {cfg.engine.activation_checkpointing: 0.0}
    images = min(trial.images, cfg.data.group_size)
    small = replace(cfg, data=replace(cfg.data, group_size=images))
    kept = kept_memory(trainer.engine, next(_batches(small, trainer.engine.device, images, 1)))
    return {mode: kept.peak(mode) / images for mode in MODES}


def _sizes(cfg: Config) -> list[int]:
    """Images in a forward: the fewest with a neighbour and a mask, one group, the configured micro-batch."""
    group, micro_batch = cfg.data.group_size, micro_batch_size(cfg, distributed.world_size())
    fewest = next((n for n in range(2, group) if int(2 * n * cfg.mask.probability) >= 1), group)
    return sorted({fewest, group, micro_batch})


def _refusal(cfg: Config, trial: Trial, images: int, free: int) -> str:
    """Why a larger size is not tried, or nothing."""
    need, seconds = trial.bytes(images), trial.seconds(images * trial.micro_batches)
    waiting = crop_bytes(cfg) * max(cfg.optim.global_batch_size - images * trial.micro_batches, 0)
    if need + waiting > USABLE * free:
        hint = ": raise engine.accumulation_steps" if images > cfg.data.group_size else ""
        return f"{images:,} would take about {size_text(need + waiting)}, {size_text(free)} are free{hint}"
    return f"{images:,} would take about {seconds:,.0f} s a step" if seconds > MAX_SECONDS else ""


def _try(trainer: Trainer, cfg: Config, images: int, memory: Footprint, before: int) -> Trial:
    """Run `STEPS` steps with that many images in a forward; `before` bytes were in use before the model."""
    device = trainer.engine.device
    small = replace(cfg, data=replace(cfg.data, group_size=min(images, cfg.data.group_size)))
    count = min(cfg.engine.accumulation_steps, MAX_MICRO_BATCHES)
    batches = list(_batches(small, device, images, count))
    timer, steps = PhaseTimer(device), []
    for number in range(STEPS):
        loss = trainer.step(number, batches, timer)
        steps.append(timer.means())
        seconds = sum(steps[-1].values())
        _say(f"step {number + 1} of {STEPS} with {count} x {images} images: {seconds:.2f} s, loss {loss:.2f}")
    phases = {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}
    growing = sum(seconds for name, seconds in phases.items() if name not in PER_STEP)
    work = sum(flops_per_image(cfg)) / sum(flops_per_image(small))  # few images round masks and drop path
    peak, base = peak_memory(device), memory.total - (memory.branch if count == 1 else 0)
    return Trial(
        images=images,
        micro_batches=count,
        phases=phases,
        per_image=work * growing / (count * images),
        state=memory.total,
        base=base,
        activations=max(peak - before - base, 0),
        peak=peak,
    )


def _batches(cfg: Config, device: torch.device, images: int, count: int) -> Iterator[Batch]:
    """Micro-batches as the loader hands them over."""
    for i in range(count):
        yield noise_batch(cfg, images, i * images).to(device)
