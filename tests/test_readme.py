"""Every command of the README runs: in a folder with stand-ins for a user's files, training at toy size.

A command that no pattern of `WAYS` knows fails: "no way to run it: add one".
"""

import re
import runpy
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pretrain.config.load import load_config
from pretrain.config.toy import SPANS, toy_overrides
from pretrain.export import write_export
from pretrain.processes import kill_tree
from tests.export.released import TINY, of
from tests.surgery.backbones import random_state
from tests.test_docs import ROOT, words_of

PROGRAMS = r"make|python|pip|conda|git|cd|docker|uv|torchrun|srun|sbatch|tensorboard|export|source|curl|mkdir"
FIRST = re.compile(rf"(\$ |\.venv/|({PROGRAMS})\d*\s)")
OUTPUTS = ("--out", "--report", "--sheet", "--hook", "--calibration")  # options that name what is written
IMAGES = 24
WHOLE_SPANS = {f"{section}.{name}" for section, names in SPANS.items() for name in names}
USERS = ("data.shards", "run.dir", "model.init_from", "model.patch_size", "data.local_crops.size")
FIT = {  # to the released model's stand-in, whose heads are 64 wide and whose patches have 14 pixels
    **{"model.embed_dim": 64, "model.num_heads": 1, "model.img_size": 56},
    "data.global_crops.size": 56,
}


def commands() -> list[str]:
    """The README's shell commands, in order: those of its code blocks that begin with one."""
    found = []
    for language, block in re.findall(
        r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    ):
        lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        if language in ("sh", "bash", "shell", "console") or FIRST.match(lines[0]):
            shown = [line for line in lines if line.startswith("$ ")] or lines
            found += [line.removeprefix("$ ") for line in shown if not line.lstrip().startswith("#")]
    return found


# -- a user's folder


