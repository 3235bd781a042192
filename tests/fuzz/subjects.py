"""What is fuzzed: for each kind whole examples, damage that suits it, and a look at all of the result."""

from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from pretrain.config.load import config_text, load_config
from pretrain.config.schema import Config, DecodeConfig
from pretrain.data.decode import check_image, decode, jpeg_size
from pretrain.data.reader import CorruptSample, Reader
from pretrain.data.shards import list_shards
from pretrain.data.writer import PackedSample, write_shards
from pretrain.errors import InputError
from pretrain.export import write_export
from pretrain.export.examine import inspect
from pretrain.export.transform import Order, convert
from pretrain.export.weights import read_weights
from tests.data.pictures import encode
from tests.fuzz.cases import CORRUPT, WORKED, Files, Subject
from tests.fuzz.checkpoints import TINY, checkpoint_examples, damage_metadata, look_at_checkpoint
from tests.fuzz.headers import damage_dicom, damage_nifti, damage_parquet
from tests.fuzz.mutations import damage, noise
from tests.fuzz.packing import dicom_examples, look_at_packing, nifti_examples, parquet_examples
from tests.fuzz.structures import damage_image, damage_index, damage_safetensors, damage_tar
from tests.fuzz.trees import damage_json, damage_yaml
from tests.surgery.backbones import random_state

CONFIGS = Path(__file__).parents[2] / "configs"
OVERRIDES = (
    "run.steps=10",
    "data.shards=[a, b]",
    "optim.lr=1e-3",
    "model.arch=vit_small",
    "run.dir=${a}",
    "x=",
)
LIMITS = DecodeConfig(max_pixels=1_000_000)
SUFFIXES = {  # and a name that is nothing else
    **{".yaml": damage_yaml, ".json": damage_json, ".safetensors": damage_safetensors},
    **{".tar": damage_tar, ".idx": damage_index, ".img": damage_image, ".metadata": damage_metadata},
    **{".dcm": damage_dicom, ".nii": damage_nifti, ".gz": damage_nifti, ".parquet": damage_parquet},
}


def mutate(random: Random, files: Files) -> Files:
    """One file damaged, sometimes two: half of the time in a way that suits its format."""
    changed = dict(files)
    for name in random.sample(sorted(files), min(random.choice((1, 1, 1, 2)), len(files))):
        suits = SUFFIXES.get(Path(name).suffix or Path(name).name)
        if random.random() < 0.01:
            changed[name] = noise(random, files[name])
        elif suits is None or random.random() < 0.4:
            changed[name] = damage(random, files[name])
        else:
            changed[name] = suits(random, files[name])
    return changed


def _config_examples(folder: Path) -> list[Files]:
    base, demo, swav, large = (
        (CONFIGS / f"{name}.yaml").read_bytes() for name in ("base", "demo", "swav_demo", "vitl_mlp")
    )
    return [
        {"main.yaml": demo},
        {"main.yaml": swav, "demo.yaml": demo},
        {"main.yaml": large, "base.yaml": base},
        {"main.yaml": config_text(Config()).encode()},
        {
            "main.yaml": b"run: {dir: a}\ndata: {shards: [a.tar]}\n",
            "cluster.yaml": b"partition: gpu\nnodes: 2\n",
        },
    ]


def _config(folder: Path) -> str:
    """The file, a person's defaults and an override that depends on the file."""
    main = folder / "main.yaml"
    cfg = load_config(main, (), folder / "cluster.yaml")
    try:
        load_config(main, [OVERRIDES[main.stat().st_size % len(OVERRIDES)]])
    except InputError as error:
        assert "\n" not in str(error), repr(error)
    config_text(cfg)
    return WORKED


