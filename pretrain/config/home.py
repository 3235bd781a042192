"""Paths that begin with `~/`: a shell leaves them as they are behind `run.dir=`."""

import os.path
from dataclasses import replace

from pretrain.config.schema import Config


def expand_home(cfg: Config) -> Config:
    """The config with the folder of its person in `run.dir`, `model.init_from` and `checkpoint.resume_from`.

    Shards and the cache are expanded where they are opened: a config that is read on another machine finds
    its own.
    """
    return replace(
        cfg,
        run=replace(cfg.run, dir=_expanded(cfg.run.dir)),
        model=replace(cfg.model, init_from=_expanded(cfg.model.init_from)),
        checkpoint=replace(cfg.checkpoint, resume_from=_expanded(cfg.checkpoint.resume_from)),
    )


def _expanded(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~/") else path  # noqa: PTH111  (keeps a leading ./)
