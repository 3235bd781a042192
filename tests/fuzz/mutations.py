"""Damage to bytes: what disks, transfers and malice do to any file."""

from collections.abc import Callable
from random import Random

Mutation = Callable[[Random, bytes], bytes]

BLOCK = 512  # bytes: of a tar, and a common size of what goes missing
EDGES = (0, 1, 0x7F, 0x80, 0xFF)
LARGEST = 1 << 20  # bytes of a damaged file: repeats do not grow without end


def damage(random: Random, content: bytes) -> bytes:
    """`content` after one to four kinds of damage."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        content = random.choice(KINDS)(random, content)[:LARGEST]
    return content


def flip_bits(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 2, 8, 64)) if changed else 0):
        changed[_place(random, content)] ^= 1 << random.randrange(8)
    return bytes(changed)


def set_edges(random: Random, content: bytes) -> bytes:
    """Runs of 1, 2, 4 or 8 bytes become the smallest or largest numbers."""
    start, length = _place(random, content), random.choice((1, 2, 4, 8))
    return content[:start] + bytes([random.choice(EDGES)]) * length + content[start + length :]


def truncate(random: Random, content: bytes) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def splice(random: Random, content: bytes) -> bytes:
    """One part over another."""
    start, other = _place(random, content), _place(random, content)
    length = random.randrange(1, BLOCK)
    return content[:start] + content[other : other + length] + content[start + length :]


def remove(random: Random, content: bytes) -> bytes:
    start, length = _block(random, content)
    return content[:start] + content[start + length :]


def repeat(random: Random, content: bytes) -> bytes:
    start, length = _block(random, content)
    return content[: start + length] * random.choice((1, 1, 3)) + content[start:]


def insert_noise(random: Random, content: bytes) -> bytes:
    start = _place(random, content)
    return content[:start] + random.randbytes(random.choice((1, 4, 16, BLOCK))) + content[start:]


def overwrite(random: Random, content: bytes) -> bytes:
    """A part becomes noise or zeros, as blocks that were never written."""
    start, length = _block(random, content)
    length = len(content[start : start + length])
    filling = random.choice((random.randbytes(length), bytes(length)))
    return content[:start] + filling + content[start + length :]


def noise(random: Random, content: bytes) -> bytes:
    return random.randbytes(random.randrange(2 * BLOCK))


def _place(random: Random, content: bytes) -> int:
    """Half of all damage hits the first bytes: there are the headers."""
    end = min(len(content), 64) if random.random() < 0.5 else len(content)
    return random.randrange(max(end, 1))


def _block(random: Random, content: bytes) -> tuple[int, int]:
    """Start and length, often on the borders of blocks."""
    if random.random() < 0.5:
        return random.randrange(len(content) // BLOCK + 1) * BLOCK, BLOCK
    return _place(random, content), random.choice((1, 3, 16, 100, 2000))


KINDS: tuple[Mutation, ...] = (
    *(flip_bits, flip_bits, set_edges, truncate, splice),
    *(remove, repeat, insert_noise, overwrite),
)
