"""The plain side of `loader.py`: how DINOv2 loads, with webdataset, Pillow and torchvision's operations.

Each crop is a Pillow image until it becomes a normalised float32 tensor; the operations are those that
torchvision 0.28 runs on Pillow images, with its memory layouts. Only the random numbers come from elsewhere:
both sides cut the same crops, from the draws of `pretrain.data.draws`.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import webdataset
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F

from pretrain.batch import Batch
from pretrain.config.schema import Config
from pretrain.data.draws import CropDraw, draw_crops
from pretrain.data.masking import group_masks
from pretrain.seeding import numpy_stream

BLUR_KERNEL = 9  # pixels
SOLARIZE_FROM = 128  # level

Lap = Callable[[str], None]  # called with a stage's name when that stage is done
Step = Callable[[Image.Image, CropDraw], Image.Image]


def untimed(stage: str) -> None:
    """A lap that nobody takes the time of."""


def decode(content: bytes) -> Image.Image:
    """As DINOv2's image decoder."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def crop_and_resize(image: Image.Image, draw: CropDraw, size: int) -> Image.Image:
    """RandomResizedCrop."""
    box = draw.box
    part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return part.resize((size, size), Image.Resampling.BICUBIC)


def flip(crop: Image.Image, draw: CropDraw) -> Image.Image:
    """RandomHorizontalFlip."""
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.flip else crop


def jitter(crop: Image.Image, draw: CropDraw) -> Image.Image:
    """ColorJitter."""
    for name, amount in draw.jitter:
        match name:
            case "brightness":
                crop = ImageEnhance.Brightness(crop).enhance(amount)
            case "contrast":
                crop = ImageEnhance.Contrast(crop).enhance(amount)
            case "saturation":
                crop = ImageEnhance.Color(crop).enhance(amount)
            case "hue":
                crop = _turn_hue(crop, amount)
    return crop


def _turn_hue(crop: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = crop.convert("HSV").split()
    levels = np.array(hue, dtype=np.uint8)
    levels += np.int32(shift * 255).astype(np.uint8)  # wraps
    return Image.merge("HSV", (Image.fromarray(levels), saturation, value)).convert("RGB")


def grayscale(crop: Image.Image, draw: CropDraw) -> Image.Image:
    """RandomGrayscale."""
    if not draw.grayscale:
        return crop
    levels = np.array(crop.convert("L"), dtype=np.uint8)
    return Image.fromarray(np.dstack([levels, levels, levels]))


def blur(crop: Image.Image, draw: CropDraw) -> Image.Image:
    """GaussianBlur: a depthwise 2-D convolution of a float tensor whose channels lie last, mirrored edges."""
    if draw.sigma is None:
        return crop
    pixels = torch.as_tensor(np.array(crop, copy=True)).permute(2, 0, 1)
    kernel = _kernel(draw.sigma).expand(3, 1, BLUR_KERNEL, BLUR_KERNEL)
    padded = F.pad(pixels.unsqueeze(0).to(torch.float32), [BLUR_KERNEL // 2] * 4, mode="reflect")
    blurred = torch.round(F.conv2d(padded, kernel, groups=3)).to(torch.uint8).squeeze(0)
    return Image.fromarray(blurred.permute(1, 2, 0).numpy())


def _kernel(sigma: float) -> Tensor:
    """(9, 9) weights; torchvision's formula."""
    reach = (BLUR_KERNEL - 1) / (2 * math.sqrt(2))
    row = torch.softmax(torch.linspace(-reach, reach, BLUR_KERNEL).div(sigma).pow(2).neg(), dim=0)
    return row[:, None] * row[None, :]


def solarize(crop: Image.Image, draw: CropDraw) -> Image.Image:
    """RandomSolarize."""
    return ImageOps.solarize(crop, SOLARIZE_FROM) if draw.solarize else crop


STEPS: dict[str, Step] = {
    "flip": flip,
    "jitter": jitter,
    "grayscale": grayscale,
    "blur": blur,
    "solarize": solarize,
}


def to_normalised(crop: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """ToTensor and Normalize: (3, S, S) float32."""
    pixels = torch.from_numpy(np.array(crop, np.uint8, copy=True))
    tensor = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255).clone()
    means, stds = torch.as_tensor(mean), torch.as_tensor(std)
    return tensor.sub_(means.view(-1, 1, 1)).div_(stds.view(-1, 1, 1))


class PlainLoader:
    """One worker: shards to float32 batches, in the order of storage."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.grid = cfg.data.global_crops.size // cfg.model.patch_size

    def epoch(self) -> Iterator[Batch]:
        """The whole batches of an epoch, each image cut crop by crop."""
        return self._batches(self._crops, untimed)

    def staged(self, lap: Lap) -> Iterator[Batch]:
        """The same, with all crops of an image in one stage after another; `lap` is called after each."""
        return self._batches(self._crops_in_stages, lap)

    def _batches(self, cut: Callable[[bytes, int, Lap], list[Tensor]], lap: Lap) -> Iterator[Batch]:
        images: list[list[Tensor]] = []
        for position, sample in enumerate(webdataset.WebDataset(self.cfg.data.shards, shardshuffle=False)):
            lap("read")
            images.append(cut(sample["jpg"], position, lap))
            if len(images) == self.cfg.data.group_size:
                batch = self._collate(images, position + 1 - len(images))
                lap("masks + collate")
                yield batch
                images = []

    def _crops(self, content: bytes, position: int, _: Lap) -> list[Tensor]:
        """The normalised crops of an image, global ones first."""
        image, crops = decode(content), []
        for draw, size in self._draws(image, position):
            crop = crop_and_resize(image, draw, size)
            for step in STEPS.values():
                crop = step(crop, draw)
            crops.append(to_normalised(crop, self.cfg.data.mean, self.cfg.data.std))
        return crops

    def _crops_in_stages(self, content: bytes, position: int, lap: Lap) -> list[Tensor]:
        image = decode(content)
        lap("decode")
        draws = self._draws(image, position)
        lap("draw")
        crops = [crop_and_resize(image, draw, size) for draw, size in draws]
        lap("crop + resize")
        for name, step in STEPS.items():
            crops = [step(crop, draw) for crop, (draw, _) in zip(crops, draws, strict=True)]
            lap(name)
        tensors = [to_normalised(crop, self.cfg.data.mean, self.cfg.data.std) for crop in crops]
        lap("to tensor")
        return tensors

    def _draws(self, image: Image.Image, position: int) -> list[tuple[CropDraw, int]]:
        """What is to be done to each crop, with its size."""
        data, rng = self.cfg.data, numpy_stream(self.cfg.run.seed, "augment", 0, position)
        large, small = draw_crops(rng, image.height, image.width, data)
        sizes = [data.global_crops.size] * len(large) + [data.local_crops.size] * len(small)
        return list(zip([*large, *small], sizes, strict=True))

    def _collate(self, images: list[list[Tensor]], first: int) -> Batch:
        """Crop-major tensors and the masks of the group, as DINOv2's workers make them."""
        rng = numpy_stream(self.cfg.run.seed, "mask", 0, first)
        masks = torch.from_numpy(group_masks(self.cfg.mask, self.grid, 2 * len(images), rng))
        weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
        return Batch(
            torch.stack([crops[i] for i in range(2) for crops in images]),
            torch.stack([crops[i] for i in range(2, len(images[0])) for crops in images]),
            masks,
            masks.flatten().nonzero().flatten(),
            weights,
            drop_global=None,  # drawn by DINOv2's model
            drop_local=None,
            group_size=len(images),
            position=first,
        )
