"""The activation checkpointing and accumulation that make a step fastest within the memory, by estimate.

Measured are trials of the recipe's own checkpointing, up to the largest size that was run, and what the
blocks keep under each other one (`engines/kept_memory.py`). Everything else follows from these numbers:

    peak    the trial's, in proportion to the images, with the blocks' share exchanged; smaller sizes keep at
            least what a line through two trials says, because part of a peak does not shrink with the images
    time    a + b n of a forward of n images, from two trials (a = 0 from one); computing the blocks again
            takes the backbone's share of the measured forward, and for selective a part of that
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pretrain.config.schema import Config, Recomputed
from pretrain.run.flops import flops_per_image
from pretrain.run.footprint import Footprint, crop_bytes
from pretrain.run.trial import Trial

# Of full's time to compute blocks again. On a CPU 0.1 at most in fp32, 0.5 to 1.1 in bf16
# (benchmarks/results/2026-11-28-checkpointing.md); not measured on a GPU.
SELECTIVE = 0.5
MARGIN = 0.02  # a gain below that is not worth a change: the trials do not resolve it
USABLE = 0.9  # of the free memory

Kept = Mapping[Recomputed, float]  # most bytes of an image that the blocks keep at once


@dataclass(frozen=True)
class Estimate:
    """A setting and what it would take."""

    checkpointing: Recomputed
    accumulation: int  # micro-batches of a step
    peak: int  # bytes
    seconds: float  # of a step

    def __str__(self) -> str:
        """As overrides of the command line."""
        mode, steps = self.checkpointing, self.accumulation
        return f"engine.activation_checkpointing={mode} engine.accumulation_steps={steps}"


@dataclass(frozen=True)
class Choice:
    """What of all estimates is advised."""

    best: Estimate | None  # that fits
    own: Estimate  # the recipe's
    smallest: Estimate
    tried: int


def choose(cfg: Config, trials: Sequence[Trial], kept: Kept, memory: Footprint, free: int) -> Choice:
    """The fastest setting that fits into `USABLE` of `free` bytes, on one device.

    Args:
        cfg: the recipe.
        trials: of the recipe's checkpointing, smallest first.
        kept: by checkpointing, those to choose from; the recipe's is among them.
        memory: of the run's state.
        free: bytes before anything was built.
    """
    found = [_estimate(cfg, trials, kept, memory, mode, n) for mode in kept for n in _accumulations(cfg)]
    mode, count = cfg.engine.activation_checkpointing, cfg.engine.accumulation_steps
    own = next(e for e in found if (e.checkpointing, e.accumulation) == (mode, count))
    fitting = [e for e in found if e.peak <= USABLE * free]
    best = min(fitting, key=lambda e: (e.seconds, e.accumulation, e.peak), default=None)
    if best and own in fitting and own.seconds <= best.seconds * (1 + MARGIN):
        best = own
    return Choice(best, own, min(found, key=lambda e: e.peak), len(found))


def can_choose(cfg: Config) -> bool:
    """Whether there is another checkpointing to choose.

    Compiled blocks keep what the compiler decides, and DeepSpeed's engine has no checkpointing of ours.
    """
    return not cfg.engine.compile and cfg.engine.kind != "deepspeed"


def _accumulations(cfg: Config) -> list[int]:
    """Micro-batches of a step on one device, each of whole groups."""
    groups = cfg.optim.global_batch_size // cfg.data.group_size
    return [steps for steps in range(1, groups + 1) if groups % steps == 0]


def _estimate(
    cfg: Config, trials: Sequence[Trial], kept: Kept, memory: Footprint, mode: Recomputed, count: int
) -> Estimate:
    images, own = cfg.optim.global_batch_size // count, cfg.engine.activation_checkpointing
    grown = _activations(trials, images) + images * (kept[mode] - kept[own])
    activations = int(max(grown, images * kept[mode]))
    base = memory.total - (memory.branch if count == 1 else 0)
    waiting = crop_bytes(cfg) * images * (count - 1)
    peak = max(base + activations, memory.total) + waiting
    forward, per_image = _time_of_forward(trials)
    again = _recomputation(cfg, trials[-1])
    per_image = max(per_image + again[mode] - again[own], 0.0)
    return Estimate(mode, count, peak, count * (forward + images * per_image) + trials[-1].once)


def _activations(trials: Sequence[Trial], images: int) -> float:
    """Bytes of the activations with the recipe's checkpointing."""
    last = trials[-1]
    proportional = images * last.activations / last.images
    if len(trials) == 1 or images >= last.images:
        return proportional
    before = trials[-2]
    slope = (last.activations - before.activations) / (last.images - before.images)
    return max(proportional, last.activations - max(slope, 0.0) * (last.images - images))


def _time_of_forward(trials: Sequence[Trial]) -> tuple[float, float]:
    """Seconds of a forward, teacher and backward by themselves, and of each image in them."""
    last = trials[-1]
    if len(trials) == 1:
        return 0.0, last.per_image
    before = trials[-2]
    n, m = before.images, last.images
    alone = n * m * (before.per_image - last.per_image) / (m - n)
    alone = min(max(alone, 0.0), m * last.per_image)
    return alone, last.per_image - alone / m


def _recomputation(cfg: Config, trial: Trial) -> dict[Recomputed, float]:
    """Seconds an image that a backward pass takes to compute the blocks again."""
    work = flops_per_image(cfg)
    full = trial.per_image * trial.forward_share() * work.backbone / sum(work)
    return {"none": 0.0, "selective": SELECTIVE * full, "full": full}
