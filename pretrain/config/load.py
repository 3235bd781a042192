"""From YAML files and `key=value` overrides to a checked `Config`, and back to YAML. No torch.

Sources are merged one at a time, base files first, so that an error names the file it comes from.
"""

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config import checks
from pretrain.config.fit import fit
from pretrain.config.home import expand_home
from pretrain.config.keys import flatten, settings
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.redaction import holds_secret

COMMAND_LINE = "command line"
OVERRIDE = re.compile(r"(?P<key>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)=(?P<value>.*)", re.DOTALL)
ITEM = re.compile(r"[A-Za-z_][\w.]*(\[|\.\d)")  # of a list: data.sources[0], data.sources.0
MAX_DEPTH = 64  # sections within sections; the schema has four
INTERPOLATION = re.compile(r"(\\*)\$\{")  # with the backslashes before it

# of PyYAML's constructors: a date of month 99, an alias of itself, brackets a thousand deep
YAML_VALUE_FAULTS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


class ConfigError(InputError):
    """A config or override that cannot be used: `source: section.key: what is wrong`."""


class Source(NamedTuple):
    """Settings of one file or one override."""

    name: str
    values: DictConfig


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    cluster_file: Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """The checked config of a YAML file, its `base:` files and `key=value` overrides.

    Args:
        path: of the file.
        overrides: laid over the file.
        cluster_file: a person's defaults for section `cluster`, laid under the file; need not exist.
        options: settings by section and name, such as {"cluster": {"nodes": 8}}, laid over everything.

    Raises:
        ConfigError: with one line that names the file (or the command line), the key and the fault.
    """
    sources = [*_read_files(Path(path)), *(_read_override(text) for text in overrides)]
    if cluster_file is not None and cluster_file.exists():
        sources.insert(0, _source(str(cluster_file), {"cluster": _read_yaml(cluster_file, None)}))
    if options:
        sources.append(_source(COMMAND_LINE, dict(options)))
    cfg = expand_home(_resolve(_merge(sources), sources))
    try:
        checks.check(cfg)
    except ValueError as error:
        raise _blame(str(error), sources) from error
    return cfg


def config_text(cfg: Config) -> str:
    """The complete config as YAML, itself a valid config."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(asdict(cfg))))


def save_config(cfg: Config, path: str | Path) -> None:
    """Write `config_text` in one step: a reader sees the old file or the new one, never a part.

    A config with a password is for its owner alone, whatever the umask.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    mode = 0o600 if holds_secrets(cfg) else 0o666
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(config_text(cfg))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def holds_secrets(cfg: Config) -> bool:
    """Whether a setting holds a password: in an address, a command, or a line of `cluster.setup`."""
    return any(holds_secret(str(value)) for value in settings(cfg).values())


def diff_configs(old: Config, new: Config) -> list[str]:
    """One line per setting that differs: `optim.lr: 0.001 -> 0.002`."""
    before, after = settings(old), settings(new)
    keys = before | after  # free settings may stand in one of the two
    changed = [key for key in keys if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed]


def _read_files(path: Path, chain: tuple[Path, ...] = ()) -> list[Source]:
    """The sources of a file: its bases in order, each after its own bases, then the file."""
    if path.resolve() in [link.resolve() for link in chain]:
        raise ConfigError(f"{chain[0]}: base: goes in a circle: {' -> '.join(map(str, (*chain, path)))}")
    content = _read_yaml(path, asked_by=chain[-1] if chain else None)
    bases = _base_paths(content.pop("base", []), path)
    sources = [source for base in bases for source in _read_files(base, (*chain, path))]
    return [*sources, _source(str(path), content)]


def _base_paths(base: object, path: Path) -> list[Path]:
    """The files named by `base:`, relative to the file that names them."""
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: base: needs a file name or a list of file names")
    return [Path(os.path.normpath(path.parent / name)) for name in names]


