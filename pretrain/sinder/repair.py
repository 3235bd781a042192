"""SINDER's repair: train singular values alone until most images show no defect (paper, section 3.3).

One step takes a batch of images. Each image pulls at the blocks before its own first defect only; images
without a defect pull at none, and a batch of such makes no step.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.analysis.images import ImageSet
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.hits import Criterion, find_hits, hit_backward
from pretrain.sinder.singular_values import SingularLinear, decompose


@dataclass(frozen=True)
class RepairSettings:
    """The released schedule, except that a step may take several images."""

    criterion: Criterion = field(default_factory=Criterion)
    lr: float = 0.005  # constant, SGD
    momentum: float = 0.9
    batch_size: int = 1  # images a step; the loss is the mean over those with defects
    max_images: int = 30_000
    stop_share: float = 0.75  # of the last `window` images without defects: done
    window: int = 1_000  # images; all count as defective before the first
    bf16: bool = False  # blocks in bf16; decomposition, loss and singular values stay in fp32
    seed: int = 0  # of the order of the images


class Step(NamedTuple):
    """What one step saw and did."""

    images: int  # read in all
    loss: float  # mean over the images with defects; 0 without
    defective_images: int
    defective_patches: int
    first_block: int  # the earliest that showed a defect; -1 without
    clean_share: float  # of the last images
    applied: bool  # False without defects, or where gradients were not finite


class Repair:
    """A backbone under repair: its singular values, their momentum, and how far it is."""

    def __init__(
        self, backbone: VisionTransformer, directions: Sequence[Tensor], settings: RepairSettings
    ) -> None:
        """Decompose every linear layer of the blocks.

        Args:
            backbone: on the device of the repair; its layers are replaced.
            directions: (D,) for each block, from the original weights.
            settings: of the repair.
        """
        self.backbone, self.settings = backbone, settings
        self.device = next(backbone.parameters()).device
        self.directions = [direction.float().to(self.device) for direction in directions]
        self.layers: dict[str, SingularLinear] = decompose(backbone)
        self.optimizer = torch.optim.SGD(
            [layer.epsilon for layer in self.layers.values()], settings.lr, settings.momentum
        )
        self.images = 0
        self._clean: deque[bool] = deque([False] * settings.window, settings.window)

    @property
    def clean_share(self) -> float:
        """Of the last images, those without defects; images before the first count as defective."""
        return sum(self._clean) / len(self._clean)

    @property
    def finished(self) -> bool:
        """Whether the repair stops here."""
        settings = self.settings
        return self.clean_share >= settings.stop_share or self.images >= settings.max_images

    def step(self, images: Tensor, taken: int | None = None) -> Step:
        """Take one batch of images.

        Args:
            images: (B, C, S, S').
            taken: places of the order that it stands for, damaged images included; None = B.
        """
        images = images.to(self.device)
        criterion = self.settings.criterion
        precision = torch.autocast(self.device.type, torch.bfloat16) if self.settings.bf16 else nullcontext()
        self.optimizer.zero_grad(set_to_none=True)
        with precision:
            hits = find_hits(self.backbone, images, self.directions, criterion)
            number = sum(len(hit.images) for hit in hits)
            total = 0.0
            for hit in hits:  # one after the other: each frees its activations
                total += hit_backward(self.backbone, images, hit, self.directions, criterion, number)
        applied = bool(hits) and self._finite()
        if applied:
            self.optimizer.step()
        self.images += len(images) if taken is None else taken
        self._clean.extend([True] * (len(images) - number) + [False] * number)
        first = hits[0].block if hits else -1
        patches = sum(hit.defective for hit in hits)
        return Step(self.images, total, number, patches, first, self.clean_share, applied)

    def _finite(self) -> bool:
        gradients = [layer.epsilon.grad for layer in self.layers.values() if layer.epsilon.grad is not None]
        return all(bool(gradient.isfinite().all()) for gradient in gradients)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed repair needs, as copies: with it, it goes on exactly."""
        state = {f"epsilon.{name}": layer.epsilon.detach().clone() for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            momentum = self.optimizer.state.get(layer.epsilon, {}).get("momentum_buffer")
            if momentum is not None:
                state[f"momentum.{name}"] = momentum.clone()
        return {**state, "images": torch.tensor(self.images), "clean": torch.tensor(list(self._clean))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        for name, layer in self.layers.items():
            layer.epsilon.copy_(state[f"epsilon.{name}"])
            if f"momentum.{name}" in state:
                momentum = state[f"momentum.{name}"].to(self.device).clone()
                self.optimizer.state[layer.epsilon]["momentum_buffer"] = momentum
        self.images = int(state["images"])
        self._clean = deque(state["clean"].tolist(), self.settings.window)

    @torch.no_grad()
    def repaired(self, original: dict[str, Tensor]) -> dict[str, Tensor]:
        """The original state dict with the trained matrices in its dtypes; all else is the same tensor."""
        changed = dict(original)
        for name, layer in self.layers.items():
            if layer.epsilon.any():
                key = f"{name}.weight"
                weight = layer.weight.detach().cpu().to(original[key].dtype)
                weight[: len(layer.fixed)] = original[key][: len(layer.fixed)]
                changed[key] = weight
        return changed


def batches(
    source: ImageSet, settings: RepairSettings, start: int, number: int
) -> Iterator[tuple[int, Tensor]]:
    """Batches of the seeded order, over it again and again, each with the places that it used up.

    A damaged image is left out of its batch, and noted by the source.

    Args:
        source: of the images.
        settings: of the repair.
        start: places that were used up before.
        number: of places in the order: the rest is held out.
    """
    order, taken = source.shuffled(settings.seed), 0
    places = iter(range(start, settings.max_images))
    while chosen := list(islice(places, settings.batch_size)):
        taken += len(chosen)
        batch = source.batch([order(place % number) for place in chosen])
        if batch is not None:
            yield taken, batch
            taken = 0
