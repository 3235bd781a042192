"""Wrong input gets one line and exit status 2, and printing a config needs no torch."""

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from pretrain import cli
from pretrain.config.load import load_config

TEXTS = {
    "unknown key": (
        "dino_head: {knd: mlp}",
        "x.yaml: dino_head.knd: no such key; did you mean dino_head.kind?",
    ),
    "unknown section": ("heads: {}", "x.yaml: heads: no such key; known here: run, model,"),
    "key of another section": ("run: {lr: 1}", "x.yaml: run.lr: no such key; did you mean optim.lr?"),
    "fraction for an integer": ("run: {steps: 3.5}", "x.yaml: run.steps: Value '3.5' of type 'float'"),
    "switch for an integer": ("run: {steps: true}", "x.yaml: run.steps: Value 'True' of type 'bool'"),
    "text for a number": ("optim: {lr: abc}", "x.yaml: optim.lr: Value 'abc' of type 'str'"),
    "text for a switch": ("log: {tensorboard: perhaps}", "x.yaml: log.tensorboard: Value 'perhaps' is not"),
    "null for a number": ("run: {steps: null}", "x.yaml: run.steps: Incompatible value 'None'"),
    "bad choice": (
        "dino_head: {kind: x}",
        "x.yaml: dino_head.kind: Invalid value 'x', expected one of ['mlp', ",
    ),
    "value for a section": (
        "run: 3",
        "x.yaml: run: is a section with the keys dir, steps, seed, ",
    ),
    "mapping for a value": ("run: {dir: {a: b}}", "x.yaml: run.dir: needs one value, got {'a': 'b'}"),
    "mapping for a list": ("data: {shards: {a: b}}", "x.yaml: data.shards: needs a list, for example [a, b]"),
    "text in a list of numbers": ("mask: {ratio: [a, 1]}", "x.yaml: mask.ratio[0]: Value 'a' of type 'str'"),
    "not a finite number": ("optim: {lr: .nan}", "x.yaml: optim.lr: must be finite, got nan"),
    "contradiction": ("run: {steps: 5}", "x.yaml: optim.warmup_steps: 12500 is not below run.steps=5"),
    "missing value": ("run: {dir: '???'}", "x.yaml: run.dir: ??? stands for a missing value"),
    "broken YAML": ("run:\n\tsteps: 3", "x.yaml: line 2: not valid YAML: found character"),
    "duplicate key": (
        "run: {seed: 1}\nrun: {seed: 2}",
        "x.yaml: line 2: not valid YAML: found duplicate key run",
    ),
    "control character": ("run: \x01", "x.yaml: not valid YAML: unacceptable character"),
    "code in a tag": (
        "run: {dir: !!python/object/apply:os.system [touch harm]}",
        "x.yaml: line 1: not valid YAML: could not determine a constructor for the tag",
    ),
    "wrong tag": ("run: {steps: !!int abc}", "x.yaml: not valid YAML: a value cannot be read"),
    "no such day": ("run: {dir: !!timestamp x}", "x.yaml: not valid YAML: a value cannot be read"),
    "switch of another kind": ("run: {seed: !!bool 7}", "x.yaml: not valid YAML: a value cannot be read"),
    "number of 5000 digits": (
        "run: {seed: " + 5000 * "9" + "}",
        "x.yaml: not valid YAML: a value cannot be read",
    ),
    "number of 400 digits": ("run: {seed: " + 400 * "9" + "}", "x.yaml: run.seed: must be below 2^63"),
    "brackets without end": ("run: " + 3000 * "[" + 3000 * "]", "x.yaml: not valid YAML: nested too deep"),
    "aliases that multiply": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]\n" for a, b in pairwise("abcdefgh")),
        "x.yaml: line 1: not valid YAML: YAML node expansion exceeds",
    ),
    "zero byte": ('run: {dir: "a\\0b"}', "x.yaml: run.dir: holds a zero byte; remove it"),
    "reference for a section": ("run: ${model}", "x.yaml: run: is a section with the keys dir, steps"),
    "unknown key of a source": (
        "data: {sources: [{shards: a, wieght: 1}]}",
        "x.yaml: data.sources[0].wieght: no such key; did you mean data.sources[0].weight?",
    ),
    "list instead of sections": ("- a", "x.yaml: must hold `section:` mappings, not a list"),
    "text instead of sections": ("abc", "x.yaml: abc: no such key"),
    "number instead of sections": ("3", "x.yaml: must hold `section:` mappings"),
    "base that does not exist": ("base: no.yaml", "x.yaml: base: no.yaml: No such file or directory"),
    "base that is not a name": ("base: 3", "x.yaml: base: needs a file name or a list of file names"),
    "base that names itself": ("base: x.yaml", "x.yaml: base: goes in a circle: x.yaml -> x.yaml"),
    "reference to nothing": ("run: {dir: '${a.b}'}", "x.yaml: run.dir: Interpolation key 'a.b' not found"),
    "unset variable": ("run: {dir: '${oc.env:UNSET_}'}", "x.yaml: run.dir: KeyError raised while resolving"),
    "broken reference": ("run: {dir: '${a'}", "x.yaml: run.dir: no viable alternative at input"),
    "reference of the wrong type": ("run: {steps: '${run.dir}'}", "x.yaml: run.steps: While dereferencing"),
}

