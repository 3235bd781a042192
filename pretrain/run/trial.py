"""What a few steps of one size took, and what it says of other sizes."""

from dataclasses import dataclass

PER_STEP = ("draw", "optimizer")  # phases whose time does not grow with the batch


@dataclass(frozen=True)
class Trial:
    """What the steps of one size took."""

    images: int  # in a micro-batch
    micro_batches: int  # in a step
    phases: dict[str, float]  # seconds of a step, medians
    per_image: float  # seconds of one more image in a step
    state: int  # bytes of the run's state
    base: int  # those of them that are there when a forward ends: before the first backward no gradients are
    activations: int  # bytes on top of `base` when a forward ends
    peak: int  # bytes of the process, or of its tensors on a GPU

    @property
    def once(self) -> float:
        """Seconds of draws, clipping, optimizer and EMA, which come once a step."""
        return sum(self.phases[name] for name in PER_STEP)

    def seconds(self, images: int) -> float:
        """Of a step of that many images."""
        return images * self.per_image + self.once

    def bytes(self, images: int) -> int:
        """Of a run with that many images in a micro-batch."""
        return max(self.base + self.activations * images // self.images, self.state)

    def forward_share(self) -> float:
        """Share of the student's forward and losses in the time that grows with the batch."""
        growing = sum(seconds for name, seconds in self.phases.items() if name not in PER_STEP)
        return self.phases["forward"] / growing if growing else 0.0
