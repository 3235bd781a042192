"""Where the time of loading goes, summed over the workers of a rank."""

from collections import defaultdict

from pretrain.data.workers import Done

STAGES = ("read", "decode", "augment")


class Counters:
    """Sums since the last call of `means`."""

    def __init__(self, workers: int) -> None:
        """Nothing counted yet; without workers the training process itself loads."""
        self.workers = workers
        self._clear()

    def _clear(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._images, self._corrupt = 0, 0

    def add(self, done: Done) -> None:
        """Count a group."""
        for stage, seconds in done.report.seconds.items():
            self._seconds[stage] += seconds
        self._seconds["idle"] += done.idle_seconds
        self._images += done.report.images
        self._corrupt += len(done.report.corrupt)

    def means(self) -> dict[str, float]:
        """What was counted, which is then forgotten; empty when no group was made.

        `read_ms`, `decode_ms` and `augment_ms` are a worker's milliseconds per image. `slot_wait_percent` is
        the share of the workers' time in which they had nothing to do, because all slots were full: near 100
        the device is the bottleneck, near 0 the loader is.
        """
        if not self._images:
            return {}
        means = {f"{stage}_ms": 1e3 * self._seconds[stage] / self._images for stage in STAGES}
        if self.workers:
            means["slot_wait_percent"] = 100 * self._seconds["idle"] / max(sum(self._seconds.values()), 1e-9)
        means["corrupt"] = float(self._corrupt)
        self._clear()
        return means
