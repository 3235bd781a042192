"""Sets of labelled images that probes are fitted and tested on, plain or corrupted."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from torch import Tensor

from pretrain.analysis.corruptions import Corruption, corrupt
from pretrain.analysis.scaling import Scaling
from pretrain.analysis.taps import Place
from pretrain.data.groups import sample_groups
from pretrain.data.pixels import Pixels
from pretrain.data.reader import Reader
from pretrain.data.shards import list_shards


@dataclass(frozen=True)
class Preparation:
    """How images become inputs: shorter side and centre crop to `size`, then normalised."""

    size: int  # pixels
    scaling: Scaling
    seed: int = 0  # of corruptions


@dataclass(frozen=True)
class LabelledSet:
    """Shards with a class for each sample."""

    name: str  # in tables: train, test, sketch, contrast:5
    patterns: Sequence[str]
    setting: str  # that names them, for messages
    corruption: Corruption | None = None  # at the size of the crop

    @property
    def folder(self) -> str:
        """The name as one of a folder: without a colon, which not every system takes."""
        return self.name.replace(":", "_")

    def __len__(self) -> int:
        """Samples; builds missing indexes."""
        return sum(Reader(list_shards(self.patterns, self.setting)).sizes)

    def batches(self, preparation: Preparation, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(b, C, size, size) float32 and (b,) int64, in the order of the files."""
        change = partial(_corrupted, self.corruption, preparation.seed) if self.corruption else None
        size, read = preparation.size, preparation.scaling.labelled
        return read(self.patterns, self.setting, size, size, batch_size, change)

    def groups(self, key: str) -> list[str]:
        """The group of each sample, by a key of its .json member."""
        return sample_groups(self.patterns, self.setting, key)

    def key(self, model: str, preparation: Preparation, places: Sequence[Place]) -> str:
        """Names features of this set: other files, another preparation or model give another one.

        Args:
            model: `model_fingerprint`.
            preparation: of the images.
            places: that are read.
        """
        files = [
            (str(shard.resolve()), shard.stat().st_size, shard.stat().st_mtime_ns)
            for shard in list_shards(self.patterns, self.setting)
        ]
        corruption = str(self.corruption) if self.corruption else None
        content = [model, files, asdict(preparation), corruption, [str(place) for place in places]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _corrupted(corruption: Corruption, seed: int, key: str, pixels: Pixels) -> Pixels:
    return corrupt(pixels, corruption, key, seed)
