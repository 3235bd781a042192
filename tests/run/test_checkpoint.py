import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.errors import InputError
from pretrain.run.checkpoint import Checkpoints, load_checkpoint
from pretrain.run.checkpoint_folder import complete_checkpoints, newest_checkpoint

State = dict[str, dict[str, Tensor]]


def state_of(value: float) -> State:
    weight = torch.full((3, 4), float(value))
    return {
        "model": {"student.weight": weight, "teacher.weight": -weight},
        "optim": {"weight.exp_avg": weight + 0.5, "weight.step": torch.tensor(float(value))},
    }


def save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save(step, state_of(step), {"position": step * 8}, {"step": step})


def loaded(path: Path) -> float:
    """The value that fills a checkpoint of `state_of`; all its tensors and documents must agree."""
    state = state_of(-1)
    data, run = load_checkpoint(path, state)
    value = state["optim"]["weight.step"].item()
    expected = state_of(value)
    assert all(torch.equal(state[part][n], t) for part, named in expected.items() for n, t in named.items())
    assert data["position"] == 8 * run["step"]
    return value


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


ODD_TENSORS = {
    "bf16": torch.randn(5, 7).bfloat16(),
    "int64": torch.tensor([2**62, -1]),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.25),
    "scalar_int": torch.tensor(2**53 + 1),
    "empty": torch.empty(0, 4),
    "not_finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    "transposed": torch.randn(4, 6).t(),
    "parameter": torch.nn.Parameter(torch.randn(3)),
    "a.name/with odd:signs": torch.randn(2),
}


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(10)
    model = {**ODD_TENSORS, "view": base[:5], "overlapping_view": base[2:]}
    path = Checkpoints(tmp_path, 3, 0).save(7, {"model": model, "optim": {}}, {"a": [1, None]}, {"b": "c"})
    into = {name: torch.ones_like(tensor) for name, tensor in model.items()}
    data, run = load_checkpoint(path, {"model": into, "optim": {}})
    assert all(bits(into[name]) == bits(tensor) for name, tensor in model.items())
    assert (data, run) == ({"a": [1, None]}, {"b": "c"})


def test_tensors_are_filled_in_place(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, 3, 0), 4)
    module = torch.nn.Linear(4, 3, bias=False)
    before = module.weight
    state = state_of(-1)
    state["model"]["student.weight"] = module.weight
    load_checkpoint(path, state)
    assert module.weight is before
    assert torch.equal(module.weight, torch.full((3, 4), 4.0))


def test_the_model_can_be_loaded_without_the_optimizer(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, 3, 0), 4)
    model = state_of(-1)["model"]
    load_checkpoint(path, {"model": model})
    assert torch.equal(model["teacher.weight"], torch.full((3, 4), -4.0))


def test_the_layout_on_disk(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, 3, 0), 10_000)
    assert names(tmp_path) == ["latest", "step_00010000"]
    assert names(path) == ["COMPLETE", "data.json", "model", "optim", "run.json"]
    assert (tmp_path / "latest").readlink() == Path("step_00010000")
    assert json.loads((path / "run.json").read_text()) == {"step": 10_000}
    assert loaded(tmp_path / "latest") == 10_000


def test_saving_and_loading_warn_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded(save(Checkpoints(tmp_path, 3, 0), 1))
    assert not caught


def test_pruning_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=30)
    for step in range(10, 91, 10):
        save(checkpoints, step)
    assert [int(p.name[5:]) for p in complete_checkpoints(tmp_path)] == [30, 60, 80, 90]
    assert loaded(tmp_path / "step_00000030") == 30


def test_pruning_never_removes_the_one_just_written(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, 1, 0), 50)
    assert loaded(save(Checkpoints(tmp_path, 1, 0), 20)) == 20
    assert loaded(save(Checkpoints(tmp_path, 0, 0), 30)) == 30


def test_a_removal_that_stops_halfway_leaves_no_checkpoint_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, 1, 0)
    save(checkpoints, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: (path / "model" / ".metadata").unlink())
        save(checkpoints, 2)
    assert complete_checkpoints(tmp_path) == [tmp_path / "step_00000002"]
    save(checkpoints, 3)
    assert names(tmp_path) == ["latest", "step_00000003"]


def test_newest_goes_by_step_and_ignores_the_link_and_incomplete_folders(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 5, 0)
    assert checkpoints.newest() is None
    for step in (9, 100_000_000, 99_999_999):
        save(checkpoints, step)
    save(checkpoints, 200_000_000).joinpath("COMPLETE").unlink()
    (tmp_path / "step_best").mkdir()
    assert checkpoints.newest() == tmp_path / "step_100000000"
    assert newest_checkpoint(tmp_path / "none") is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3, 0)
    save(checkpoints, 5)
    path = checkpoints.save(5, state_of(6), {"position": 48}, {"step": 6})
    assert loaded(path) == 6
    assert names(tmp_path) == ["latest", "step_00000005"]


