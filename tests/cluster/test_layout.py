from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.cluster.checks import check_run
from pretrain.cluster.cost import estimate
from pretrain.cluster.job_folder import JobFolder, job_folders, new_job_folder
from pretrain.cluster.layout import fitted, with_absolute_paths
from pretrain.cluster.scheduler import is_cancelled, minutes, parse
from pretrain.cluster.snapshot import take_snapshot
from pretrain.config.derived import micro_batch_size
from pretrain.config.load import load_config
from pretrain.config.schema import SourceConfig
from pretrain.data.shards import shard_names
from pretrain.errors import InputError
from tests.cluster.jobs import new_job

ROOT = Path(__file__).parents[2]


def test_paths_mean_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a-0.tar", "a-1.tar", "b.tar"):
        Path(name).touch()
    settings = ["data.shards=[a-*.tar]", "model.init_from=x.safetensors", "log.artifacts.shards=b.tar"]
    cfg = load_config(ROOT / "configs/demo.yaml", settings)
    sources = [SourceConfig(["{a-0,b}.tar", "./a-{1..1}.tar", "https://host/{0..3}.tar", "pipe:cat a.tar"])]
    moved = with_absolute_paths(replace(cfg, data=replace(cfg.data, sources=sources)))
    here = [str(tmp_path / name) for name in ("a-0.tar", "a-1.tar", "b.tar")]
    monkeypatch.chdir("/")
    assert shard_names(moved.data.shards, "x") == here[:2]
    assert moved.data.sources[0].shards[-2:] == ["https://host/{0..3}.tar", "pipe:cat a.tar"]
    assert shard_names(moved.data.sources[0].shards[:-2], "x") == [here[0], here[2], here[1]]
    assert shard_names(moved.log.artifacts.shards, "x") == [here[2]]
    assert moved.model.init_from == str(tmp_path / "x.safetensors")
    assert moved.run.dir == str(tmp_path / "runs/demo")
    assert (moved.checkpoint.resume_from, moved.data.cache.dir) == ("", cfg.data.cache.dir)


