import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.cluster.job_folder import JobFolder
from pretrain.cluster.script import batch_script
from pretrain.config.load import load_config
from pretrain.config.schema import Config

ROOT = Path(__file__).parents[2]


def config(run_dir: str = "/runs/a b", **cluster: Any) -> Config:
    cfg = load_config(ROOT / "configs/demo.yaml")
    return replace(cfg, run=replace(cfg.run, dir=run_dir), cluster=replace(cfg.cluster, **cluster))


def script(cfg: Config) -> str:
    run = Path(cfg.run.dir)
    return batch_script(
        cfg, JobFolder(run / "jobs" / "1"), run / "code" / "abc", "python3", "python3 -m task"
    )


def options(cfg: Config) -> list[str]:
    lines = script(cfg).splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def test_what_is_not_set_is_left_to_the_cluster() -> None:
    names = {option.partition("=")[0] for option in options(config())}
    assert not names & {"--partition", "--account", "--qos", "--time", "--mem", "--exclude", "--dependency"}
    assert {"--nodes", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node", "--requeue"} <= names


def test_every_setting_becomes_an_option() -> None:
    cfg = config(
        nodes=3,
        gpus_per_node=4,
        mem_gb=100,
        partition="gpu",
        account="me",
        qos="low",
        time="2-00:00:00",
        constraint="h100",
        exclude="n[1-2]",
        dependency="afterok:1",
        mail="me@example.org",
        name="two words",
        sbatch_args=["--reservation=vision"],
    )
    wanted = """
        --nodes=3 --ntasks-per-node=4 --gpus-per-node=4 --mem=100G --partition=gpu --account=me --qos=low
        --time=2-00:00:00 --constraint=h100 --exclude='n[1-2]' --dependency=afterok:1
        --kill-on-invalid-dep=yes --mail-user=me@example.org --reservation=vision
    """
    assert {*wanted.split()} <= {*options(cfg)}
    assert "--job-name='two words'" in options(cfg)


def test_processes_without_gpus() -> None:
    found = options(config(gpus_per_node=0, tasks_per_node=2, cpus_per_task=5))
    assert {"--ntasks-per-node=2", "--cpus-per-task=5"} <= {*found}
    assert not [option for option in found if option.startswith("--gpus")]


def test_a_percent_sign_in_a_path_is_no_pattern_of_slurm() -> None:
    found = options(config("/runs/50%j"))
    assert "--output=/runs/50%%j/jobs/1/logs/batch.log" in found
    assert "--chdir=/runs/50%j/code/abc" in found


def test_a_container_sees_the_run() -> None:
    text = script(
        config(container_image="/images/x.sqsh", container_mounts=["/data:/data"], srun_args=["-v"])
    )
    assert "--container-image=/images/x.sqsh" in text and "'/runs/a b:/runs/a b,/data:/data'" in text
    assert "\n    -v \\\n" in text


@pytest.mark.parametrize("run_dir", ["/runs/x", "/runs/a b", "/runs/it's $HOME"])
def test_the_script_is_valid_bash(run_dir: str, tmp_path: Path) -> None:
    path = tmp_path / "script.sh"
    path.write_text(script(config(run_dir, setup=["module load cuda", "export A='b c'"])))
    subprocess.run(["bash", "-n", path], check=True)


ODD = ["/runs/a b", "/runs/$(touch harm)", "/runs/`touch harm`", "/runs/'; touch harm; '", '/runs/"$HOME"\\']


@pytest.mark.parametrize("run_dir", ODD)
def test_a_shell_reads_every_path_as_it_is(run_dir: str, tmp_path: Path) -> None:
    cfg = config(run_dir, name=run_dir, container_image=run_dir, srun_args=[f"--comment={run_dir}"])
    text = script(cfg)
    for option in options(cfg):
        echoed = subprocess.run(
            ["bash", "-c", f"printf %s {option}"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        if option.startswith(("--chdir", "--job-name")):
            assert run_dir in echoed.stdout
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >> asked\n')
    (tmp_path / "srun").chmod(0o755)
    call = text[text.index("srun --kill-on") :].partition("python3 -m task")[0].rstrip(" \\\n")
    subprocess.run(
        ["bash", "-c", call],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        check=False,
    )
    asked = (tmp_path / "asked").read_text().splitlines()
    assert {f"--container-image={run_dir}", f"--comment={run_dir}"} <= {*asked}
    assert {path.name for path in tmp_path.iterdir()} == {"srun", "asked"}


def test_the_script_asks_before_and_after(tmp_path: Path) -> None:
    """With commands of this test in place of Python's and srun's."""
    log, commands = tmp_path / "log", tmp_path / "bin"
    commands.mkdir()
    for name, body in {
        "srun": f'echo "srun $@" >> {log}; exit 7',
        "python3": f'echo "$@" >> {log}; {ANSWER}',
    }.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    text = script(config("/runs/a b"))
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_RESTART_COUNT": "2"}
    done = subprocess.run(["bash", "-c", text], env=environment, check=False)
    lines = log.read_text().splitlines()
    assert done.returncode == 75
    assert lines[0] == "-m pretrain.cluster.attempt begin /runs/a b/jobs/1"
    assert lines[1].startswith("srun --kill-on-bad-exit=1") and lines[1].endswith("python3 -m task")
    assert lines[2] == "-m pretrain.cluster.attempt end /runs/a b/jobs/1"


ANSWER = 'case "$3" in end) echo 75;; esac'