def test_an_incomplete_folder_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "step_00000005" / "model").mkdir(parents=True)
    assert loaded(save(Checkpoints(tmp_path, 3, 0), 5)) == 5


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, 3, 0), 5)
    path.rename(tmp_path / "step_00000005.old")
    (tmp_path / "step_00000005.tmp").mkdir()
    assert loaded(Checkpoints(tmp_path, 3, 0).newest() or tmp_path) == 5
    assert names(tmp_path) == ["latest", "step_00000005"]


def test_what_a_killed_save_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "step_00000005.tmp" / "model").mkdir(parents=True)
    (tmp_path / "latest.tmp").symlink_to("step_00000004")
    Checkpoints(tmp_path, 3, 0)
    assert names(tmp_path) == []


@pytest.mark.parametrize("operation", ["rename", "replace", "touch", "symlink_to", "write_text", "mkdir"])
def test_a_save_that_fails_anywhere_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Each call of each file operation of a save fails in turn, also when the save replaces its own step."""
    checkpoints = Checkpoints(tmp_path, 1, 0)
    original = getattr(Path, operation)
    countdown = 0

    def fail_once(self: Path, *args: object, **kwargs: object) -> object:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, operation, fail_once)
    save(checkpoints, 1)
    failures = 0
    for call in range(1, 6):
        for step in (1, 2):
            countdown = call
            try:
                save(checkpoints, step)
            except InputError as error:
                failures += 1
                assert "No space left" in str(error) and "\n" not in str(error)
                newest = checkpoints.newest()
                assert newest is not None and f"the last good checkpoint is {newest}." in str(error)
            newest = checkpoints.newest()
            assert newest is not None and loaded(newest) == int(newest.name[5:])
            assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.old"))
    assert failures >= 2


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from pretrain.run.checkpoint import Checkpoints
from pretrain.errors import InputError

checkpoints = Checkpoints(Path(sys.argv[1]), 3, 0)
small, large = ({"model": {"w": torch.ones(n)}, "optim": {}} for n in (10, 1_000_000))
checkpoints.save(1, small, {}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # longer files are an OSError
try:
    checkpoints.save(2, large, {}, {})
except InputError as error:
    print(error)
"""