def test_a_run_may_start_from_a_file_or_a_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    shards = [f"{key}=[{tmp_path}/a.tar]" for key in ("data.shards", "log.knn.train", "log.knn.test")]
    settings = [*shards, f"run.dir={tmp_path}/run", "cluster.gpus_per_node=1"]
    for name in ("", "a.tar", "."):
        path = f"model.init_from={tmp_path / name if name else name}"
        assert check_run(load_config(ROOT / "configs/demo.yaml", [*settings, path])) == 0
    missing = load_config(ROOT / "configs/demo.yaml", [*settings, f"model.init_from={tmp_path}/none"])
    with pytest.raises(InputError, match=r"^model.init_from: .*/none: no such file or folder$"):
        check_run(missing)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_engine_for_several_processes_is_refused_before_one_is_sent(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    shards = [f"{key}=[{tmp_path}/a.tar]" for key in ("data.shards", "log.knn.train", "log.knn.test")]
    settings = [*shards, f"run.dir={tmp_path}/run", f"engine.kind={kind}", "cluster.gpus_per_node=1"]
    with pytest.raises(InputError, match=rf"^engine.kind={kind} trains in several processes, not in one;"):
        check_run(load_config(ROOT / "configs/demo.yaml", settings))
    two = load_config(
        ROOT / "configs/demo.yaml", [*settings, "cluster.tasks_per_node=2", "data.group_size=64"]
    )
    assert check_run(two) == 0


@pytest.mark.parametrize("name", ["a:b", "a\\b", "~/x", "a\nb", "a\x1bb"])
def test_a_run_folder_that_a_job_would_read_otherwise(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    shards = [f"{key}=[{tmp_path}/a.tar]" for key in ("data.shards", "log.knn.train", "log.knn.test")]
    cfg = load_config(ROOT / "configs/demo.yaml", [*shards, "cluster.gpus_per_node=1"])
    where = name if name.startswith("~") else str(tmp_path / name)
    with pytest.raises(InputError, match=r"^run\.dir: "):
        check_run(replace(cfg, run=replace(cfg.run, dir=where)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize(
    ("config", "nodes", "forwards", "per_forward"),
    [("vitl_rmlp", 1, 4, 64), ("vitl_rmlp", 4, 1, 64), ("vitg_mlp", 8, 4, 12), ("vits_mlp", 1, 1, 64)],
)
def test_a_config_for_one_device_fits_several(
    config: str, nodes: int, forwards: int, per_forward: int
) -> None:
    cfg = load_config(ROOT / f"configs/{config}.yaml", options={"cluster": {"nodes": nodes}})
    new, lines = fitted(cfg)
    assert (new.engine.kind, new.engine.accumulation_steps) == ("ddp", forwards)
    assert micro_batch_size(new, nodes * 8) == per_forward
    assert f"engine.kind: single -> ddp, for {nodes * 8} devices" in lines
    one = load_config(ROOT / f"configs/{config}.yaml", options={"cluster": {"gpus_per_node": 1}})
    assert fitted(one) == (one, [])


def test_what_fits_stays_and_what_cannot_fit_is_refused() -> None:
    cfg = load_config(ROOT / "configs/vitl_mlp.yaml", ["engine.kind=fsdp2", "engine.accumulation_steps=2"])
    assert fitted(cfg) == (cfg, [])
    with pytest.raises(
        InputError,
        match="cannot be spread over 64 devices: the number of groups, 32, must be a multiple of 64",
    ):
        fitted(replace(cfg, cluster=replace(cfg.cluster, nodes=8)))


def test_the_estimate() -> None:
    cfg = load_config(ROOT / "configs/demo.yaml", ["run.steps=3600", "cluster.nodes=2"])
    assert estimate(cfg, 0).startswith("3,600 steps x 128 images = 460,800 images on 16 GPUs; for the hours")
    fast = replace(cfg, cluster=replace(cfg.cluster, images_per_s=8.0))
    assert "1,800 steps" in estimate(fast, 1800)
    assert "at 8 images/s each: 8.0 GPU-hours, 0:30:00 " in estimate(fast, 1800)


def test_the_same_code_is_copied_once(tmp_path: Path) -> None:
    package = tmp_path / "pretrain"
    (package / "part").mkdir(parents=True)
    (package / "part" / "a.py").write_text("x = 1\n")
    (package / "notes.txt").write_text("no code")
    first = take_snapshot(tmp_path / "run", package)
    assert (first / "pretrain/part/a.py").read_text() == "x = 1\n"
    assert not (first / "pretrain/notes.txt").exists()
    assert (first / "REVISION").read_text() == "not a git checkout\n"
    assert take_snapshot(tmp_path / "run", package) == first
    (package / "part" / "a.py").write_text("x = 2\n")
    assert take_snapshot(tmp_path / "run", package) != first
    assert (first / "pretrain/part/a.py").read_text() == "x = 1\n"
    assert len(list((tmp_path / "run/code").iterdir())) == 2


def test_jobs_of_one_second_stay_in_order(tmp_path: Path) -> None:
    folders = [new_job(tmp_path) for _ in range(12)]
    assert [folder.path for folder in job_folders(tmp_path)] == [folder.path for folder in folders]
    new_job_folder(tmp_path)  # without a job.json: it was never started
    assert isinstance(folders[0], JobFolder) and len(job_folders(tmp_path)) == 12


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 90),
        ("1:30", 1.5),
        ("01:30:00", 90),
        ("2-00:00:00", 2880),
        ("1-12", 2160),
        ("UNLIMITED", float("inf")),
    ],
)
def test_times_of_slurm(time: str, expected: float) -> None:
    assert minutes(time) == expected


def test_the_words_of_scontrol() -> None:
    facts = parse("JobId=7 JobName=a b=c JobState=COMPLETING Reason=None NumNodes=2 Power= \nJobId=8")
    assert (facts["JobName"], facts["NumNodes"], facts["Power"]) == ("a b=c", "2", "")
    assert is_cancelled(facts, 0)
    assert not is_cancelled(facts | {"Reason": "TimeLimit"}, 0)
    assert not is_cancelled(facts | {"JobState": "RUNNING"}, 0)
    assert not is_cancelled(facts | {"Restarts": "1"}, 0)  # a machine failed, and Slurm has requeued it
    assert is_cancelled(facts | {"Restarts": "1"}, 1)