COMMANDS = {
    "no file": ("no.yaml", "no.yaml: no such file"),
    "near file": ("configs/y.yml", "configs/y.yml: no such file; did you mean configs/y.yaml?"),
    "recipe by its name": ("y", "y: no such file; did you mean configs/y.yaml?"),
    "folder": ("configs", "configs: Is a directory"),
    "not text": ("binary", "binary: not a text file"),
    "no config": ("", "command line: the following arguments are required: CONFIG ("),
    "unknown option": ("ok.yaml --nodes", "command line: unrecognized arguments: --nodes"),
    "shortened option": ("ok.yaml --print", "command line: unrecognized arguments: --print"),
    "option as an override": ("ok.yaml -- --foo", "command line: '--foo' is not key=value"),
    "no equals sign": ("ok.yaml run.steps", "command line: 'run.steps' is not key=value"),
    "empty key": ("ok.yaml =3", "command line: '=3' is not key=value"),
    "empty part of a key": ("ok.yaml run..steps=3", "command line: 'run..steps=3' is not key=value"),
    "index into a list": ("ok.yaml data.shards[0]=a", "command line: 'data.shards[0]=a' is not key=value"),
    "unknown key": ("ok.yaml optim.lrr=1", "command line: optim.lrr: no such key; did you mean optim.lr?"),
    "key below a value": ("ok.yaml run.steps.x=1", "command line: run.steps: needs one value, got {'x': 1}"),
    "empty number": ("ok.yaml run.steps=", "command line: run.steps: Value '' of type 'str'"),
    "fraction": ("ok.yaml run.steps=3.5", "command line: run.steps: Value '3.5' of type 'float'"),
    "unclosed list": ("ok.yaml data.shards=[a", "command line: data.shards: not valid YAML"),
    "braces in a list": (
        "ok.yaml data.shards=[{0..4}.tar]",
        "command line: data.shards: not valid YAML",
    ),
    "wrong tag": ("ok.yaml run.steps=!!int<x>", "command line: run.steps: not valid YAML"),
    "not Unicode": ("ok.yaml run.dir=\udcff", "command line: run.dir: not valid YAML"),
    "key without end": ("ok.yaml " + 2000 * "a." + "b=1", "command line: a.a.a."),
    "base": ("ok.yaml base=x.yaml", "command line: base: no such key"),
}

IN_A_PROCESS = [
    *(
        "unknown key",
        "bad choice",
        "fraction for an integer",
        "broken YAML",
        "duplicate key",
        "contradiction",
    ),
    *("base that names itself", "unset variable", "not a finite number", "value for a section"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "y.yaml").touch()
    (tmp_path / "ok.yaml").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    return tmp_path


def assert_one_line(status: int, out: str, err: str, expected: str) -> None:
    assert (status, out) == (2, "")
    assert err.startswith(f"pretrain: {expected}"), err
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("name", TEXTS)
def test_wrong_file(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = TEXTS[name]
    (folder / "x.yaml").write_text(text)
    status = cli.main(["x.yaml"])
    assert_one_line(status, *capsys.readouterr(), expected)


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, expected = COMMANDS[name]
    status = cli.main(command.split())
    assert_one_line(status, *capsys.readouterr(), expected)


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_wrong_file_in_a_process(name: str, folder: Path) -> None:
    text, expected = TEXTS[name]
    (folder / "x.yaml").write_text(text)
    result = in_process("x.yaml")
    assert_one_line(result.returncode, result.stdout, result.stderr, expected)


def test_wrong_command_in_a_process() -> None:
    result = in_process("ok.yaml", "--nodes", "8", "run.steps=3")
    expected = "command line: unrecognized arguments: --nodes"
    assert_one_line(result.returncode, result.stdout, result.stderr, expected)


def in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_print_config_is_a_config_whatever_the_order(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = (
        "ok.yaml run.seed=3 --print-config",
        "ok.yaml --print-config run.seed=3",
        "--print-config ok.yaml run.seed=3",
    )
    printed = set()
    for order in orders:
        assert cli.main(order.split()) == 0
        printed.add(capsys.readouterr().out)
    (folder / "printed.yaml").write_text(*printed)
    assert load_config("printed.yaml") == load_config("ok.yaml", ["run.seed=3"])


def test_print_config_is_quick_and_imports_no_torch() -> None:
    script = (
        "import sys; from pretrain.cli import main; status = main(['ok.yaml', '--print-config']); "
        "sys.exit(status or ('torch' in sys.modules) or ('numpy' in sys.modules))"
    )
    start = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0
    assert (
        time.perf_counter() - start < 5
    )  # about 0.15 s alone; a torch import on a busy machine is the failure


def test_warnings_are_printed_and_training_gets_the_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_train", lambda cfg: cfg.run.seed)
    assert cli.main(["ok.yaml", "run.seed=7", "dino_head.kind=rmlp"]) == 7
    assert capsys.readouterr().err.startswith("pretrain: warning: dino_head.kind: RMLP heads do not learn")


def test_an_interrupt_is_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(cfg: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_train", interrupted)
    assert cli.main(["ok.yaml"]) == 130
    assert capsys.readouterr().err == "pretrain: interrupted\n"


def test_errors_in_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cfg: object) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "_train", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["ok.yaml"])
