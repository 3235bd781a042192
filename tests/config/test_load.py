"""Files, bases and overrides become one frozen config, and it can be written and read back."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.load import ConfigError, config_text, diff_configs, load_config, save_config
from pretrain.config.schema import Config, DataConfig, RunConfig


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def test_an_empty_file_is_the_schema(folder: Path) -> None:
    assert load_config(write("a.yaml", "")) == Config()


def test_later_sources_win(folder: Path) -> None:
    write("deep/a.yaml", "run: {steps: 20000, seed: 1}\noptim: {lr: 0.1}")
    write("deep/b.yaml", "base: a.yaml\nrun: {seed: 2}")
    write("c.yaml", "run: {dir: from_c}")
    path = write("d.yaml", "base: [deep/b.yaml, c.yaml]\noptim: {lr: 0.3}")
    cfg = load_config(path, ["run.dir=here", "optim.lr=0.4", "optim.lr=0.5"])
    assert (cfg.run.steps, cfg.run.seed, cfg.run.dir, cfg.optim.lr) == (20000, 2, "here", 0.5)


def test_one_base_may_be_reached_twice(folder: Path) -> None:
    write("a.yaml", "run: {seed: 1}")
    write("b.yaml", "base: a.yaml\nrun: {seed: 2}")
    assert load_config(write("c.yaml", "base: [b.yaml, a.yaml]")).run.seed == 1


def test_a_circle_of_bases_is_shown(folder: Path) -> None:
    write("a.yaml", "base: b.yaml")
    write("b.yaml", "base: a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml: base: goes in a circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load_config("a.yaml")


def test_the_result_is_frozen_and_plain(folder: Path) -> None:
    cfg = load_config(write("a.yaml", ""))
    assert type(cfg.optim.lr) is float and type(cfg.data.shards) is list
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.run.steps = 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3", ".001"])
def test_floats_in_all_spellings(folder: Path, text: str) -> None:
    assert load_config(write("a.yaml", f"optim: {{lr: {text}}}")).optim.lr == 0.001
    assert load_config(write("a.yaml", ""), [f"optim.lr={text}"]).optim.lr == 0.001


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.shards=[a.tar,b.tar]", ["a.tar", "b.tar"]),
        ("data.shards=a.tar", ["a.tar"]),
        ("data.shards=/d/{000000..004999}.tar", ["/d/{000000..004999}.tar"]),
        ('data.shards=["/d/{000000..004999}.tar", b.tar]', ["/d/{000000..004999}.tar", "b.tar"]),
        ("data.shards=/d/train-*.tar", ["/d/train-*.tar"]),
    ],
)
def test_lists_on_the_command_line(folder: Path, override: str, expected: list[str]) -> None:
    assert load_config(write("a.yaml", ""), [override]).data.shards == expected


def test_empty_text_and_null_on_the_command_line(folder: Path) -> None:
    path = write("a.yaml", "model: {init_from: x.safetensors}")
    cfg = load_config(path, ["model.init_from=", "model.layer_scale=null"])
    assert (cfg.model.init_from, cfg.model.layer_scale) == ("", None)


def test_a_value_may_hold_an_equals_sign(folder: Path) -> None:
    assert load_config(write("a.yaml", ""), ["run.dir=runs/lr=3"]).run.dir == "runs/lr=3"


def test_interpolations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    path = write("a.yaml", "run: {dir: '${oc.env:SCRATCH}/${model.arch}', steps: '${optim.warmup_steps}0'}")
    cfg = load_config(path)
    assert (cfg.run.dir, cfg.run.steps) == ("/scratch/vit_large", 125_000)
    write("b.yaml", config_text(cfg))
    monkeypatch.delenv("SCRATCH")
    assert load_config("b.yaml") == cfg  # values are written, not what they were made from


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])).filter(lambda t: t != "???")


@settings(max_examples=40, deadline=None)
@given(
    folder=text.filter(str.strip).filter(lambda folder: not folder.startswith("~/")),
    shards=st.lists(text.filter(bool), min_size=1),
    seed=st.integers(min_value=0, max_value=2**63 - 1),
)
def test_any_text_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, folder: str, shards: list[str], seed: int
) -> None:
    cfg = Config(run=RunConfig(dir=folder, seed=seed), data=DataConfig(shards=shards))
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    save_config(cfg, path)
    assert load_config(path) == cfg


def test_a_home_is_expanded_where_the_shell_leaves_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["run.dir=~/runs/a", "model.init_from=~/a.pth", "checkpoint.resume_from=~/runs/b"]
    cfg = load_config(write("a.yaml", ""), paths)
    assert (cfg.run.dir, cfg.model.init_from) == ("/home/me/runs/a", "/home/me/a.pth")
    assert cfg.checkpoint.resume_from == "/home/me/runs/b"
    for other in ("a~/b", "~", "~x"):  # names of folders
        assert load_config("a.yaml", [f"run.dir='{other}'"]).run.dir == other


@pytest.mark.parametrize(
    "folder",
    ["1e-3", "007", "true", "null", "${model.arch}", "\\${", "\\\\${a}", "a: b", "# a", " a ", "=", "é"],
)
def test_text_that_looks_like_something_else(tmp_path: Path, folder: str) -> None:
    cfg = Config(run=RunConfig(dir=folder))
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(Config(), path)
    save_config(Config(run=RunConfig(seed=3)), path)
    assert load_config(path).run.seed == 3
    assert list(tmp_path.iterdir()) == [path]


def test_differences(folder: Path) -> None:
    path = write("a.yaml", "")
    old, new = load_config(path), load_config(path, ["optim.lr=0.002", "data.global_crops.scale=[0.5,1]"])
    assert diff_configs(old, old) == []
    assert diff_configs(old, new) == [
        "data.global_crops.scale: [0.32, 1.0] -> [0.5, 1.0]",
        "optim.lr: 0.004 -> 0.002",
    ]


@pytest.mark.parametrize(
    ("base", "top", "overrides", "blamed"),
    [
        ("run: {stepps: 3}", "", [], "base.yaml: run.stepps: no such key; did you mean run.steps?"),
        ("", "run: {stepps: 3}", [], "top.yaml: run.stepps: no such key; did you mean run.steps?"),
        ("", "", ["run.stepps=3"], "command line: run.stepps: no such key; did you mean run.steps?"),
        ("optim: {beta2: 2}", "", [], "base.yaml: optim.beta2: must be at least 0 and below 1, got 2.0"),
        (
            "optim: {beta2: 2}",
            "",
            ["optim.beta2=3"],
            "command line: optim.beta2: must be at least 0 and below 1",
        ),
        ("run: {dir: '${nope}'}", "", [], "base.yaml: run.dir: Interpolation key 'nope' not found"),
        ("", "optim: {warmup_steps: 9}", ["run.steps=9"], "top.yaml: optim.warmup_steps: 9 is not below"),
        ("", "", ["model.arch=custom"], "top.yaml: model.embed_dim: must be given with model.arch=custom"),
    ],
)
def test_errors_name_the_source(folder: Path, base: str, top: str, overrides: list[str], blamed: str) -> None:
    write("base.yaml", base)
    write("top.yaml", f"base: base.yaml\n{top}")
    with pytest.raises(ConfigError) as error:
        load_config("top.yaml", overrides)
    assert str(error.value).startswith(blamed)


def test_a_persons_cluster_file_lies_under_the_config_and_options_lie_over_all(tmp_path: Path) -> None:
    mine, config = tmp_path / "cluster.yaml", tmp_path / "run.yaml"
    mine.write_text("partition: mine\naccount: mine\nqos: mine\ntime: '90'\n")
    config.write_text("cluster: {account: run, qos: run}\n")
    cfg = load_config(
        config, ["cluster.qos=line"], mine, {"cluster": {"nodes": 3, "time": "1:30:00"}}
    ).cluster
    assert (cfg.partition, cfg.account, cfg.qos, cfg.time, cfg.nodes) == ("mine", "run", "line", "1:30:00", 3)
    mine.write_text("partitoin: mine\n")
    with pytest.raises(
        ConfigError, match=r"cluster.yaml: cluster.partitoin: no such key; did you mean cluster.part"
    ):
        load_config(config, [], mine)


@pytest.mark.parametrize("time", ["90", "1:30:00"])
def test_a_time_that_yaml_reads_as_a_number_is_refused(time: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"cluster: {{time: {time}}}\n")
    with pytest.raises(ConfigError, match=r"cluster\.time: write it in quotes, as '1:30:00'"):
        load_config(config)


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "KEY", "DB_PASSWORD", "MY_PWD"])
def test_a_secret_of_the_environment_is_not_written_into_the_runs_config(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "the-secret")
    address = "https://me:${oc.env:" + name + "}@host/x.tar"
    for path, overrides in [
        (write("a.yaml", f"data: {{shards: ['{address}']}}"), []),
        (write("b.yaml", ""), [f"data.shards={address}"]),
    ]:
        with pytest.raises(ConfigError, match=rf"data\.shards: would write the secret in \${name}") as error:
            load_config(path, overrides)
        assert "the-secret" not in str(error.value)


@pytest.mark.parametrize("name", ["SCRATCH", "KEYBOARD", "MONKEY_DIR", "PWD_OF_DATA"])
def test_other_variables_may_stand_in_a_config(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "/there")
    assert load_config(write("a.yaml", f"run: {{dir: '${{oc.env:{name}}}/x'}}")).run.dir == "/there/x"
