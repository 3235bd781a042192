"""The names of a shard's members, as webdataset reads them. No torch."""

import re

MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key, extension
SHARD_NOTES = re.compile(r"__[^/]*__")  # webdataset's notes on a shard as a whole
CLASS_NUMBER = re.compile(rb"\s*([0-9]{1,18})\s*")  # the content of a .cls member; fits 64 bits
MAX_CLASS = 10**18 - 1  # the largest such number
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm"})


def key_and_extension(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) of a member; None where it belongs to no sample."""
    match = MEMBER_NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match and not SHARD_NOTES.fullmatch(name) else None
