"""Rules between settings, and advice on settings that are allowed but doubtful. No torch.

A broken rule is `section.key: what is wrong; the fix`.
"""

import math
from collections.abc import Sequence

from pretrain.config.bounds import check_bounds
from pretrain.config.cluster_checks import cluster_fault
from pretrain.config.deepspeed_extra import extra_fault
from pretrain.config.derived import head_kinds, peak_lr, rmlp_strength, uses_rmlp, vit_shape
from pretrain.config.method_checks import method_faults
from pretrain.config.rmlp_checks import advise_vanishing, rmlp_faults
from pretrain.config.schema import (
    Config,
    DataConfig,
    EngineConfig,
    IbotHeadConfig,
    KnnConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RmlpConfig,
)


def check(cfg: Config) -> None:
    """Refuse settings that are out of range or contradict one another.

    Raises:
        ValueError: `section.key: what is wrong; the fix`.
    """
    check_bounds(cfg)
    for key, fault in method_faults(cfg):  # first: other rules ask for what a method may not have
        _require(False, key, fault)
    _check_model(cfg.model)
    _check_attention(cfg)
    _check_sizes(cfg)
    _check_data(cfg.data)
    _check_channels(cfg.data, cfg.model.in_channels)
    _check_loss(cfg.loss, cfg.data.group_size)
    if cfg.loss.ibot_weight > 0:
        _check_mask(cfg)
    _check_optim(cfg.optim, cfg.run.steps)
    _check_freeze(cfg)
    _check_batch(cfg)
    _check_timeouts(cfg.engine)
    at_once = not (cfg.checkpoint.asynchronous and cfg.engine.kind == "deepspeed")
    _require(at_once, "checkpoint.asynchronous", "engine.kind=deepspeed saves at once; set it to false")
    fault = extra_fault(cfg.engine.deepspeed.extra)
    _require(not fault, "engine.deepspeed.extra", fault)
    if cfg.ibot_head.shared:
        _check_unused_ibot(cfg.ibot_head)
    for key, fault in rmlp_faults(cfg):
        _require(False, key, fault)
    _require(bool(cfg.run.dir.strip()), "run.dir", "is empty; name a folder")
    key, fault = cluster_fault(cfg.cluster)
    _require(not fault, key, fault)
    _check_knn(cfg.log.knn)
    _check_profile_steps(cfg.log.profile_steps)


def warnings(cfg: Config) -> list[str]:
    """Advice on settings that are allowed; one line each."""
    advice = (
        _advise_rmlp_from_scratch,
        _advise_unused_rmlp,
        advise_vanishing,
        _advise_temperatures,
        _advise_knn,
        _advise_frozen_random,
    )
    return [line for advise in advice if (line := advise(cfg))]


def _require(condition: bool, key: str, fault: str) -> None:
    if not condition:
        raise ValueError(f"{key}: {fault}")


def _check_model(model: ModelConfig) -> None:
    for name in ("embed_dim", "depth", "num_heads"):
        value, arch = getattr(model, name), model.arch
        if arch == "custom":
            _require(value is not None, f"model.{name}", "must be given with model.arch=custom")
        else:
            fault = f"model.arch={arch} sets it; remove it or use model.arch=custom"
            _require(value is None, f"model.{name}", fault)
    fault = "test-time registers are for released models at inference, training has none; set it to []"
    _require(not model.register_neurons, "model.register_neurons", fault)
    width, _, heads = vit_shape(model)
    _require(width % heads == 0, "model.num_heads", f"{heads} heads do not divide width {width}; change one")


def _check_attention(cfg: Config) -> None:
    """The kernels that take all crops at once are for GPUs in half precision."""
    name, precision = cfg.model.attention, cfg.engine.precision
    if name not in ("varlen", "xformers"):
        return
    key, fix = "model.attention", "or use model.attention=auto"
    _require(precision == "bf16", key, f"{name} needs engine.precision=bf16, not {precision}; set it, {fix}")
    _require(cfg.engine.device != "cpu", key, f"{name} needs a GPU; set engine.device=auto, {fix}")
    width, _, heads = vit_shape(cfg.model)
    channels = width // heads
    fault = f"{name} takes heads of 8, 16, ... 256 channels, not {channels}; change model.num_heads, {fix}"
    _require(channels % 8 == 0 and channels <= 256, key, fault)


