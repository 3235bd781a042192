"""Each rule between settings refuses its breach with the key and the fix, and lets its neighbours pass."""

from pathlib import Path

import pytest

from pretrain.config.bounds import BOUNDS, RANGES, numbers
from pretrain.config.checks import warnings
from pretrain.config.keys import settings
from pretrain.config.load import ConfigError, load_config
from pretrain.config.schema import Config

CONFIGS = Path(__file__).parents[2] / "configs"
RMLP = ("dino_head.kind=rmlp",)
INDEPENDENT = (*RMLP, "rmlp.schedule=linear")
PURE = (
    *(*RMLP, "rmlp.identity=false", "rmlp.share_student_teacher=true", "rmlp.resample_every=0"),
    "model.init_from=a.safetensors",
)
MIX = ("dino_head.kind=mix", "rmlp.outputs=65536")
GREY = (
    *("data.channels=1", "model.in_channels=1", "data.mean=0.5", "data.std=0.2", "data.augment.hue=0"),
    *("data.augment.saturation=0", "data.augment.grayscale_probability=0"),
)
SWAV = (
    *("method.kind=swav", "loss.centering=sinkhorn", "loss.ibot_weight=0", "mask.probability=0"),
    *("teacher.momentum=0", "teacher.final_momentum=0", "dino_head.norm_last_layer=true"),
)
CUSTOM = ("model.arch=custom", "model.embed_dim=96", "model.depth=4", "model.num_heads=3")


def load(*overrides: str) -> Config:
    return load_config(CONFIGS / "base.yaml", overrides)


