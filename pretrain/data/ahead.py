"""Downloading the remote shards that come next while the ones before them are read."""

import threading
from contextlib import suppress

from pretrain.data.mixture import Mixture
from pretrain.data.reader import Reader
from pretrain.data.remote import is_remote
from pretrain.errors import InputError, TrainingError


class ShardsAhead:
    """A thread that fetches the shards of the current and the next block of each source.

    What fails here fails again, with its message, where the shard is read.
    """

    def __init__(self, reader: Reader, order: Mixture) -> None:
        """Nothing is fetched before `look`."""
        self.reader, self.order = reader, order
        self._wanted: list[str] = []
        self._changed, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="shards ahead", daemon=True)
        self._remote = [is_remote(shard) for shard in reader.shards]
        if any(self._remote):
            self._thread.start()

    def look(self, position: int) -> None:
        """Fetch what is read around a position and next, if it fits the cache; returns at once."""
        if not self._thread.is_alive() or self.reader.cache is None:
            return
        shards = [shard for shard in self.order.shards_ahead(position) if self._remote[shard]]
        if sum(self.reader.nbytes[shard] for shard in shards) > self.reader.cache.max_bytes:
            return  # it would push out what is being read
        wanted = [self.reader.shards[shard] for shard in shards]
        if wanted != self._wanted:
            self._wanted = wanted
            self._changed.set()

    def _work(self) -> None:
        while not self._stopped.is_set():
            self._changed.wait()
            self._changed.clear()
            for name in self._wanted:
                if self._stopped.is_set() or self._changed.is_set():
                    break
                assert self.reader.cache is not None, "there are remote shards"
                with suppress(InputError, TrainingError, OSError):
                    self.reader.cache.fetch(name)

    def close(self) -> None:
        """Stop after the download under way, without waiting for it."""
        self._stopped.set()
        self._changed.set()
