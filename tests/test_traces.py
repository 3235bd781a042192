"""What a run leaves on the disk: none of the secrets it was given, and modes as the user's umask says."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pretrain import records
from pretrain.cluster.job_folder import JobFolder
from pretrain.cluster.submit import _Executor, prepare
from pretrain.command_line import exit_status
from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.faults import fault_of
from pretrain.redaction import without_secrets
from pretrain.run.lock import RunLock
from pretrain.train import main
from tests.data.http_server import serving
from tests.rank_processes import ROOT

SECRET = "h4rdToGuess"  # in every value that must not be found
VARIABLES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "API_KEY", "SOME_CREDENTIALS", "GITHUB_PWD")


def config(run: Path, shards: str, *more: str) -> Config:
    """Two steps of two blocks, with everything that a run writes."""
    settings = [
        *(f"run.dir={run}", "run.steps=2", f"data.shards=['{shards}']", "model.arch=custom"),
        *("model.embed_dim=24", "model.depth=2", "model.num_heads=2", "model.num_register_tokens=0"),
        *("dino_head.prototypes=32", "optim.global_batch_size=4", "data.group_size=4", "log.every=1"),
        *("optim.warmup_steps=1", "engine.accumulation_steps=1", "checkpoint.every=1", "log.knn.train=[]"),
        "checkpoint.export_every=2",
        *("log.knn.test=[]", "log.profile_steps=[1,2]", "data.workers=0", "engine.kind=single"),
        *(f"data.cache.dir={run.parent}/cache", "cluster.gpus_per_node=0", *more),
    ]
    return load_config(ROOT / "configs/debug_cpu.yaml", settings)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Permission bits of all files and folders below one, but links, whose own never count."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): stat.S_IMODE(path.stat().st_mode) for path in paths if not path.is_symlink()}


def wrong(folder: Path, mask: int, private: tuple[str, ...] = ()) -> dict[str, str]:
    """What has not the mode that a shell would give it under a umask."""
    found = {}
    for name, mode in modes(folder).items():
        whole = 0o600 if Path(name).name in private else 0o777 if Path(name).is_dir() else 0o666
        if mode != whole & ~mask:
            found[name] = f"{mode:o}"
    return found


@pytest.fixture(scope="module")
def job(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobFolder, str]:
    """A job with a umask of 027, secrets in its environment and in its address of shards; what it printed."""
    folder = tmp_path_factory.mktemp("job")
    with serving() as server, umask(0o027):
        server.files = {path.name: path.read_bytes() for path in shards.glob("train-*.tar*")}
        (name,) = sorted(path.name for path in shards.glob("train-*0.tar"))[:1]
        address = server.url(name).replace("//", f"//me:{SECRET}@")
        cfg = config(folder / "run", f"{address}?token={SECRET}&X-Signature={SECRET * 4}")
        job, _, code = prepare(cfg, "torchrun")
        secrets = dict.fromkeys(VARIABLES, SECRET)
        done = subprocess.run(
            [sys.executable, "-m", "pretrain.job", job.path],
            cwd=code,
            env={**os.environ, **secrets, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr + job.rank_log(0, 0).read_text()
    return job, done.stdout + done.stderr


def test_a_job_writes_no_secret_but_the_address_in_its_config(job: tuple[JobFolder, str]) -> None:
    folder, printed = job
    run = Path(folder.read().run_dir)
    files = [path for path in run.parent.rglob("*") if path.is_file()]
    assert {"run.json", "metrics.jsonl", "environment.txt", "job.json"} <= {path.name for path in files}
    holders = {path for path in files if SECRET.encode() in path.read_bytes()}
    assert holders == {run / "config.yaml", folder.config} and SECRET not in printed
    assert not any(SECRET in str(path) for path in files)


def test_a_job_follows_the_umask_and_keeps_an_address_with_a_password_private(
    job: tuple[JobFolder, str],
) -> None:
    run = Path(job[0].read().run_dir)
    assert len(modes(run)) > 100 and wrong(run.parent / "cache", 0o027) == {}
    assert wrong(run, 0o027, ("config.yaml",)) == {}


def leaking_error() -> InputError:
    """As a client of a store raises it, with the whole address, and we hand it on."""
    try:
        try:
            raise ValueError(f"Invalid URI 'hf://me:{SECRET}@x/y.tar?token={SECRET}'")
        except ValueError as cause:
            raise InputError(f"data.shards: {cause}; HF_TOKEN={SECRET} curl -u me:{SECRET}") from cause
    except InputError as error:
        return error


def test_no_line_record_or_traceback_of_an_error_tells_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = leaking_error()

    def fail() -> int:
        raise error

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert exit_status("pretrain", fail) == 2
    sys.excepthook(type(error), error, error.__traceback__)
    records.begin(tmp_path, 0)
    records.end_with(error, is_cause=True, bad_nodes=[])
    written = (tmp_path / "rank_00000.json").read_text()
    texts = (capsys.readouterr().err, written, fault_of(error, 1).line)
    for text in texts:
        assert SECRET not in text and "x/y.tar" in text and "HF_TOKEN=..." in text
    assert "ValueError: Invalid URI 'hf://x/y.tar?token=...'" in json.loads(written)["traceback"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("export WANDB_API_KEY='abc'; x", "export WANDB_API_KEY='...'; x"),
        (
            "pipe:curl -ume:abc -H 'Authorization: Basic abc' h",
            "pipe:curl -ume:... -H 'Authorization: Basic ...' h",
        ),
        ("https://me:abc@h/x.tar?token=abc&X-Signature=abc", "https://h/x.tar?token=...&X-Signature=..."),
        ("DB_PWD=abc MY_KEY=abc tool --api-key abc", "DB_PWD=... MY_KEY=... tool --api-key ..."),
        ("the class token is kept, model.num_register_tokens=4, -u me", None),
        ("the key=value of a basic config; secret: none", None),
    ],
)
def test_what_is_taken_for_a_secret(text: str, shown: str | None) -> None:
    assert without_secrets(text) == (shown or text)
    again = f"{shown or text}: gave up"  # a line may pass twice
    assert without_secrets(again) == again


def test_a_batch_script_with_a_secret_is_private(tmp_path: Path) -> None:
    for line, mode in (("export HF_TOKEN=abc", 0o600), ("module load cuda", 0o644)):
        cfg = config(tmp_path / "run", "x.tar", f"cluster.setup=['{line}']")
        script = tmp_path / "script.sh"
        script.touch()
        script.chmod(0o644)
        executor = _Executor(JobFolder(tmp_path), cfg, tmp_path)
        assert executor._make_submission_command(script) == ["sbatch", str(script)]
        assert stat.S_IMODE(script.stat().st_mode) == mode


def test_a_lock_follows_the_umask(tmp_path: Path) -> None:
    with umask(0o002), RunLock(tmp_path):
        assert wrong(tmp_path / "run.lock", 0o002) == {}


def test_a_run_follows_the_umask(shards: Path, tmp_path: Path) -> None:
    with umask(0o077):
        assert main(config(tmp_path / "run", f"{shards}/train-*.tar")) == 0
    names = {Path(name).name for name in modes(tmp_path / "run")}
    assert {"config.yaml", ".metadata", "COMPLETE", "teacher_step_00000002.safetensors"} <= names
    assert wrong(tmp_path / "run", 0o077) == {}
