"""The names of shards that lie elsewhere, as given, as shown and as kept in the cache. No torch."""

import hashlib
import re
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pretrain.redaction import without_secrets

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
NAMED_SECRET = re.compile(  # of a parameter, a header or an option, however short
    r"(?i)((?:token|secret|password|passwd|signature|api_?key|access_?key)[=: ]+|bearer +|basic +)"
    r"[^&\s'\"]+"
)
TAR_NAME = re.compile(r"([\w.-]+)\.tar\b", re.ASCII)
HASH_DIGITS = 16


def is_remote(name: str) -> bool:
    """Whether a shard is read through a transport: `scheme://...` or `pipe:command`, but not `file:`."""
    return scheme(name) not in ("", "file")


def scheme(name: str) -> str:
    """`https` of `https://host/x.tar`, `pipe` of `pipe:cat x.tar`; empty for a path."""
    if name.startswith("pipe:"):
        return "pipe"
    match = SCHEME.match(name)
    if match:
        return match[1].lower()
    return "file" if name.startswith("file:") else ""


def local_path(name: str) -> str:
    """The path of a local shard, which may be written as `file:...`."""
    return url2pathname(urlsplit(name).path) if scheme(name) == "file" else name


def shown(url: str) -> str:
    """The address for messages, without passwords and long parameters, which may be secret."""
    return NAMED_SECRET.sub(r"\1...", without_secrets(url))


def cache_name(url: str) -> str:
    """The name of a shard's copy: its base name, and a hash that tells equal base names apart."""
    stems = TAR_NAME.findall(url.partition("?")[0] if scheme(url) != "pipe" else url)
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:HASH_DIGITS]
    return f"{stems[-1][:80].lstrip('.') if stems else 'shard'}.{digest}.tar"