@pytest.fixture(scope="module")
def place(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's folders and, in `stand_ins`, what a user has."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("configs", "tools", "launchers", "benchmarks", "pretrain", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    stand_ins = folder / "stand_ins"
    (stand_ins / "images").mkdir(parents=True)
    for i, pixels in enumerate(load_digits().images[:IMAGES]):
        picture = Image.fromarray((pixels * 15).astype(np.uint8)).resize((64, 64))
        picture.convert("RGB").save(stand_ins / "images" / f"{i:03d}.png")
    for split in ("train", "test"):
        first_samples(shards / f"{split}-000000.tar", stand_ins / f"{split}-000000.tar", 120)
    of(TINY)(stand_ins).rename(stand_ins / "released.pth")
    demo = load_config(ROOT / "configs/demo.yaml").model
    write_export(stand_ins / "export.safetensors", random_state(demo), demo, {})
    return folder


def first_samples(source: Path, target: Path, number: int) -> None:
    """A shard with the first samples of another: each has a picture, a class and a .json."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        keys: list[str] = []
        for member in old:
            key = member.name.partition(".")[0]
            keys += [key] if key not in keys else []
            if len(keys) > number:
                break
            new.addfile(member, old.extractfile(member))


def stand_in(place: Path, word: str) -> str:
    """Put what a word names where it names it, unless something is there; the word as it is used here."""
    key, _, value = word.rpartition("=")
    value = value.removeprefix("/")  # /path/to/images
    path, have = place / value, place / "stand_ins"
    if value.endswith((".pth", ".safetensors")) and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        released = path.suffix == ".pth"
        shutil.copy(have / ("released.pth" if released else "export.safetensors"), path)
        if not released:
            shutil.copy(have / "export.json", path.with_suffix(".json"))
    if value.endswith(".tar") and not list(place.glob(value)):
        path.parent.mkdir(parents=True, exist_ok=True)
        for shard in have.glob("*.tar"):
            shutil.copy(shard, path.parent)
    if (value.endswith("/") or word.startswith("/path/")) and not path.exists():
        shutil.copytree(have / "images", path)
    return f"{key}={value}" if key else value


def with_stand_ins(place: Path, words: Sequence[str]) -> list[str]:
    """The words of a command, what they name being there; what a command writes is left to it."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        written = before in OUTPUTS or word.startswith("-")
        found.append(word if written else stand_in(place, word))
    return found


def toy(place: Path, words: Sequence[str]) -> list[str]:
    """A training command at toy size; where its data is, and what is the point of it, stay the README's."""
    config = next(word for word in words if word.startswith("configs/"))
    given = {word.partition("=")[0]: word for word in words if re.match(r"[a-z_]+\.[\w.]+=", word)}
    cfg = load_config(place / config, list(given.values()))
    small = {text.partition("=")[0]: text for text in toy_overrides(cfg, f"{place}/stand_ins/train-*.tar")}
    if "model.init_from" in given:
        small |= {key: f"{key}={value}" for key, value in FIT.items()}
    rest = [word for word in words if word not in given.values()]
    return [*rest, *given.values(), *(text for key, text in small.items() if key not in {*given} & {*USERS})]


# -- how commands are run


def script(path: str, words: Sequence[str]) -> None:
    """Start a script, or a module, as python does, in this process: torch is imported already."""
    sys.argv = [path, *words]
    with pytest.raises(SystemExit) as ended:
        if path.endswith(".py"):
            runpy.run_path(path, run_name="__main__")
        else:
            runpy.run_module(path, run_name="__main__")
    assert not ended.value.code


def tool(place: Path, words: Sequence[str]) -> None:
    script(words[1], with_stand_ins(place, words[2:]))


def training(place: Path, words: Sequence[str]) -> None:
    words = with_stand_ins(place, words[3:])
    script("pretrain", words if "--print-config" in words else toy(place, words))


def loader(place: Path, words: Sequence[str]) -> None:
    script(words[1], [*toy(place, words[2:]), "--images", "16"])


def slurm(place: Path, words: Sequence[str]) -> None:
    """The checks and the batch script; tests/slurm sends jobs to a real Slurm."""
    data = f"data.shards={place}/stand_ins/train-*.tar"
    script(words[1], [*words[2:], data, "--dry-run", "--cluster=local"])


def local(place: Path, words: Sequence[str]) -> None:
    """On two CPU processes in place of GPUs; the engine is the launcher's choice or the README's."""
    given = re.sub(r"--(gpus|procs) \d+", "--procs 2", " ".join(words[2:])).split()
    script(words[1], [word for word in toy(place, given) if word != "engine.kind=single"])


def jobs(place: Path, words: Sequence[str]) -> None:
    script(words[1], [word for word in words[2:] if word != "-f"])


def tensorboard(place: Path, words: Sequence[str]) -> None:
    """Until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "runs").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tensorboard.main", *words[1:], "--host=127.0.0.1", f"--port={port}"]
    with (place / "tensorboard.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        assert "TensorBoard" in answer(f"http://127.0.0.1:{port}/", server)
    finally:
        kill_tree(server.pid)
        server.wait()


def answer(address: str, server: subprocess.Popen) -> str:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as page:
                return page.read().decode()
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)


def elsewhere(place: Path, words: Sequence[str]) -> None:
    """`make` calls that are tried in other ways: each would set up an environment first.

    test: this is it. demo: takes minutes; both of its recipes run in tests/benchmarks/test_yardstick.py.
    smoke: tests/test_smoke.py. setup: by whoever runs this. format, lint, types, docs: part of test.
    """
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])


Way = Callable[[Path, Sequence[str]], None]
WAYS: list[tuple[str, Way]] = [
    (r"make (demo|smoke|test|setup|format|lint|types|docs)", elsewhere),
    (r"tensorboard --logdir \S+", tensorboard),
    (r"python -m pretrain configs/\S+.*", training),
    (r"python launchers/slurm\.py .*", slurm),
    (r"python launchers/local\.py .*", local),
    (r"python launchers/jobs\.py status.*", jobs),
    (r"python tools/loader\.py .*", loader),
    (r"python tools/(pack|surgery|sinder|visualize|evaluate|probe|registers)\.py .*", tool),
    (r"python (tools|launchers|benchmarks)/\w+\.py --help", tool),
]


def way_of(command: str) -> tuple[Way, list[str]]:
    """How a command is run, and its words."""
    words = words_of(command)
    words[0] = words[0].removeprefix(".venv/bin/").replace("python3", "python")
    for pattern, way in WAYS:
        if re.fullmatch(pattern, " ".join(words)):
            return way, words
    raise LookupError(f"README.md: {command}: no way to run it: add one to WAYS in tests/test_readme.py")


@pytest.mark.slow
@pytest.mark.usefixtures("other_programs")
@pytest.mark.parametrize("command", commands(), ids=lambda text: " ".join(text.split()[:3]))
def test_a_command_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way, words = way_of(command)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    threads = torch.get_num_threads()
    way(place, words)
    torch.set_num_threads(threads)


def test_the_readme_shows_commands() -> None:
    shown = "\n".join(commands())
    assert "-m pretrain configs/" in shown and "tools/pack.py" in shown and "make test" in shown


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(LookupError, match="no way to run it: add one"):
        way_of(".venv/bin/python tools/new.py a.pth")
