"""Rules for a method: settings of another one's parts would be ignored without a word. No torch."""

from collections.abc import Iterator

from pretrain.config.derived import head_kinds, uses_rmlp
from pretrain.config.schema import Config

Faults = Iterator[tuple[str, str]]


def method_faults(cfg: Config) -> Faults:
    """The keys that cannot be used with `method.kind`, each with the reason and the fix."""
    match cfg.method.kind:
        case "dinov2":
            if cfg.method.queue:
                yield "method.queue", "DINOv2 has no queue; set it to 0, or method.kind=swav"
        case "swav":
            yield from _swav_faults(cfg)
            yield from _queue_faults(cfg)
    if cfg.method.queue_start_step and not cfg.method.queue:
        yield "method.queue_start_step", "not used without method.queue; set it to 0"


def _swav_faults(cfg: Config) -> Faults:
    if cfg.loss.centering != "sinkhorn":
        yield "loss.centering", f"{cfg.loss.centering} is not SwAV's; its codes need sinkhorn"
    for name in ("momentum", "final_momentum"):
        if value := getattr(cfg.teacher, name):
            fault = f"{value}, but with method.kind=swav the student is its own target network; set it to 0"
            yield f"teacher.{name}", fault
    for section, name in (("loss", "ibot_weight"), ("mask", "probability")):
        if value := getattr(getattr(cfg, section), name):
            yield f"{section}.{name}", f"{value}, but SwAV has no loss on masked patches; set it to 0"
    if not cfg.ibot_head.shared:
        yield "ibot_head.shared", "SwAV has no loss on patches and one head; set it to true"
    trainable = head_kinds(cfg) != {"rmlp"} or cfg.rmlp.start_step > 0
    if trainable and not cfg.dino_head.norm_last_layer:
        yield "dino_head.norm_last_layer", "SwAV's prototypes have length 1; set it to true"
    if uses_rmlp(cfg) and not cfg.rmlp.share_dino_ibot:
        yield "rmlp.share_dino_ibot", "a draw of their own for patches, which have no loss; set it to true"


def _queue_faults(cfg: Config) -> Faults:
    images, batch = cfg.method.queue, cfg.optim.global_batch_size
    if images % batch:
        fault = f"{images} images are not whole batches of optim.global_batch_size={batch}"
        yield "method.queue", f"{fault}; use for example {max(round(images / batch), 1) * batch}"
    if images and uses_rmlp(cfg):
        fault = "features of earlier steps belong to other draws of a randomized head; set it to 0"
        yield "method.queue", fault