def _read_yaml(path: Path, asked_by: Path | None) -> dict[Any, Any]:
    """A file's YAML as a dictionary, interpolations unresolved."""
    try:
        content = OmegaConf.load(io.StringIO(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_line(error)}{_yaml_fault(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: {error.reason} at byte {error.start}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_fault(error)}") from error
    except OSError as error:
        raise _unreadable(path, error, asked_by) from error
    except YAML_VALUE_FAULTS as error:
        raise ConfigError(f"{path}: {_value_fault(error)}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: must hold `section:` mappings, not a list")
    return cast(dict[Any, Any], OmegaConf.to_container(content, resolve=False))


def _unreadable(path: Path, error: OSError, asked_by: Path | None) -> ConfigError:
    """A file that cannot be read; without an errno it is OmegaConf's complaint about a bare value."""
    fault = f"{error.strerror}" if error.errno else "must hold `section:` mappings, not a single value"
    return ConfigError(f"{asked_by}: base: {path}: {fault}" if asked_by else f"{path}: {fault}")


def _read_override(text: str) -> Source:
    """One `key=value` of the command line; the value is YAML, and nothing after `=` is empty text."""
    match = OVERRIDE.fullmatch(text)
    if match is None:
        hint = "; a list is given as a whole" if ITEM.match(text) else ""
        raise ConfigError(f"{COMMAND_LINE}: {text!r} is not key=value (for example optim.lr=0.001){hint}")
    key, value = match["key"], match["value"]
    if key.count(".") >= MAX_DEPTH:
        raise ConfigError(f"{COMMAND_LINE}: {key[:40]}...: no such key")
    try:
        values = OmegaConf.from_dotlist([text if value else f"{key}=''"])
    except yaml.YAMLError as error:
        hint = '; quote items that hold braces: ["/d/{000..099}.tar"]' if "{" in value else ""
        raise ConfigError(f"{COMMAND_LINE}: {key}: {_yaml_fault(error)}{hint}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{COMMAND_LINE}: {key}: {_first_line(error)}") from error
    except YAML_VALUE_FAULTS as error:
        raise ConfigError(f"{COMMAND_LINE}: {key}: {_value_fault(error)}") from error
    return _source(COMMAND_LINE, cast(dict[Any, Any], OmegaConf.to_container(values, resolve=False)))


def _source(name: str, content: dict[Any, Any]) -> Source:
    """Settings whose keys all exist in the schema."""
    try:
        return Source(name, OmegaConf.create(fit(content, Config)))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _merge(sources: Sequence[Source]) -> DictConfig:
    """The schema's defaults with each source laid over them in turn."""
    merged = OmegaConf.structured(Config)
    for source in sources:
        try:
            merged = OmegaConf.merge(merged, source.values)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source.name}: {_fault(error)}") from error
    return cast(DictConfig, merged)


def _resolve(merged: DictConfig, sources: Sequence[Source]) -> Config:
    """Frozen dataclasses, interpolations replaced by their values."""
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise _blame(_fault(error), sources) from error


def _blame(fault: str, sources: Sequence[Source]) -> ConfigError:
    """A fault found after merging, with the last source that set its key (else the config file itself)."""
    key = re.split(r"[:\[\s]", fault, maxsplit=1)[0]
    files = [source.name for source in sources if source.name != COMMAND_LINE]
    setters = [source.name for source in sources if key in dict(flatten(_plain(source.values)))]
    return ConfigError(f"{(setters or files)[-1]}: {fault}")


def _plain(values: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(values, resolve=False))


def _fault(error: OmegaConfBaseException) -> str:
    """OmegaConf's message in one line, after the full key."""
    return f"{error.full_key}: {_first_line(error)}" if error.full_key else _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: " if mark is not None else ""


def _yaml_fault(error: yaml.YAMLError) -> str:
    return f"not valid YAML: {' '.join(str(getattr(error, 'problem', None) or error).split())}"


def _value_fault(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "not valid YAML: nested too deep, or an alias of itself"
    return f"not valid YAML: a value cannot be read ({_first_line(error)}); put text in quotes"


def _escape(value: Any) -> Any:
    """Plain text kept plain: `${` would be read as an interpolation, backslashes before it as escapes."""
    if isinstance(value, dict):
        return {name: _escape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value
