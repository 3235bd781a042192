"""The table that a dry run ends with: pairs of a name and what was measured, counted or estimated."""

import os
from collections.abc import Iterator, Sequence

import torch

from pretrain import distributed
from pretrain.config.derived import micro_batch_size, vit_shape
from pretrain.config.schema import Config
from pretrain.run.fastest_setting import SELECTIVE, USABLE, Choice, can_choose
from pretrain.run.flops import flops_per_image
from pretrain.run.footprint import Footprint, crop_bytes
from pretrain.run.trial import Trial

BUSY = 1.5  # times the cores; the step itself makes for a load of 1
GIB = 2**30

Row = tuple[str, str]


def model_rows(cfg: Config, device: torch.device, memory: Footprint) -> Iterator[Row]:
    """Device, model, and the memory of the run's state."""
    model, shape, data = cfg.model, vit_shape(cfg.model), cfg.data
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    yield "device", f"{name}; {cfg.engine.precision}, torch {torch.__version__}"
    crops = f"2 crops of {data.global_crops.size} px, {data.local_crops.number} of {data.local_crops.size} px"
    size = f"width {shape.embed_dim}, {shape.depth} blocks, {shape.num_heads} heads, patch {model.patch_size}"
    yield "architecture", f"{model.arch}: {size}; {crops}"
    drawn = f"; {memory.drawn / 1e6:.1f} M weights drawn a step" if memory.drawn else ""
    yield "parameters", f"backbone {memory.backbone / 1e6:.1f} M, heads {memory.heads / 1e6:.1f} M{drawn}"
    parts = f"student {size_text(memory.branch)}, its gradients as much, AdamW {size_text(memory.optimizer)}"
    yield "memory, computed", f"{size_text(memory.total)}: {parts}, teacher {size_text(memory.branch)}"


def step_rows(cfg: Config, device: torch.device, trial: Trial, note: str) -> Iterator[Row]:
    """What the largest trial took; `note` says why no larger one was run."""
    count, images = cfg.engine.accumulation_steps, micro_batch_size(cfg, distributed.world_size())
    what = "tensors" if device.type == "cuda" else "the process"
    waiting = crop_bytes(cfg) * images * (count - trial.micro_batches)
    more = f"; the crops of the micro-batches not run take {size_text(waiting)} more" if waiting else ""
    yield "memory, peak", f"{size_text(trial.peak)} ({what}){more}"
    measured = f"{trial.micro_batches} x {trial.images:,} images a step; the recipe has {count} x {images:,}"
    yield "measured", f"{measured} ({note})" if note else measured
    parts = ", ".join(f"{name} {seconds:.2g}" for name, seconds in trial.phases.items())
    yield "seconds per step", f"{sum(trial.phases.values()):.3g}: {parts}"


def recipe_rows(cfg: Config, trial: Trial, ceiling: float) -> Iterator[Row]:
    """A step and all steps of the recipe, held to `ceiling`, operations per second of matrix products."""
    images, work = cfg.optim.global_batch_size, flops_per_image(cfg)
    seconds = trial.seconds(images)
    rate = images / seconds
    scaled = "" if images == trial.micro_batches * trial.images else " in proportion"
    yield "the recipe's step", f"{images:,} images in {_number(seconds)} s{scaled}: {_number(rate)} images/s"
    yield "matrix ceiling", f"{ceiling / 1e12:.3g} TFLOP/s, the fastest torch.mm in {cfg.engine.precision}"
    heads = f"{100 * work.heads / sum(work):.1f} % of it in the heads"
    yield "useful work", f"{sum(work) / 1e12:.4g} TFLOP per image, {heads}"
    yield "share of ceiling", f"{100 * sum(work) * rate / ceiling:.1f} %"
    total = cfg.run.steps * seconds
    yield "the recipe", f"{cfg.run.steps:,} steps: {_duration(total)}, {total / 3600:,.1f} device-hours here"
    later = f", the randomized heads from step {cfg.rmlp.start_step:,} on" if cfg.rmlp.start_step else ""
    yield "not included", f"reading and augmenting images, checkpoints, logs, k-NN{later}"


def choice_rows(cfg: Config, choice: Choice, trials: Sequence[Trial], free: int) -> Iterator[Row]:
    """The fastest setting that fits, and what of it is measured."""
    best, own, by = choice.best, choice.own, f"of {choice.tried} by estimate"
    if best is None:
        least = f"{choice.smallest} takes about {size_text(choice.smallest.peak)}, {size_text(free)} are free"
        lower = (
            "data.group_size, data.local_crops.number, the heads' prototypes or rmlp.outputs, or model.arch"
        )
        yield "fits", f"none {by}: {least}; lower {lower}"
    else:
        sizes = f"(estimated peak {size_text(best.peak)} of {size_text(free)} free)"
        if best == own:
            yield "fits", f"{best} {sizes}: the recipe's own, the fastest {by}"
        else:
            yield "fits", f"{best} {sizes}; fastest {by}; {_gain(choice, free)}"
    yield "estimated from", _origin(cfg, trials)


def _gain(choice: Choice, free: int) -> str:
    """What the advised setting has over the recipe's own."""
    best, own = choice.best, choice.own
    assert best is not None
    if own.peak > USABLE * free:
        return f"the recipe's own, {own}, would take about {size_text(own.peak)}"
    gain = 100 * (1 - best.seconds / own.seconds)
    return f"about {gain:.0f} % less time a step than the recipe's own, {own}"


def _origin(cfg: Config, trials: Sequence[Trial]) -> str:
    """What was measured and what was not."""
    sizes = " and ".join(f"{trial.images:,}" for trial in trials[-2:])
    mode = cfg.engine.activation_checkpointing
    measured = f"measured: time and peak with {sizes} images in a forward and {mode}, on one device"
    if not can_choose(cfg):
        why = "engine.compile" if cfg.engine.compile else "engine.kind=deepspeed"
        return f"{measured}; other checkpointing left out because of {why}"
    again = f"its time from the forward's, for selective {SELECTIVE:.2g} of full's (assumed)"
    counted = "counted: what blocks keep with other checkpointing"
    return f"{measured}; {counted}; {again}; no other setting was run"


def caution_rows(device: torch.device) -> Iterator[Row]:
    """Other work on the same cores shows in every time above."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if device.type == "cpu" and load > BUSY * cores:
        yield "caution", f"the machine is busy (load {load:.1f} on {cores} cores); an idle one is faster"


def size_text(count: int) -> str:
    """Bytes in GiB, or below one in MiB."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.0f} MiB"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """Days, hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 1440} d {minutes // 60 % 24} h {minutes % 60} min"
