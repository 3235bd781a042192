"""The package's training step as a benchmark runs it: its recipe, noise, the step itself."""

from typing import Any

import torch
from step_baseline import Mark
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config import schema
from pretrain.config.checks import check
from pretrain.config.derived import drop_path_rates
from pretrain.config.schema import Config
from pretrain.data.drop_path import drop_subsets
from pretrain.data.masking import group_masks
from pretrain.engines.single import SingleEngine
from pretrain.errors import InputError
from pretrain.method.branch import SSLBranch
from pretrain.method.dinov2 import DinoV2
from pretrain.method.outputs import share_prototypes
from pretrain.models.attention import resolve_backend
from pretrain.models.init import init_weights
from pretrain.optim.schedules import StepValues
from pretrain.seeding import numpy_stream, torch_stream

GLOBAL_SIZE, LOCAL_SIZE = 224, 96  # pixels; the second is rounded to whole patches
ARCHS = ["tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"]
TINY = {"arch": "custom", "embed_dim": 64, "depth": 2, "num_heads": 2}


def recipe(arch: str, patch: int, images: int, engine: schema.EngineConfig, **model: Any) -> Config:
    """The short recipe at the asked size; LayerScale 1, so that every block counts in the losses.

    Args:
        arch: one of `ARCHS`.
        patch: pixels.
        images: of a step, one group.
        engine: precision, device and the like.
        model: further settings of the backbone.
    """
    shape: dict[str, Any] = TINY if arch == "tiny" else {"arch": arch}
    size = {"patch_size": patch, "img_size": GLOBAL_SIZE, "layer_scale": 1.0}
    local = max(round(LOCAL_SIZE / patch), 1) * patch
    crops = {"global_crops": schema.CropConfig(GLOBAL_SIZE), "local_crops": schema.LocalCropConfig(local)}
    return Config(
        model=schema.ModelConfig(**shape, **size, **model),
        data=schema.DataConfig(group_size=images, **crops),
        optim=schema.OptimConfig(global_batch_size=images, warmup_steps=1, freeze_last_layer_steps=0),
        engine=engine,
    )


def checked(cfg: Config) -> Config:
    """The same configuration.

    Raises:
        InputError: its settings contradict one another.
    """
    try:
        check(cfg)
    except ValueError as error:
        raise InputError(str(error)) from error
    return cfg


def random_batch(cfg: Config, index: int) -> Batch:
    """Images of noise with DINOv2's masks and drop-path rows."""
    images, local = cfg.data.group_size, cfg.data.local_crops
    rng, noise = numpy_stream(0, "masks", index), torch_stream(0, "images", index)
    masks = torch.from_numpy(group_masks(cfg.mask, GLOBAL_SIZE // cfg.model.patch_size, 2 * images, rng))
    counts, rates = masks.sum(1), drop_path_rates(cfg.model)
    rows = [drop_subsets(rates, number * images, rng) for number in (2, local.number)]
    return Batch(
        torch.randn(2 * images, 3, GLOBAL_SIZE, GLOBAL_SIZE, generator=noise),
        torch.randn(local.number * images, 3, local.size, local.size, generator=noise),
        masks,
        masks.flatten().nonzero().flatten(),
        (1 / counts.clamp(min=1).float()).repeat_interleave(counts),
        *(None if part is None else torch.from_numpy(part) for part in rows),
        group_size=images,
        position=index * images,
    )


def initial_weights(cfg: Config) -> dict[str, Tensor]:
    """A branch's weights, by name."""
    branch = SSLBranch(cfg, "student")
    init_weights(branch, cfg.run.seed)
    return branch.state_dict()


class Ours:
    """The package's step, in the order of `pretrain.train.train_step`."""

    def __init__(self, cfg: Config, weights: dict[str, Tensor], device: torch.device) -> None:
        backend = resolve_backend(cfg.model.attention, device, cfg.engine.precision == "bf16")
        student, teacher = SSLBranch(cfg, "student", backend), SSLBranch(cfg, "teacher", backend)
        student.load_state_dict(weights)
        teacher.load_state_dict(weights)
        self.method = DinoV2(cfg)
        self.engine = SingleEngine(student, teacher, self.method, cfg.optim, cfg.engine, device)
        self.sums: dict[str, Tensor] = {}

    def step(self, batch: Batch, step: int, values: StepValues, mark: Mark) -> dict[str, Tensor]:
        """One training step; its losses and gradient norms, still on the device."""
        self.engine.begin_step(step, values)
        outputs = share_prototypes([self.engine.teacher(batch)])
        mark("teacher")
        targets = self.method.targets(outputs, [batch.mask_weights], values.teacher_temp, step)
        mark("targets")
        student = self.engine.student(batch)
        mark("student forward")
        terms = self.method.losses(student, targets[0], batch)
        mark("losses")
        self.engine.backward(terms.total)
        mark("backward")
        result = self.engine.step()
        self.method.commit(result.good)
        mark("clip + optimizer")
        self.engine.update_teacher(values.momentum)
        mark("EMA")
        logged = {**terms.parts, **{f"grad_norm_{name}": norm for name, norm in result.grad_norms.items()}}
        self.observed = student, outputs, targets[0].let_go()  # the loop keeps them through the next step
        for name, value in logged.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(result.good, value, 0.0)
        mark("log")
        return logged