def python(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_is_one_line_that_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    lines = python(FULL_DISK, str(tmp_path)).splitlines()
    assert len(lines) == 1
    assert "saving step 2 failed ([Errno 27] File too large)" in lines[0]
    assert f"the last good checkpoint is {tmp_path / 'step_00000001'}" in lines[0]
    assert names(tmp_path) == ["latest", "step_00000001"]


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from pretrain.run.checkpoint import Checkpoints, load_checkpoint

PARTS = ("model", "optim")
torch.set_num_threads(1)  # no thread pool for the forked children to miss
folder, kills = Path(sys.argv[1]), int(sys.argv[2])

def state(value):
    return {part: {f"w{i}": torch.full((100, 1000), float(value)) for i in range(8)} for part in PARTS}

def save_until_killed(acknowledge):
    checkpoints = Checkpoints(folder, keep=2, keep_every=0)
    newest = checkpoints.newest()
    step = int(newest.name[5:]) if newest else 0
    while True:
        for step in (step, step + 1):  # the newest is saved again, then the next
            checkpoints.save(step, state(step), {"step": step}, {"step": step})
            os.write(acknowledge, step.to_bytes(8))

random.seed(int(sys.argv[3]))
midway = 0
for kill in range(kills):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_until_killed(writing)
    os.close(writing)
    first = os.read(reading, 8)
    time.sleep(random.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = first + os.read(reading, 1 << 16)
    os.close(reading)
    midway += any(folder.glob("*.tmp")) or any(folder.glob("*.old"))
    newest = Checkpoints(folder, keep=2, keep_every=0).newest()
    step = int(newest.name[5:])
    assert step >= int.from_bytes(acknowledged[-8:]), "an acknowledged checkpoint is lost"
    into = state(-1)
    data, run = load_checkpoint(newest, into)
    assert data == run == {"step": step}
    assert all((t == step).all() for named in into.values() for t in named.values()), "a mixed checkpoint"
print(midway)
"""


def test_a_kill_at_any_moment_leaves_the_newest_checkpoint_loadable(tmp_path: Path) -> None:
    killed_midway = int(python(KILLS, str(tmp_path), "10", str(os.getpid())))
    assert killed_midway > 0, "no kill fell into a save: the test shows nothing"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("student.weight"), "1 in it but not in the model (student.weight)"),
        (lambda m: m.update(extra=torch.zeros(1)), "1 not in it (extra)"),
        (lambda m: m.update({f"x{i}": torch.zeros(1) for i in range(9)}), "9 not in it (x0, x1, x2, ...)"),
        (
            lambda m: m.update({"student.weight": torch.zeros(3, 5)}),
            "1 of another shape or type (student.weight: float32 (3, 4) stored, float32 (3, 5) here)",
        ),
        (
            lambda m: m.update({"student.weight": torch.zeros(3, 4).half()}),
            "(student.weight: float32 (3, 4) stored, float16 (3, 4) here)",
        ),
    ],
)
@pytest.mark.parametrize("part", ["model", "optim"])
def test_another_model_is_refused_before_anything_is_filled(
    tmp_path: Path, part: str, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    other = "optim" if part == "model" else "model"
    state = {part: state_of(3)["model"], other: {"filled": torch.ones(2)}}
    path = Checkpoints(tmp_path, 3, 0).save(3, state, {}, {})
    into = {p: {name: torch.zeros_like(t) for name, t in named.items()} for p, named in state.items()}
    change(into[part])
    with pytest.raises(InputError) as caught:
        load_checkpoint(path, into)
    assert words in str(caught.value) and f"{path / part}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tensor.any() for named in into.values() for tensor in named.values())


def test_a_folder_that_is_no_complete_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, 3, 0), 1)
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"is not a complete checkpoint; name a step_\* folder"):
            load_checkpoint(wrong, state_of(0))
    (path / "COMPLETE").unlink()
    with pytest.raises(InputError, match="is not a complete checkpoint"):
        load_checkpoint(path, state_of(0))


@pytest.mark.parametrize("name", ["model/.metadata", "model/__0_0.distcp", "optim/__0_0.distcp", "run.json"])
@pytest.mark.parametrize("damage", ["missing", "half", "garbage"])
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, damage: str) -> None:
    path = save(Checkpoints(tmp_path, 3, 0), 1)
    contents = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(
            contents[: len(contents) // 2] if damage == "half" else b"x" * len(contents)
        )
    with pytest.raises(InputError, match=r"cannot be read .*; continue from another checkpoint") as caught:
        load_checkpoint(path, state_of(0))
    assert "\n" not in str(caught.value)


def test_only_tensors_are_saved(tmp_path: Path) -> None:
    state = state_of(1)
    state["optim"]["lr"] = 0.1  # type: ignore[assignment]
    with pytest.raises(TypeError, match="checkpoint tensor 'lr' is a float"):
        Checkpoints(tmp_path, 3, 0).save(1, state, {}, {})
    assert newest_checkpoint(tmp_path) is None


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match=r"cannot be used for checkpoints .*; set run\.dir"):
        Checkpoints(tmp_path / "run" / "checkpoints", 3, 0)


def test_ctrl_c_in_a_save_is_still_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path, 3, 0)
    save(checkpoints, 1)
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 2)
    assert checkpoints.newest() == tmp_path / "step_00000001"
    monkeypatch.undo()
    assert loaded(save(checkpoints, 2)) == 2  # over what the first attempt left


def test_an_asynchronous_save_writes_the_values_of_its_call(tmp_path: Path) -> None:
    state = {"model": {"w": torch.zeros(4_000_000), "turned": torch.zeros(300, 200).t()}, "optim": {}}
    with Checkpoints(tmp_path, 9, 0, asynchronous=True) as checkpoints:
        for step in (1, 2, 3):
            for tensor in state["model"].values():
                tensor.fill_(step)
            path = checkpoints.save(step, state, {}, {})
            state["model"]["w"].fill_(-step)  # long before 16 MB are written
            assert step == 1 or (tmp_path / f"step_{step - 1:08d}" / "COMPLETE").exists()
    for step in (1, 2, 3):
        load_checkpoint(tmp_path / f"step_{step:08d}", state)
        assert all((tensor == step).all() for tensor in state["model"].values())
    assert path == tmp_path / "step_00000003"
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in (1, 2, 3))]


def test_tensors_that_change_their_shape_are_copied_anew(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, 9, 0, asynchronous=True) as checkpoints:
        for step, w in ((1, torch.ones(3)), (2, torch.ones(5)), (3, torch.ones(5).half())):
            checkpoints.save(step, {"model": {"w": w}, "optim": {}}, {}, {})
    into = {"model": {"w": torch.zeros(5).half()}, "optim": {}}
    load_checkpoint(tmp_path / "latest", into)
    assert into["model"]["w"].all()


def test_a_failure_behind_training_is_raised_by_the_next_call(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3, 0, asynchronous=True)
    save(checkpoints, 1)
    checkpoints.finish()
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    save(checkpoints, 2)
    with pytest.raises(InputError, match=r"saving step 2 failed .*there is no earlier checkpoint") as caught:
        save(checkpoints, 3)
    assert "\n" not in str(caught.value)
    (tmp_path / "away").rename(tmp_path / "checkpoints")
    checkpoints.finish()  # told once
    save(checkpoints, 4)
    assert loaded(checkpoints.newest() or tmp_path) == 4


def test_the_exit_raises_a_failure_unless_another_error_is_under_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(InputError, match="saving step 1 failed"), Checkpoints(folder, 3, 0, True) as one:
        folder.rmdir()
        save(one, 1)
    with pytest.raises(KeyError), Checkpoints(folder, 3, 0, True) as one:
        folder.rmdir()
        save(one, 1)
        raise KeyError
    assert "saving step 1 failed" in capsys.readouterr().err