def _check_sizes(cfg: Config) -> None:
    """Images are cut into whole patches."""
    patch = cfg.model.patch_size
    sizes = {
        "model.img_size": cfg.model.img_size,
        "data.global_crops.size": cfg.data.global_crops.size,
        "data.local_crops.size": cfg.data.local_crops.size,
    }
    if cfg.model.img_width is not None:
        sizes["model.img_width"] = cfg.model.img_width
    if cfg.log.knn.train:
        sizes["log.knn.crop"] = cfg.log.knn.crop
    for key, size in sizes.items():
        near = max(size // patch, 1) * patch
        fault = f"{size} px is not a multiple of model.patch_size={patch}; use for example {near}"
        _require(size % patch == 0, key, fault)


def _check_data(data: DataConfig) -> None:
    _check_sources(data)
    _require(bool(data.cache.dir.strip()), "data.cache.dir", "is empty; name a folder")
    window = data.decode.window
    ordered = window is None or (len(window) == 2 and window[0] < window[1])
    _require(ordered, "data.decode.window", f"{window} must be [low, high] with low below high, or null")


def _check_channels(data: DataConfig, in_channels: int) -> None:
    fault = f"{in_channels} is not data.channels={data.channels}; set both to what the images have"
    _require(in_channels == data.channels, "model.in_channels", fault)
    for key, values in {"data.mean": data.mean, "data.std": data.std}.items():
        fault = f"needs {data.channels} values, one a channel, got {values}"
        _require(len(values) == data.channels, key, fault)
    _require(min(data.std) > 0, "data.std", f"must be above 0, got {data.std}")
    augment = data.augment
    colourless = augment.saturation == augment.hue == augment.grayscale_probability == 0
    names = "data.augment.saturation=0 data.augment.hue=0 data.augment.grayscale_probability=0"
    fault = f"only RGB images have colours; with data.channels={data.channels} set {names}"
    _require(data.channels == 3 or colourless, "data.augment.saturation", fault)


def _check_sources(data: DataConfig) -> None:
    nothing = "names no shard; give paths, globs or brace patterns"
    if data.sources:
        both = "is given beside data.sources; set one of the two to []"
        _require(data.shards in ([], DataConfig().shards), "data.shards", both)
    else:
        _require(bool(data.shards), "data.shards", nothing)
        _check_names("data.shards", data.shards)
    for i, source in enumerate(data.sources):
        _require(bool(source.shards), f"data.sources.{i}.shards", nothing)
        _check_names(f"data.sources.{i}.shards", source.shards)
        positive = 0 < source.weight < math.inf
        _require(positive, f"data.sources.{i}.weight", f"must be above 0 and finite, got {source.weight}")


def _check_names(key: str, names: Sequence[str]) -> None:
    _require(all(names), key, "holds an empty name; remove it")


def _check_loss(loss: LossConfig, group_size: int) -> None:
    learns = loss.dino_weight + loss.ibot_weight + loss.koleo_weight > 0
    _require(learns, "loss.dino_weight", "all three loss weights are 0; raise one")
    has_neighbour = loss.koleo_weight == 0 or group_size >= 2
    _require(has_neighbour, "data.group_size", "KoLeo needs two images; raise it, or set loss.koleo_weight=0")


def _check_mask(cfg: Config) -> None:
    """The masked-patch loss has patches to work on."""
    crops, probability = 2 * cfg.data.group_size, cfg.mask.probability
    fault = f"no global crop of a group gets a mask: int({crops} crops x {probability}) is 0"
    fix = "raise it or data.group_size, or set loss.ibot_weight=0"
    _require(int(crops * probability) >= 1, "mask.probability", f"{fault}; {fix}")
    patches = (cfg.data.global_crops.size // cfg.model.patch_size) ** 2
    largest = int(patches * cfg.mask.ratio[1])
    fault = f"{cfg.mask.min_patches} patches do not fit the largest mask, {largest} of {patches} patches"
    _require(cfg.mask.min_patches <= largest, "mask.min_patches", f"{fault}; lower it or raise mask.ratio")


def _check_optim(optim: OptimConfig, steps: int) -> None:
    fault = f"{optim.warmup_steps} is not below run.steps={steps}; shorten the warm-up"
    _require(optim.warmup_steps < steps, "optim.warmup_steps", fault)
    peak = peak_lr(optim)
    fault = f"{optim.min_lr} is above the peak learning rate {peak:.4g}; lower it"
    _require(optim.min_lr <= peak, "optim.min_lr", fault)


def _check_freeze(cfg: Config) -> None:
    """While the backbone is frozen a head trains, and afterwards the backbone does."""
    frozen, start = cfg.optim.freeze_backbone_steps, cfg.rmlp.start_step
    fault = f"{frozen} is not below run.steps={cfg.run.steps}, so the backbone would never train; lower it"
    _require(frozen < cfg.run.steps, "optim.freeze_backbone_steps", fault)
    trains = frozen <= start or head_kinds(cfg) != {"rmlp"}
    fault = f"from rmlp.start_step={start} on no head has weights to train meanwhile; use {start} at most"
    _require(trains, "optim.freeze_backbone_steps", f"{frozen} steps, but {fault}")


def _check_batch(cfg: Config) -> None:
    """Each micro-batch of one device holds whole groups; the number of devices is only known at the start."""
    batch, parts, group = cfg.optim.global_batch_size, cfg.engine.accumulation_steps, cfg.data.group_size
    fault = f"{batch} is not a multiple of engine.accumulation_steps={parts} x data.group_size={group}"
    fix = f"use for example {math.ceil(batch / (parts * group)) * parts * group}"
    _require(batch % (parts * group) == 0, "optim.global_batch_size", f"{fault}; {fix}")


def _check_timeouts(engine: EngineConfig) -> None:
    fault = f"{engine.hang_timeout:g} s is not below engine.timeout={engine.timeout:g}, which ends the run"
    fix = "lower it, or 0 for never"
    _require(engine.hang_timeout < engine.timeout, "engine.hang_timeout", f"{fault}; {fix}")


def _check_unused_ibot(head: IbotHeadConfig) -> None:
    """Settings of a head that is not built would be ignored without a word."""
    default = IbotHeadConfig()
    for name, value in vars(head).items():
        fix = f"set dino_head.{name} for the shared head, or ibot_head.shared=false"
        unused = value != getattr(default, name)
        _require(not unused, f"ibot_head.{name}", f"not used while ibot_head.shared=true; {fix}")


def _check_profile_steps(steps: list[int]) -> None:
    ordered = not steps or (len(steps) == 2 and 0 <= steps[0] < steps[1])
    _require(ordered, "log.profile_steps", f"{steps} must be empty or [first, last] with first below last")


def _check_knn(knn: KnnConfig) -> None:
    _check_names("log.knn.train", knn.train)
    _check_names("log.knn.test", knn.test)
    missing = "log.knn.test" if knn.train else "log.knn.train"
    fault = "k-NN needs train and test shards; give both or none"
    _require(bool(knn.train) == bool(knn.test), missing, fault)
    fault = f"{knn.crop} px is larger than log.knn.resize={knn.resize}; lower it"
    _require(knn.crop <= knn.resize, "log.knn.crop", fault)


def _advise_rmlp_from_scratch(cfg: Config) -> str:
    has_start = cfg.rmlp.start_step > 0 or cfg.model.init_from or cfg.checkpoint.resume_from
    mixes_at_once = "mix" in head_kinds(cfg) and rmlp_strength(cfg, 0).mix > 0
    if has_start or not ("rmlp" in head_kinds(cfg) or mixes_at_once):
        return ""
    if mixes_at_once:
        return (
            "rmlp.mix: a mixture does not learn from random weights (measured with configs/demo.yaml, k-NN "
            "of the CLS token: random init 38.0 %, a share of 0.5 33.8 %, from 0 to 0.5 68.0 %, an MLP head "
            "68.5 %); set model.init_from to a trained export, rmlp.start_step, or mix=0 and mix_end"
        )
    return (
        "dino_head.kind: RMLP heads do not learn from random weights (measured on digits as 32-px images, "
        "k-NN of the CLS token: random init 41.8 %, RMLP alone 38.8 %, an MLP head 75.8 %); "
        "set model.init_from to a trained export, or rmlp.start_step"
    )


def _advise_unused_rmlp(cfg: Config) -> str:
    changed = [name for name, value in vars(cfg.rmlp).items() if value != getattr(RmlpConfig(), name)]
    if uses_rmlp(cfg) or not changed:
        return ""
    return f"rmlp.{changed[0]}: has no effect, no head is randomized; set dino_head.kind=rmlp"


def _advise_temperatures(cfg: Config) -> str:
    if max(cfg.teacher.warmup_temp, cfg.teacher.temp) < cfg.loss.student_temp:
        return ""
    return "teacher.temp: not below loss.student_temp, so targets are no sharper than what the student says"


def _advise_knn(cfg: Config) -> str:
    if not cfg.log.knn.every or cfg.log.knn.train:
        return ""
    return "log.knn.every: has no effect without log.knn.train and log.knn.test"


def _advise_frozen_random(cfg: Config) -> str:
    if not cfg.optim.freeze_backbone_steps or cfg.model.init_from or cfg.checkpoint.resume_from:
        return ""
    return "optim.freeze_backbone_steps: freezes random weights; set model.init_from, or 0"
