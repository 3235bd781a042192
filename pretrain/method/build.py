"""The method of `method.kind`."""

from pretrain.config.schema import Config
from pretrain.method.base import Method
from pretrain.method.dinov2 import DinoV2
from pretrain.method.swav import Swav


def build_method(cfg: Config) -> Method:
    """Targets and losses of a run, with nothing taken in yet."""
    match cfg.method.kind:
        case "dinov2":
            return DinoV2(cfg)
        case "swav":
            return Swav(cfg)