REFUSED = [
    (["method.queue=2048"], "method.queue: DINOv2 has no queue; set it to 0, or method.kind=swav"),
    (["method.queue_start_step=9"], "method.queue_start_step: not used without method.queue; set it to 0"),
    ([*SWAV, "loss.centering=softmax"], "loss.centering: softmax is not SwAV's; its codes need sinkhorn"),
    ([*SWAV, "teacher.momentum=0.9"], "teacher.momentum: 0.9, but with method.kind=swav the student is"),
    ([*SWAV, "teacher.final_momentum=1"], "teacher.final_momentum: 1.0, but with method.kind=swav"),
    ([*SWAV, "loss.ibot_weight=1"], "loss.ibot_weight: 1.0, but SwAV has no loss on masked patches"),
    ([*SWAV, "mask.probability=0.5"], "mask.probability: 0.5, but SwAV has no loss on masked patches"),
    ([*SWAV, "ibot_head.shared=false"], "ibot_head.shared: SwAV has no loss on patches and one head"),
    (
        [*SWAV, "dino_head.norm_last_layer=false"],
        "dino_head.norm_last_layer: SwAV's prototypes have length 1; set it to true",
    ),
    (
        [*SWAV, "dino_head.kind=rmlp", "dino_head.norm_last_layer=false"],
        "rmlp.share_dino_ibot: a draw of their own for patches, which have no loss; set it to true",
    ),
    (
        [*SWAV, "method.queue=3000"],
        "method.queue: 3000 images are not whole batches of optim.global_batch_size=2048; use for",
    ),
    (
        [*SWAV, "method.queue=2048", "dino_head.kind=rmlp", "rmlp.share_dino_ibot=true"],
        "method.queue: features of earlier steps belong to other draws of a randomized head; set it to 0",
    ),
    (["run.dir="], "run.dir: is empty; name a folder"),
    (["run.steps=0"], "run.steps: must be at least 1, got 0"),
    (["optim.lr=nan"], "optim.lr: must be finite, got nan"),
    (["optim.lr=inf"], "optim.lr: must be finite, got inf"),
    (["data.mean=[0.5,0.5,.inf]"], "data.mean: must be finite"),
    (["optim.lr=0"], "optim.lr: must be above 0"),
    (["rmlp.outputs=1", *RMLP], "rmlp.outputs: must be at least 2"),
    (["mask.probability=1.5"], "mask.probability: must be between 0 and 1"),
    (["teacher.momentum=1.01"], "teacher.momentum: must be between 0 and 1"),
    (["teacher.temp=0"], "teacher.temp: must be above 0"),
    (["data.augment.brightness=-1"], "data.augment.brightness: must be 0 or more"),
    (["data.augment.hue=0.6"], "data.augment.hue: must be between 0 and 0.5"),
    (["data.prefetch=0"], "data.prefetch: must be at least 1"),
    (["model.drop_path_rate=1"], "model.drop_path_rate: must be at least 0 and below 1"),
    (["data.global_crops.scale=[0.5]"], "data.global_crops.scale: must be [smallest, largest]"),
    (["data.local_crops.scale=[0.5,0.2]"], "data.local_crops.scale: must be [smallest, largest]"),
    (["mask.ratio=[0.1,1.5]"], "mask.ratio: must be [smallest, largest]"),
    (["model.arch=custom", "model.embed_dim=96"], "model.depth: must be given with model.arch=custom"),
    (["model.depth=4"], "model.depth: model.arch=vit_large sets it; remove it or use model.arch=custom"),
    ([*CUSTOM, "model.num_heads=5"], "model.num_heads: 5 heads do not divide width 96"),
    (["model.register_neurons=[[2,0]]"], "model.register_neurons: test-time registers are for released"),
    (
        ["model.attention=varlen", "engine.precision=fp32"],
        "model.attention: varlen needs engine.precision=bf16, not fp32; set it, or use model.attention=auto",
    ),
    (
        ["model.attention=xformers", "engine.precision=bf16", "engine.device=cpu"],
        "model.attention: xformers needs a GPU; set engine.device=auto, or use model.attention=auto",
    ),
    (
        [*CUSTOM, "model.embed_dim=36", "model.attention=xformers", "engine.precision=bf16"],
        "model.attention: xformers takes heads of 8, 16, ... 256 channels, not 12; change model.num_heads",
    ),
    (["model.in_channels=1"], "model.in_channels: 1 is not data.channels=3; set both"),
    (["data.channels=0"], "data.channels: must be between 1 and 128, got 0"),
    ([*GREY, "data.mean=[0.5,0.5,0.5]"], "data.mean: needs 1 values, one a channel, got [0.5, 0.5, 0.5]"),
    (
        [*GREY, "data.augment.hue=0.1"],
        "data.augment.saturation: only RGB images have colours; with data.channels=1 set "
        "data.augment.saturation=0 data.augment.hue=0 data.augment.grayscale_probability=0",
    ),
    ([*GREY, "data.augment.saturation=0.2"], "data.augment.saturation: only RGB images have colours"),
    (
        [*GREY, "data.augment.grayscale_probability=1"],
        "data.augment.saturation: only RGB images have colours",
    ),
    (["data.decode.max_pixels=0"], "data.decode.max_pixels: must be at least 1"),
    (["data.decode.window=[1]"], "data.decode.window: [1.0] must be [low, high] with low below high"),
    (["data.decode.window=[9,9]"], "data.decode.window: [9.0, 9.0] must be [low, high] with low below high"),
    (["data.decode.window=[0,.nan]"], "data.decode.window: must be finite"),
    (
        ["model.img_size=200"],
        "model.img_size: 200 px is not a multiple of model.patch_size=16; use for example 192",
    ),
    (["model.img_width=200"], "model.img_width: 200 px is not a multiple of model.patch_size=16"),
    (["data.local_crops.size=98"], "data.local_crops.size: 98 px is not a multiple of model.patch_size=16"),
    (["log.knn.train=a", "log.knn.test=b", "log.knn.crop=225"], "log.knn.crop: 225 px is not a multiple of"),
    (["data.mean=[0.5]"], "data.mean: needs 3 values, one a channel, got [0.5]"),
    (["data.std=[0.5,0.5,0]"], "data.std: must be above 0"),
    (["data.shards=[]"], "data.shards: names no shard"),
    (["data.cache.dir="], "data.cache.dir: is empty"),
    (["data.cache.max_gb=0"], "data.cache.max_gb: must be above 0"),
    (["data.io_attempts=0"], "data.io_attempts: must be at least 1"),
    (["data.io_timeout=0"], "data.io_timeout: must be above 0"),
    (["data.shards=['']"], "data.shards: holds an empty name"),
    (["loss.dino_weight=0", "loss.ibot_weight=0", "loss.koleo_weight=0"], "loss.dino_weight: all three loss"),
    (["data.group_size=1", "mask.probability=1"], "data.group_size: KoLeo needs two images"),
    (
        ["data.group_size=2", "mask.probability=0.2"],
        "mask.probability: no global crop of a group gets a mask",
    ),
    (["mask.min_patches=99"], "mask.min_patches: 99 patches do not fit the largest mask, 98 of 196 patches"),
    (["run.steps=12500"], "optim.warmup_steps: 12500 is not below run.steps=12500"),
    (["optim.min_lr=1"], "optim.min_lr: 1.0 is above the peak learning rate 0.005657"),
    (["optim.global_batch_size=100"], "optim.global_batch_size: 100 is not a multiple of"),
    (["engine.accumulation_steps=64"], "optim.global_batch_size: 2048 is not a multiple of"),
    (
        ["engine.timeout=900"],
        "engine.hang_timeout: 900 s is not below engine.timeout=900, which ends the run; lower it",
    ),
    (["engine.hang_timeout=-1"], "engine.hang_timeout: must be 0 or more"),
    (["engine.timeout=0", "engine.hang_timeout=0"], "engine.timeout: must be above 0"),
    (["run.preemption_check_every=0"], "run.preemption_check_every: must be at least 1"),
    (["ibot_head.prototypes=9"], "ibot_head.prototypes: not used while ibot_head.shared=true"),
    (
        ["optim.freeze_backbone_steps=125000"],
        "optim.freeze_backbone_steps: 125000 is not below run.steps=125000, so the backbone would never",
    ),
    (["optim.freeze_backbone_steps=-1"], "optim.freeze_backbone_steps: must be 0 or more"),
    (
        [*RMLP, "optim.freeze_backbone_steps=1"],
        "optim.freeze_backbone_steps: 1 steps, but from rmlp.start_step=0 on no head has weights to train",
    ),
    (
        [*RMLP, "rmlp.start_step=5", "optim.freeze_backbone_steps=6"],
        "optim.freeze_backbone_steps: 6 steps, but from rmlp.start_step=5 on no head has weights to train",
    ),
    (["rmlp.start_step=3"], "rmlp.start_step: no head is randomized; set dino_head.kind=rmlp"),
    ([*RMLP, "rmlp.start_step=125000"], "rmlp.start_step: 125000 is not below run.steps=125000"),
    ([*RMLP, "ibot_head.shared=false", "rmlp.share_dino_ibot=true"], "rmlp.share_dino_ibot: the two heads"),
    (
        [*RMLP, "rmlp.identity=false"],
        "rmlp.share_student_teacher: with rmlp.identity=false independent draws",
    ),
    ([*RMLP, "rmlp.amplitude=20"], "rmlp.share_student_teacher: with rmlp.amplitude=20.0 independent draws"),
    (
        [*RMLP, "rmlp.identity=false", "rmlp.share_student_teacher=true"],
        "loss.center_momentum: without rmlp.identity the outputs change meaning at every draw",
    ),
    ([*INDEPENDENT, "rmlp.amplitude_end=20"], "rmlp.share_student_teacher: with rmlp.amplitude_end=20.0"),
    (
        [*INDEPENDENT, "rmlp.identity=false", "rmlp.share_student_teacher=true", "rmlp.amplitude_end=0"],
        "rmlp.amplitude: 0 without rmlp.identity makes every weight 0",
    ),
    ([*RMLP, "rmlp.schedule=linear"], "rmlp.schedule: linear leads nowhere; give rmlp.amplitude_end"),
    ([*RMLP, "rmlp.amplitude_end=1"], "rmlp.amplitude_end: not used while rmlp.schedule=const"),
    ([*RMLP, "rmlp.schedule_steps=9"], "rmlp.schedule_steps: not used while rmlp.schedule=const"),
    ([*RMLP, "rmlp.mix=0.3"], "rmlp.mix: not used without a mixture; set dino_head.kind=mix"),
    (["dino_head.kind=mix"], "rmlp.outputs: 4096 is not dino_head.prototypes=65536, but kind=mix adds"),
    (
        ["ibot_head.shared=false", "ibot_head.kind=mix", "ibot_head.prototypes=9"],
        "rmlp.outputs: 4096 is not ibot_head.prototypes=9",
    ),
    ([*MIX, "rmlp.mix=1.5"], "rmlp.mix: must be between 0 and 1"),
    ([*MIX, "rmlp.mix=0"], "rmlp.mix: 0 throughout is no mixture; use kind=mlp"),
    ([*MIX, "rmlp.mix=1"], "rmlp.mix: 1 throughout is no mixture; use kind=rmlp"),
    ([*MIX, "rmlp.amplitude=20"], "rmlp.share_student_teacher: with rmlp.amplitude=20.0 independent"),
    (
        [*MIX, "loss.centering=sinkhorn", "rmlp.mix_end=1", "rmlp.schedule=cosine"],
        "rmlp.mix: at a share of 1 most outputs hold noise",
    ),
    (["log.knn.train=a.tar"], "log.knn.test: k-NN needs train and test shards"),
    (["log.knn.test=a.tar"], "log.knn.train: k-NN needs train and test shards"),
    (["log.artifacts.number=0"], "log.artifacts.number: must be at least 1"),
    (["log.artifacts.every=-1"], "log.artifacts.every: must be 0 or more"),
    (["log.knn.crop=272"], "log.knn.crop: 272 px is larger than log.knn.resize=256"),
]