def _weight_examples(folder: Path) -> list[Files]:
    state = random_state(TINY)
    ours = write_export(folder / "ours.safetensors", state, TINY, {"step": 3})
    convert(ours, "dinov2", Order(folder / "released.pth", allow_loss=True))
    convert(ours, "huggingface", Order(folder / "model", allow_loss=True))
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    split = {name: t.split(-(-len(t) // 2))[0].clone() for name, t in state.items()}
    torch.save({"teacher": state, "optimizer": split, "epoch": 3}, folder / "whole.pth")
    single = [(name,) for name in ("ours.safetensors", "legacy.pth", "whole.pth")]
    names = [*single, ("released.pth", "released.json")]
    found = [{name: (folder / name).read_bytes() for name in group} for group in names]
    model = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    return [*found, {f"model/{name}": content for name, content in model.items()}]


def _weights(folder: Path) -> str:
    """As `tools/surgery.py inspect`, and as every other verb."""
    found = [path for path in folder.iterdir() if path.suffix != ".json"]
    inspect(found[0], spectral=False)
    read_weights(found[0])
    return WORKED


def _shard_examples(folder: Path) -> list[Files]:
    picture = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    images = [("jpg", encode(picture)), ("png", encode(picture, "PNG")), ("tif", encode(picture, "TIFF"))]
    samples = [PackedSample(f"{i:06d}", *image, i, {"number": i}) for i, image in enumerate(images)]
    (shard,) = write_shards(samples, folder, "train", 10)
    tar, index = shard.read_bytes(), shard.with_name(shard.name + ".idx").read_bytes()
    return [
        {"train.tar": tar},
        {"train.tar": tar, "train.tar.idx": index},
        {"train.tar": tar, "x.json": b"{}"},
    ]


def _shards(folder: Path) -> str:
    """Every sample of every shard, its image decoded."""
    reader = Reader(list_shards([str(folder / "*.tar")], "data.shards"))
    corrupt = 0
    for sample in range(min(reader.sizes[0], 1000)):
        try:
            check = reader.read(0, sample).image
        except CorruptSample:
            corrupt += 1
        else:
            corrupt += _image_fault(check)
    reader.close()
    return CORRUPT if corrupt else WORKED


def _image_fault(content: bytes) -> bool:
    """Whether an image is refused as training refuses it: by a ValueError of one line."""
    try:
        decode(content, LIMITS)
        decode(content, LIMITS, 1, reduction=2)
        return False
    except ValueError as error:
        assert str(error).strip() and "\n" not in str(error), repr(error)
        return True
    finally:
        jpeg_size(content, LIMITS)


def _image_examples(folder: Path) -> list[Files]:
    generator = np.random.default_rng(0)
    colour = generator.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    deep = Image.fromarray(generator.integers(0, 65_536, (24, 20), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [encode(colour, kind) for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")]
    kinds += [encode(colour, "JPEG", exif=exif, progressive=True), encode(colour[..., 0], "JPEG")]
    kinds += [encode(colour, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "jpeg")]
    kinds += [encode(deep, "PNG"), encode(deep, "TIFF"), encode(colour, "WEBP", lossless=True)]
    kinds += [encode(Image.fromarray(colour).convert(mode), "TIFF") for mode in ("RGBA", "CMYK", "1")]
    kinds += [encode(Image.fromarray(colour).convert(mode), "PNG") for mode in ("P", "LA", "RGBA")]
    return [{"picture.img": content} for content in kinds]


def _image(folder: Path) -> str:
    content = (folder / "picture.img").read_bytes()
    fault = _image_fault(content)
    if len(content) % 8 == 0:  # slower, with the same parsers
        with suppress(ValueError):
            check_image(content)
    return CORRUPT if fault else WORKED


SUBJECTS = {
    "config": Subject(_config_examples, _config),
    "weights": Subject(_weight_examples, _weights),
    "checkpoints": Subject(checkpoint_examples, look_at_checkpoint),
    "shards": Subject(_shard_examples, _shards),
    "images": Subject(_image_examples, _image),
    "dicom": Subject(dicom_examples, look_at_packing),
    "nifti": Subject(nifti_examples, look_at_packing),
    "parquet": Subject(parquet_examples, look_at_packing),
}
