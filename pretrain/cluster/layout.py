"""How a run lies on machines: processes, cores, and paths that are valid from everywhere."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from braceexpand import braceexpand

from pretrain.config.schema import ClusterConfig, Config
from pretrain.data.remote import is_remote, local_path
from pretrain.errors import InputError


def user_file() -> Path:
    """A person's defaults for section cluster."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "pretrain" / "cluster.yaml"


def tasks_per_node(cluster: ClusterConfig) -> int:
    """Processes on a machine."""
    return cluster.tasks_per_node or max(cluster.gpus_per_node, 1)


def world_size(cluster: ClusterConfig) -> int:
    """Processes of the job."""
    return cluster.nodes * tasks_per_node(cluster)


def cpus_per_task(cfg: Config) -> int:
    """Cores of a process: its loader's workers, itself, and one for what the system does."""
    return cfg.cluster.cpus_per_task or cfg.data.workers + 2


def fitted(cfg: Config) -> tuple[Config, list[str]]:
    """The config for as many devices as section cluster asks for, and what had to change.

    Configs are written for one device. On several, `engine.kind=single` becomes ddp, and fewer forwards make
    up a step: no device gets more images at once than the one was to get. Both change nothing but rounding.

    Raises:
        InputError: the global batch cannot be spread over so many devices.
    """
    devices, engine = world_size(cfg.cluster), cfg.engine
    if devices == 1:
        return cfg, []
    kind = "ddp" if engine.kind == "single" else engine.kind
    new = replace(engine, kind=kind, accumulation_steps=_accumulation(cfg, devices))
    changed = [name for name in ("kind", "accumulation_steps") if getattr(new, name) != getattr(engine, name)]
    lines = [f"engine.{name}: {getattr(engine, name)} -> {getattr(new, name)}" for name in changed]
    return replace(cfg, engine=new), [f"{line}, for {devices} devices" for line in lines]


def _accumulation(cfg: Config, devices: int) -> int:
    """Forwards per step: as given where that fits, else the fewest with no more images at once."""
    batch, group, given = cfg.optim.global_batch_size, cfg.data.group_size, cfg.engine.accumulation_steps
    groups, rest = divmod(batch, devices * group)  # of a device in a step
    if rest == 0 and groups % given == 0:
        return given
    if rest or not groups:
        most = batch // group
        raise InputError(
            f"optim.global_batch_size={batch} in groups of data.group_size={group} cannot be spread over "
            f"{devices} devices: the number of groups, {most}, must be a multiple of {devices}; change "
            "one of the three"
        )
    at_once = batch // given // group  # groups in a forward of one device
    return next(steps for steps in range(1, groups + 1) if groups % steps == 0 and groups // steps <= at_once)


def job_name(cfg: Config) -> str:
    """What lists of jobs show."""
    return cfg.cluster.name or Path(cfg.run.dir).resolve().name


def with_absolute_paths(cfg: Config) -> Config:
    """The config with absolute paths: a job starts in another folder than the one it was sent from."""
    knn, images, artifacts = cfg.log.knn, cfg.log.images, cfg.log.artifacts
    knn = replace(knn, train=_shards(knn.train), test=_shards(knn.test))
    sources = [replace(source, shards=_shards(source.shards)) for source in cfg.data.sources]
    cache = replace(cfg.data.cache, dir=_path(cfg.data.cache.dir))
    return replace(
        cfg,
        run=replace(cfg.run, dir=_path(cfg.run.dir)),
        model=replace(cfg.model, init_from=_path(cfg.model.init_from)),
        data=replace(cfg.data, shards=_shards(cfg.data.shards), sources=sources, cache=cache),
        checkpoint=replace(cfg.checkpoint, resume_from=_path(cfg.checkpoint.resume_from)),
        log=replace(
            cfg.log,
            knn=knn,
            images=replace(images, shards=_shards(images.shards)),
            artifacts=replace(artifacts, shards=_shards(artifacts.shards)),
        ),
    )


def _path(name: str) -> str:
    """A home folder stays as it is: it may be another one where the job runs, and it is meant to be."""
    return str(Path(name).absolute()) if name and not name.startswith("~") else name


def _shards(patterns: Sequence[str]) -> list[str]:
    """Braces and wildcards mean the same behind a folder."""
    return [name for pattern in patterns for name in _shard_patterns(pattern)]


def _shard_patterns(pattern: str) -> list[str]:
    if is_remote(pattern):
        return [pattern]
    path = local_path(pattern)
    if path.startswith("{"):  # alternatives, each a path of its own, as {train,/other/val}.tar
        return [_path(name) for name in braceexpand(path)]
    return [_path(path)]
