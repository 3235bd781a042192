"""Samples with their keys, and a count of what was left out."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.data.inputs.source import Constant, Encoded, Result, Unreadable
from pretrain.data.writer import PackedSample

SHOWN = 5  # windows


@dataclass
class Tally:
    """What became of the images."""

    packed: int = 0
    constant: int = 0
    unreadable: list[Unreadable] = field(default_factory=list)
    windows: Counter[tuple[float, float, str]] = field(default_factory=Counter)

    def window_lines(self) -> list[str]:
        """Which values became 0 and 65535, the most frequent first."""
        shown = self.windows.most_common(SHOWN)
        lines = [
            f"window {low:g} to {high:g} ({units}): {count} images" for (low, high, units), count in shown
        ]
        more = len(self.windows) - len(shown)
        return lines + ([f"and {more} other windows; every image's .json holds its own"] if more else [])


def numbered(results: Iterable[Result], tally: Tally) -> Iterator[PackedSample]:
    """The images that could be read, with keys that count them."""
    for result in results:
        match result:
            case Encoded(extension, image, label, meta):
                yield PackedSample(f"{tally.packed:09d}", extension, image, label, meta)
                tally.packed += 1
                _count_window(meta, tally)
            case Unreadable():
                tally.unreadable.append(result)
            case Constant():
                tally.constant += 1


def _count_window(meta: Mapping[str, Any], tally: Tally) -> None:
    match meta:
        # the notes of a tar that others wrote may hold anything under these names
        case {"window": [int() | float() as low, int() | float() as high], "units": str() as units}:
            tally.windows[low, high, units] += 1
