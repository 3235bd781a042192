"""Who may import whom: the table of docs/architecture.md, held against the source."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROWS = [  # a module imports from lower rows, from its own package, or along an arrow of its row
    {
        "config",
        "batch",
        "projection",
        "seeding",
        "distributed",
        "sharded",
        "errors",
        "command_line",
        "ranks",
        "records",
        "redaction",
        "revision",
        "faults",
        "session",
        "processes",
    },
    {"models", "heads", "losses", "method", "optim", "data"},
    {"engines", "run", "export", "surgery", "cluster"},
    {"analysis", "sinder", "probing", "registers"},
    {"start", "report", "train", "dry_run", "dry_run_table", "preflight", "job", "cli", "__main__"},
]
ARROWS = {
    *{(name, "errors") for name in ("config", "ranks", "faults", "command_line")},
    *{("faults", "command_line"), ("faults", "records"), ("records", "command_line")},
    *{(name, "redaction") for name in ("config", "command_line", "records", "faults")},
    *{("session", name) for name in ("config", "distributed", "errors", "faults", "ranks")},
    *{("method", "models"), ("method", "heads"), ("method", "losses")},
    *{("engines", "run"), ("cluster", "run"), ("export", "surgery"), ("export", "run"), ("surgery", "run")},
    ("sinder", "analysis"),
    ("probing", "analysis"),
    ("registers", "analysis"),
    *{
        ("train", "start"),
        ("train", "report"),
        ("dry_run", "start"),
        ("dry_run", "dry_run_table"),
        ("cli", "dry_run"),
        ("job", "train"),
        ("job", "preflight"),
        ("cli", "train"),
        ("__main__", "cli"),
    },
}
NO_TORCH = [
    "redaction",
    *("config", "cluster", "job", "cli", "command_line", "seeding", "errors", "ranks", "records", "revision"),
    *("data.shards", "data.index", "data.order", "data.remote", "data.retry", "data.cache"),
]
NESTED = {  # only for speed: these answer before torch is imported
    ("pretrain.cli", "pretrain.train"),
    ("pretrain.cli", "pretrain.dry_run"),
    ("pretrain.job", "pretrain.train"),
    ("pretrain.job", "pretrain.preflight"),
    ("pretrain.seeding", "torch"),
    ("pretrain.engines.deepspeed_start", "pretrain.engines.deepspeed_engine"),  # not always installed
    *{("pretrain.export.foreign_models", name) for name in ("transformers", "timm")},  # likewise
    ("pretrain.surgery.consolidate", "deepspeed.utils.zero_to_fp32"),  # likewise
    ("pretrain.models.packed_attention", "xformers"),  # likewise
    ("pretrain.models.attention", "pretrain.models.packed_attention"),  # torch.compile comes along
}
IMPORT_NAMES = {"opencv-python-headless": "cv2", "scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}

Imports = dict[str, list[tuple[str, bool]]]  # module -> (imported module, whether at the top of the file)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(tree: ast.Module, known: set[str]) -> Iterator[tuple[str, bool]]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in inside if name in known] or [node.module]
        yield from ((name, node in tree.body) for name in names)


@pytest.fixture(scope="module")
def graph() -> Imports:
    paths = {module_name(path): path for path in (ROOT / "pretrain").rglob("*.py")}
    trees = {name: ast.parse(path.read_text()) for name, path in paths.items()}
    return {name: list(imports_of(tree, set(trees))) for name, tree in trees.items()}


def part(module: str) -> str:
    return module.split(".")[1]


def row(name: str) -> int:
    return next(index for index, members in enumerate(ROWS) if name in members)


def allowed(importer: str, imported: str) -> bool:
    below = row(imported) < row(importer)
    return importer == imported or below or (importer, imported) in ARROWS


def test_layers(graph: Imports) -> None:
    edges = [
        (importer, imported)
        for importer, targets in graph.items()
        for imported, _ in targets
        if importer != "pretrain" and imported.startswith("pretrain.")
    ]
    assert [edge for edge in edges if not allowed(part(edge[0]), part(edge[1]))] == []


def test_scripts_are_imported_by_nobody(graph: Imports) -> None:
    scripts = {"launchers", "tools", "benchmarks", "tests"}
    assert [pair for pair in pairs(graph) if pair[1].partition(".")[0] in scripts] == []


def test_no_cycles(graph: Imports) -> None:
    TopologicalSorter({name: {target for target, _ in found} for name, found in graph.items()}).prepare()


def test_no_torch_where_a_login_node_reads(graph: Imports) -> None:
    roots = [name for name in graph for free in NO_TORCH if f"{name}.".startswith(f"pretrain.{free}.")]
    reached, found = set(), list(roots)
    while found:
        name = found.pop()
        if name not in reached:
            reached.add(name)
            found += [target for target, at_top in graph.get(name, []) if at_top]
    assert roots and not [name for name in reached if name.partition(".")[0] in ("torch", "torchvision")]


def test_imports_stand_at_the_top(graph: Imports) -> None:
    nested = {(name, target) for name, found in graph.items() for target, at_top in found if not at_top}
    assert nested <= NESTED


def test_no_file_hides_another_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(line for extra in optional for line in extra)]
    packages = {line.partition(";")[0].strip().split(">")[0].split("<")[0] for line in requirements}
    taken = sys.stdlib_module_names | {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in packages}
    files = [
        path
        for folder in ("tools", "launchers", "benchmarks", "pretrain")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert files and [path for path in files if path.stem in taken] == []


def pairs(graph: Imports) -> list[tuple[str, str]]:
    return [(name, target) for name, found in graph.items() for target, _ in found]