ALLOWED = [
    [*SWAV],
    [*SWAV, "method.queue=4096", "method.queue_start_step=9", "loss.koleo_weight=0"],
    [*SWAV, "dino_head.kind=rmlp", "rmlp.share_dino_ibot=true", "dino_head.norm_last_layer=false"],
    ["dino_head.norm_last_layer=true"],
    [*CUSTOM],
    [*CUSTOM, "model.attention=varlen", "engine.precision=bf16"],
    [*GREY],
    ["data.decode.window=[-1000,2000.5]"],
    ["data.decode.window=null"],
    ["data.group_size=2", "mask.probability=0.25"],
    ["data.group_size=2", "mask.probability=0.2", "loss.ibot_weight=0"],
    ["engine.accumulation_steps=32"],
    ["optim.min_lr=0.004", "optim.lr_scaling=none"],
    ["ibot_head.shared=false", "ibot_head.prototypes=9"],
    ["teacher.temp_warmup_steps=999999"],
    [*RMLP, "rmlp.start_step=124999"],
    ["optim.freeze_backbone_steps=124999"],
    [*RMLP, "rmlp.start_step=5", "optim.freeze_backbone_steps=5"],
    [*RMLP, "ibot_head.shared=false", "optim.freeze_backbone_steps=5"],
    [*RMLP, "rmlp.share_dino_ibot=true"],
    [*RMLP, "rmlp.amplitude=19.9"],
    [*RMLP, "rmlp.amplitude=100", "rmlp.share_student_teacher=true"],
    [*RMLP, "rmlp.identity=false", "rmlp.share_student_teacher=true", "rmlp.resample_every=0"],
    [*RMLP, "rmlp.identity=false", "rmlp.share_student_teacher=true", "loss.center_momentum=0"],
    [*RMLP, "loss.centering=sinkhorn"],
    [*INDEPENDENT, "rmlp.amplitude_end=19.9", "rmlp.schedule_steps=10"],
    [*MIX, "rmlp.mix=0", "rmlp.mix_end=1", "rmlp.schedule=cosine"],
    [*MIX, "rmlp.share_dino_ibot=true", "loss.centering=sinkhorn"],
    [*MIX, "ibot_head.shared=false", "ibot_head.kind=rmlp", "rmlp.share_dino_ibot=true"],
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=[line.partition(" ")[0] for _, line in REFUSED])
def test_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(*overrides)
    assert f": {line}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("overrides", ALLOWED, ids=" ".join)
