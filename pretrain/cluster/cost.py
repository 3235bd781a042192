"""What a run will take, before it is paid for."""

from datetime import timedelta

from pretrain.cluster.layout import tasks_per_node, world_size
from pretrain.config.schema import Config


def estimate(cfg: Config, steps_done: int) -> str:
    """A line with images, and with time and device-hours where a speed is known.

    Args:
        cfg: with `cluster.images_per_s`, the measured speed of one device, or without.
        steps_done: by earlier jobs.
    """
    steps = max(cfg.run.steps - steps_done, 0)
    images = steps * cfg.optim.global_batch_size
    work = f"{steps:,} steps x {cfg.optim.global_batch_size:,} images = {images:,} images"
    on = f"{world_size(cfg.cluster)} {_devices(cfg)}"
    speed = cfg.cluster.images_per_s
    if speed is None:
        return f"{work} on {on}; for the hours give --images-per-s, measured on one of them"
    seconds = images / (speed * world_size(cfg.cluster))
    hours = seconds / 3600 * world_size(cfg.cluster)
    return (
        f"{work} on {on} at {speed:g} images/s each: {hours:,.1f} {_unit(cfg)}, {duration(seconds)} "
        "if the speed is that of one of them times their number, without k-NN, saves and waiting"
    )


def duration(seconds: float) -> str:
    """Such as `2 days, 3:04:00`."""
    try:
        return str(timedelta(seconds=round(seconds)))
    except OverflowError:
        return "for ever"


def _devices(cfg: Config) -> str:
    one = world_size(cfg.cluster) == 1
    if cfg.cluster.gpus_per_node and cfg.cluster.gpus_per_node == tasks_per_node(cfg.cluster):
        return "GPU" if one else "GPUs"
    return "process" if one else "processes"


def _unit(cfg: Config) -> str:
    return "GPU-hours" if _devices(cfg).startswith("GPU") else "process-hours"
