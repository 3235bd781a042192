"""Odd values in documents: YAML and JSON as people, other programs and malice write them."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import yaml

Node = dict[Any, Any] | list[Any]

ODD = (
    *(None, True, False, 0, 1, -1, 3, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *(2**31, 2**63, 2**64, -(2**63), 10**40, "", " ", "a", "0", "-1", "1e999", "nan", "null", "???", "~"),
    *("${model.arch}", "${oc.env:HOME}", "${", "${a:", "$(touch harm)", "\\${x}", "{a,b", "{1..3}", "[", "*"),
    *(
        "../../harm",
        "/etc/hostname",
        "harm\nharm",
        "\x00",
        "\x85",
        "a" * 5000,
        "héé",
        "--help",
        "%j",
        "1:30:00",
    ),
    *([], {}, [[]], [None], {"a": 1}, {"a": {"b": []}}, [1, "a", None], {1: 2}, {None: None}, {"": 0}),
)
SNIPPETS = (
    *("!!python/object/apply:os.system ['touch harm']", "!!python/name:os.system", "!!python/tuple [1]"),
    *("!!binary aGFybQ==", "!!binary '*'", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp 2001-99-99"),
    *("2001-99-99", "2001-12-14T21:59:43Z", "!!int x", "!!float x", "!!bool x", "!!null x", "!unknown x"),
    *(
        "&a [*a]",
        "&a {a: *a}",
        "*missing",
        "{? [a] : b}",
        "{? {a: 1} : b}",
        "<<: 3",
        "{<<: [1]}",
        "0x",
        "0b2",
    ),
    *(
        "0o9",
        "1_0",
        "1:99",
        "@",
        "`",
        "%YAML 9.9",
        "---",
        "...",
        "|",
        ">-",
        "'",
        '"',
        '"\\x"',
        '"\\ud800"',
        "\t",
    ),
    *("[" * 300, "{a: " * 300, "[" * 5000, "- " * 200, "&a [x, x]\nb: &b [*a, *a]", "=", "\ufeff"),
)


def damage_tree(random: Random, tree: Any) -> Any:
    """One to three values replaced, removed, moved, repeated or renamed, in place."""
    for _ in range(random.choice((1, 1, 2, 3))):
        nodes = [node for node in _nodes(tree) if node]
        if nodes:
            _damage_node(random, random.choice(nodes), nodes)
    return tree


def damage_json(random: Random, content: bytes) -> bytes:
    """A JSON text with odd values; what is no JSON stays."""
    try:
        tree = json.loads(content)
    except ValueError:
        return content
    return json.dumps(damage_tree(random, tree)).encode()


def damage_yaml(random: Random, content: bytes) -> bytes:
    """A YAML text with odd values, or with a snippet in a place of a value or between lines."""
    if random.random() < 0.5:
        return yaml.dump(damage_tree(random, yaml.safe_load(content)), allow_unicode=True).encode()
    lines = content.decode().split("\n")
    row, snippet = random.randrange(len(lines)), random.choice(SNIPPETS)
    key, colon, _ = lines[row].partition(":")
    lines[row] = f"{key}: {snippet}" if colon and random.random() < 0.8 else snippet
    return "\n".join(lines).encode()


def odd_value(random: Random) -> Any:
    """A fresh copy: lists of it may be changed later."""
    value = random.choice(ODD)
    return type(value)(value) if isinstance(value, dict | list) else value


def _nodes(tree: Any) -> Iterator[Node]:
    if isinstance(tree, dict | list):
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _nodes(value)


def _damage_node(random: Random, node: Node, nodes: list[Node]) -> None:
    key = random.choice(list(node) if isinstance(node, dict) else range(len(node)))
    match random.randrange(5):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[random.choice(("harm", f"{key}x", "", 3, None, True, "a.b", "../x"))] = node.pop(key)
        case 2:
            other = random.choice(nodes)
            node[key] = json.loads(
                json.dumps(next(iter(other.values() if isinstance(other, dict) else other)), default=str)
            )
        case _:
            node[key] = odd_value(random)