def test_allowed(overrides: list[str]) -> None:
    load(*overrides)


def test_every_number_has_a_bound() -> None:
    bounded = {key for bound in BOUNDS for key in bound.keys.split()} | {*RANGES, "data.mean", "data.std"}
    optional = {key for key, value in settings(Config()).items() if value is None}
    assert {key for key, value in settings(Config()).items() if numbers(value)} == bounded - optional


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ([*RMLP], "dino_head.kind: RMLP heads do not learn from random weights"),
        (["ibot_head.shared=false", "ibot_head.kind=rmlp"], "dino_head.kind: RMLP heads do not learn"),
        ([*MIX], "rmlp.mix: a mixture does not learn from random weights"),
        (["rmlp.amplitude=2"], "rmlp.amplitude: has no effect"),
        ([*PURE, "rmlp.amplitude=33"], "rmlp.amplitude: without rmlp.identity the outputs are about 0.09"),
        (["teacher.temp=0.1"], "teacher.temp: not below loss.student_temp"),
        (["log.knn.every=5"], "log.knn.every: has no effect"),
        (["optim.freeze_backbone_steps=5"], "optim.freeze_backbone_steps: freezes random weights"),
    ],
)
def test_advice(overrides: list[str], start: str) -> None:
    (line,) = warnings(load(*overrides))
    assert line.startswith(start)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*RMLP, "rmlp.start_step=5"],
        [*MIX, "rmlp.mix=0", "rmlp.mix_end=0.5", "rmlp.schedule=linear"],
        [*MIX, "model.init_from=a.safetensors"],
        [*PURE, "rmlp.amplitude=35"],
        [*RMLP, "model.init_from=a.safetensors"],
        ["model.init_from=a.safetensors", "optim.freeze_backbone_steps=5"],
        [*RMLP, "checkpoint.resume_from=runs/a/checkpoints/step_00000001"],
    ],
)
def test_no_advice(overrides: list[str]) -> None:
    assert warnings(load(*overrides)) == []


def test_advice_gives_the_measured_numbers() -> None:
    assert all(number in warnings(load(*RMLP))[0] for number in ("41.8 %", "38.8 %", "75.8 %"))


def test_the_recipes_give_no_advice() -> None:
    for path in sorted(CONFIGS.glob("*.yaml")):
        expected = 1 if path.stem == "rmlp_phase" else 0  # a part, without the backbone that it refines
        assert len(warnings(load_config(path))) == expected, path
