"""How a run starts: initial weights, the checkpoint or export it continues from, what is recorded of it."""

from pathlib import Path
from typing import Any

import torch

from pretrain import distributed
from pretrain.analysis.scaling import KEY as SCALING
from pretrain.analysis.scaling import Scaling
from pretrain.config.derived import uses_rmlp, vit_shape
from pretrain.config.load import config_text, diff_configs, load_config, save_config
from pretrain.config.schema import Config
from pretrain.data.loader import TrainLoader
from pretrain.engines.base import Engine
from pretrain.errors import InputError
from pretrain.export.fitting import fitted_backbone
from pretrain.heads.rmlp import check_memory
from pretrain.method.base import Method
from pretrain.method.branch import SSLBranch
from pretrain.method.build import build_method
from pretrain.models.attention import resolve_backend
from pretrain.models.init import init_weights
from pretrain.models.vit import VisionTransformer
from pretrain.redaction import without_secrets
from pretrain.run.checkpoint import Checkpoints, load_checkpoint, read_document
from pretrain.run.checkpoint_folder import newest_checkpoint
from pretrain.run.environment import config_hash, describe
from pretrain.sharded import assign


def build_branches(
    cfg: Config, device: torch.device, micro_batch: int, on_meta: bool = False
) -> tuple[SSLBranch, SSLBranch, Method]:
    """Student, teacher and method; their weights come from `fill_weights`.

    Args:
        cfg: of the run.
        device: of the training.
        micro_batch: images in one forward.
        on_meta: take no memory for the weights: the engine does, for its part of them.

    Raises:
        InputError: a randomized head does not fit the memory.
    """
    if uses_rmlp(cfg):
        rows = micro_batch * (2 + cfg.data.local_crops.number)
        check_memory(vit_shape(cfg.model).embed_dim, cfg.rmlp.outputs, rows, distributed.free_memory(device))
    backend = resolve_backend(cfg.model.attention, device, cfg.engine.precision == "bf16")
    with torch.device("meta" if on_meta else "cpu"):
        student, teacher = SSLBranch(cfg, "student", backend), SSLBranch(cfg, "teacher", backend)
    teacher.share_draws(student)
    return student, teacher, build_method(cfg)


def fill_weights(cfg: Config, student: SSLBranch, teacher: SSLBranch) -> None:
    """Give the student the weights of `model.init_from` or random ones, and the teacher a copy.

    A run that goes on from a checkpoint takes all weights from there: the file may be gone by then.

    Raises:
        InputError: the file of `model.init_from` does not fit the model.
    """
    init_weights(student, cfg.run.seed)
    if cfg.model.init_from and not _continues(cfg):
        load_backbone(student.backbone, Path(cfg.model.init_from))
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.copy_(theirs)


def _continues(cfg: Config) -> bool:
    """Whether `load_start` will find a checkpoint."""
    own = newest_checkpoint(Path(cfg.run.dir) / "checkpoints")
    return own is not None or bool(cfg.checkpoint.resume_from)


def load_backbone(backbone: VisionTransformer, path: Path) -> None:
    """Fill the backbone from a file or folder of any known format, every tensor or none; say what was done.

    Raises:
        InputError: the file cannot be read, or holds another model; the line names the first differences.
    """
    fitted = fitted_backbone(path, backbone.cfg)
    for key, parameter in backbone.state_dict().items():
        assign(parameter, fitted.state[key])
    for line in fitted.report:
        distributed.say(line)


def load_start(cfg: Config, engine: Engine, checkpoints: Checkpoints, loader: TrainLoader) -> int:
    """Bring engine and loader to where the run starts; the number of optimizer steps done so far.

    Args:
        cfg: of the run.
        engine: with initial weights.
        checkpoints: of the run's folder.
        loader: at the beginning; another data set or batch size than before is said, not refused.

    Raises:
        InputError: the checkpoint is damaged, or of another model.
    """
    # 1. this run's newest checkpoint; 2. checkpoint.resume_from;
    # 3. model.init_from; 4. random weights: the last two are in the branches already.
    source = checkpoints.newest()
    if source is None and cfg.checkpoint.resume_from:
        source = Path(cfg.checkpoint.resume_from)
    if source is None:
        return 0
    data, facts = _load(source, cfg, engine)
    step, batch = int(facts["step"]), cfg.optim.global_batch_size
    loader.load_state_dict(data, step)
    old, new = ({key: d[key] for key in ("seed", "num_samples")} for d in (data, loader.state_dict(step)))
    if old != new:
        changes = f"{_listed(old)} -> {_listed(new)}"
        distributed.say(f"changed since {source}: {changes}; the data come in another order now")
    if facts["global_batch_size"] != batch:
        change = f"{facts['global_batch_size']} -> {batch} images a step"
        distributed.say(f"changed since {source}: {change}; reading goes on at position {data['position']}")
    return step


def _load(source: Path, cfg: Config, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill the engine from a checkpoint. DeepSpeed keeps its optimizer's state in a form of its own."""
    written, here = read_document(source / "run.json").get("engine"), cfg.engine.kind
    state = engine.state_dict()
    if "deepspeed" in (written, here):
        del state["optim"]
    documents = load_checkpoint(source, state)
    check_documents(source, *documents)
    engine.load_state_dict(state)
    if "deepspeed" in (written, here) and not (written == here and engine.load_native(source / "optim")):
        distributed.say(
            f"{source}: weights only: the optimizer's state of engine.kind={written} does not fit "
            f"engine.kind={here}, its moments start at 0"
        )
    return documents


def check_documents(source: Path, data: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse a checkpoint whose data.json or run.json lacks the numbers that a run goes on from.

    Raises:
        InputError: a number is missing, no integer, or below 0; names the file.
    """
    wanted = {
        "data.json": (data, ("seed", "position", "num_samples")),
        "run.json": (facts, ("step", "global_batch_size")),
    }
    for name, (document, keys) in wanted.items():
        for key in keys:
            if type(document.get(key)) is not int or document[key] < 0:
                fault = f"{key} is {document.get(key)!r} instead of a number"
                raise InputError(f"{source / name}: {fault}; continue from another checkpoint")


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def record_run(cfg: Config, folder: Path) -> None:
    """Write the run's config and environment, on rank 0; say what changed since its last start."""
    if not distributed.is_main():
        return
    config = folder / "config.yaml"
    if config.exists():
        for change in _changes(config, cfg):
            print(f"changed since the last start: {without_secrets(change)}")
    folder.mkdir(parents=True, exist_ok=True)
    save_config(cfg, config)
    (folder / "environment.txt").write_text(describe())


def _changes(config: Path, cfg: Config) -> list[str]:
    try:
        return diff_configs(load_config(config), cfg)
    except InputError as error:  # written by another version: no reason not to go on
        return [f"the config, which cannot be compared ({error})"]


def run_facts(cfg: Config, step: int) -> dict[str, Any]:
    """What a checkpoint or an export says about its origin."""
    return {
        "step": step,
        "run": cfg.run.dir,
        "config_hash": config_hash(config_text(cfg)),
        "engine": cfg.engine.kind,
        "world_size": distributed.world_size(),
        "global_batch_size": cfg.optim.global_batch_size,
        SCALING: Scaling(cfg.data.mean, cfg.data.std, cfg.data.decode.window).document(),
        "torch": torch.__version__,
    }
