import io

import numpy as np
import pytest
from PIL import Image

from pretrain.data.decode import decode


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"quality": 90}),
        ("RGB", "JPEG", {"quality": 75, "subsampling": 0}),
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("L", "PNG", {}),
        ("1", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "WEBP", {"quality": 80}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {}),
    ],
)
def test_pixels_equal_pillows(images: dict[str, np.ndarray], mode: str, kind: str, options: dict) -> None:
    content = encode(Image.fromarray(images["china"]).convert(mode), kind, **options)
    pixels = decode(content)
    assert pixels.shape == images["china"].shape and pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, pillow(content))


def test_exif_rotation_is_not_applied(images: dict[str, np.ndarray]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    content = encode(Image.fromarray(images["china"]), "JPEG", exif=exif)
    assert decode(content).shape == images["china"].shape


def test_sixteen_bits_keep_their_range() -> None:
    ramp = np.linspace(0, 65000, 256).astype(np.uint16).reshape(16, 16)
    pixels = decode(encode(Image.fromarray(ramp), "PNG"))
    np.testing.assert_array_equal(pixels, np.repeat((ramp >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_image_is_an_error(images: dict[str, np.ndarray], kind: str) -> None:
    content = encode(Image.fromarray(images["china"]), kind)
    with pytest.raises(ValueError, match=r"."):
        decode(content[: len(content) // 2])


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff\xe0 no jpeg"])
def test_other_bytes_are_an_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"not an image|Truncated"):
        decode(content)


def test_float_images_are_refused() -> None:
    with pytest.raises(ValueError, match="mode F"):
        decode(encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))
