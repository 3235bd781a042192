"""What no input may reach: a shell, a pickle, a file elsewhere, a secret in a log."""

import ast
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.config.load import ConfigError, load_config
from pretrain.data.reader import Reader
from pretrain.data.shards import list_shards
from pretrain.errors import InputError
from tests.data.packing import pack, packed, picture, write_tar

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for name in ("pretrain", "tools", "launchers", "benchmarks") for path in (ROOT / name).rglob("*.py")
]
CODE_RUNNERS = {
    *(
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "cPickle.load",
        "dill.load",
        "joblib.load",
        "marshal.loads",
    ),
    *(
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.load_all",
        "yaml.unsafe_load",
        "yaml.full_load",
        "eval",
        "exec",
    ),
}


def faults(tree: ast.AST) -> Iterator[str]:
    """Calls that run what they read."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in CODE_RUNNERS and "SafeLoader" not in ast.unparse(call):
            yield name
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield name
        yield from (word for word in ("shell", "allow_pickle") if keywords.get(word, "False") != "False")
        yield from (word for word in ("trust_remote_code",) if keywords.get(word, "False") != "False")


def test_nothing_runs_what_it_reads() -> None:
    assert len(SOURCES) > 200
    found = {str(path.relative_to(ROOT)): [*faults(ast.parse(path.read_text()))] for path in SOURCES}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "code",
    [
        *(
            "pickle.load(f)",
            "torch.load(f)",
            "torch.load(f, weights_only=False)",
            "yaml.load(f, yaml.Loader)",
        ),
        *("np.load(f, allow_pickle=True)", "subprocess.run(c, shell=True)", "os.system(c)", "eval(c)"),
    ],
)
def test_what_runs_what_it_reads_is_found(code: str) -> None:
    assert [*faults(ast.parse(code))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: {dir: !!python/object/apply:os.system ['touch harm']}", "python/object/apply:os.system"),
        ("run: {dir: !!python/name:os.system }", "python/name:os.system"),
        ("run: {dir: !!timestamp 2001-99-99}", "put text in quotes"),
        ("data: {shards: [[a]]}", "data.shards: needs a list of single values"),
        ("data: {global_crops: {scale: [0.3, [1]]}}", "scale: needs a list of single values"),
        ("run: &a {dir: *a}", "not valid YAML"),
        ("run: " + "[" * 5000, "not valid YAML"),
        ("run: {dir: '${oc.env:NO_SUCH_NAME}'}", "NO_SUCH_NAME"),
        ("run: {dir: '${oc.decode:x,y,z}'}", "run.dir"),
    ],
)
@pytest.mark.parametrize("name", ["main.yaml", "cluster.yaml"])
def test_a_config_runs_no_code(text: str, said: str, name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cluster = name == "cluster.yaml"
    (tmp_path / "main.yaml").write_text("" if cluster else text)
    section = text.replace("run: {dir", "{name", 1) if "run: {" in text else f"name: {text[:200]}"
    (tmp_path / "cluster.yaml").write_text(section if cluster else "")
    with pytest.raises(ConfigError) as caught:
        load_config("main.yaml", (), Path("cluster.yaml"))
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert cluster or said in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"main.yaml", "cluster.yaml"}


ODD_NAMES = ["../../harm", "/harm", "a/../../harm", "-rf", "$(touch harm)", "a b", "a\nb"]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A tar with odd names, and links that lead elsewhere."""
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/odd.tar"
    write_tar(path, [(f"{name}.jpg", picture(i)) for i, name in enumerate(ODD_NAMES)])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(tmp_path / "secret.jpg")
            tar.addfile(link)
    return path


def test_names_and_links_in_a_shard_lead_nowhere(odd: Path, tmp_path: Path) -> None:
    before = {*tmp_path.rglob("*")}
    reader = Reader([odd])
    items = [reader.read(0, i) for i in range(reader.sizes[0])]
    assert [item.image for item in items] == [picture(i) for i in range(len(ODD_NAMES))]
    assert {*tmp_path.rglob("*")} - before == {odd.with_name("odd.tar.idx")}


def test_packing_a_tar_writes_only_its_shards(odd: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.rglob("*")}
    pack(odd, tmp_path / "out")
    written = {*tmp_path.rglob("*")} - before
    assert all(path == tmp_path / "out" or path.is_relative_to(tmp_path / "out") for path in written)
    secret = (tmp_path / "secret.jpg").read_bytes()
    samples = packed(tmp_path / "out")
    assert len(samples) == len(ODD_NAMES) and secret not in [sample.image for sample in samples]
    assert not any(os.sep in sample.key or sample.key.startswith(".") for sample in samples)


def test_a_missing_shard_is_named_without_its_secrets() -> None:
    with pytest.raises(InputError) as caught:
        list_shards(["https://me:pw123456@host/x.tar?X-Amz-Signature=0123456789abcdef0123"], "data.shards")
    assert "pw123456" not in str(caught.value) and "0123456789abcdef" not in str(caught.value)
