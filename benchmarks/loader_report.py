"""The tables of `loader.py`: speed of each side, time by stage, the plain side beside the reference."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loader_stages import REFERENCE_BITS, REFERENCE_MS, REST, shares

TOLERANCE = 0.30  # of a stage's share of the time, relative
SAME_BITS = 0.3  # a pixel, between images that are alike


def report(figures: Mapping[str, Any]) -> Iterator[str]:
    """The tables of a data set."""
    bits = figures["bits_per_pixel"]
    yield f"\n{bits:.2f} bits a pixel, {figures['kilobytes_per_image']:.0f} kB an image\n"
    yield from table(["side", "images/CPU s", "ms an image", "min", "max", "speed-up", "min", "max"])
    for side, times in figures["cpu_ms_per_image"].items():
        gain = figures["speedup"].get(side, dict.fromkeys(times, 1.0))
        cells = [figures["images_per_cpu_s"][side], *times.values(), *gain.values()]
        yield f"| {side} | {' | '.join(f'{cell:.4g}' for cell in cells)} |"
    yield from stage_table(figures["stages_cpu_ms_per_image"])
    yield from share_table(figures["plain_shares_percent"], judged=abs(bits - REFERENCE_BITS) < SAME_BITS)
    yield ""
    for side, crops in figures["crops_against_plain"].items():
        yield from (f"{side}: {name}: {value:.3g}" for name, value in crops.items())
    work = figures["device_work"]
    yield f"on the device ({work['device']}): {work['ms_per_image']['median']:.3g} ms an image"


def table(head: Sequence[str]) -> Iterator[str]:
    """The first two lines of a Markdown table of numbers with a name each."""
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'--:|' * (len(head) - 1)}"


def stage_table(stages: dict[str, dict[str, float]]) -> Iterator[str]:
    """Milliseconds by stage, a column for each side."""
    yield ""
    yield from table(["stage, ms an image", *stages])
    for name in dict.fromkeys(name for times in stages.values() for name in times):
        cells = (f"{times[name]:.2f}" if name in times else "" for times in stages.values())
        yield f"| {name} | {' | '.join(cells)} |"
    yield f"| sum | {' | '.join(f'{sum(times.values()):.2f}' for times in stages.values())} |"


def share_table(found: dict[str, float], judged: bool) -> Iterator[str]:
    """The plain side's shares beside the reference's; on images like its own they tell if it is as good."""
    expected = shares(REFERENCE_MS)
    yield ""
    yield from table(["share, %", "plain", f"torchvision at {REFERENCE_BITS} bits a pixel", "relative"])
    for name, share in found.items():
        yield f"| {name} | {share:.1f} | {expected[name]:.1f} | {100 * (share / expected[name] - 1):+.0f} % |"
    if not judged:
        return
    far = [name for name in found if abs(found[name] / expected[name] - 1) > TOLERANCE and name != REST]
    verdict = f"beyond: {', '.join(far)}" if far else "all within"
    yield f"the shares of {len(found) - 1} stages, {100 * TOLERANCE:.0f} % allowed: {verdict}"
