import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from pretrain.config.schema import DecodeConfig
from pretrain.data.decode import check_image, decode

GARBAGE = [
    b"hello",
    b"\xff\xd8\xff\xe0 no jpeg",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"BM",
    b"RIFF\0\0\0\0WEBPVP8 ",
]


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow(content: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert(mode))


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
        ("P", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "WEBP", {"quality": 80}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("CMYK", "TIFF", {}),
        ("L", "TIFF", {}),
        ("1", "TIFF", {"compression": "group4"}),
        ("RGB", "PPM", {}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_equal_pillows(
    images: dict[str, np.ndarray], mode: str, kind: str, options: dict, channels: int
) -> None:
    content = encode(Image.fromarray(images["china"]).convert(mode), kind, **options)
    pixels = decode(content, channels=channels)
    assert pixels.shape == (375, 500, channels) and pixels.dtype == np.uint8
    assert pixels.flags.writeable and pixels.flags.c_contiguous
    reference = pillow(content) if channels == 3 else pillow(content, "RGB" if mode == "CMYK" else mode)
    if channels == 1:
        reference = np.asarray(Image.fromarray(pillow(content)).convert("L"))[..., None]
    np.testing.assert_array_equal(pixels, reference)


def test_the_name_does_not_matter_nor_further_frames(images: dict[str, np.ndarray]) -> None:
    frames = [Image.fromarray(images[name]).convert("P") for name in ("china", "flower")]
    for kind in ("GIF", "WEBP", "TIFF"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decode(content), pillow(content))


# A picture without symmetry: each orientation gives another one.
MARKED = np.kron(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10, np.ones((16, 16), np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_viewers_do(kind: str, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a picture", orientation
    content = encode(Image.fromarray(MARKED).convert(mode), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    np.testing.assert_array_equal(decode(content), expected)
    assert expected.shape[:2] == ((96, 64) if orientation >= 5 else (64, 96))
    stored = decode(content, DecodeConfig(exif_rotation=False))
    np.testing.assert_array_equal(stored, decode(encode(Image.fromarray(MARKED).convert(mode), kind)))


def test_jpegs_that_pillow_reads_are_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(MARKED).convert("CMYK")
    turned = decode(encode(picture, "JPEG", exif=exif))
    np.testing.assert_array_equal(turned, decode(encode(picture, "JPEG"))[::-1].swapaxes(0, 1))


def test_exif_behind_other_notes_is_found_in_either_byte_order() -> None:
    plain = encode(Image.fromarray(MARKED), "JPEG")
    notes = b"\xff\xed" + struct.pack(">H", 5000) + bytes(4998) + b"\xff\xfe\0\4hi"
    for order, mark in (("<", b"II*\0"), (">", b"MM\0*")):
        entry = struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
        segment = b"Exif\0\0" + mark + entry
        exif = b"\xff\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment  # with a fill byte
        turned = decode(plain[:2] + notes + exif + plain[2:])
        np.testing.assert_array_equal(turned, decode(plain)[::-1].swapaxes(0, 1))


@pytest.mark.parametrize(
    "exif",
    [b"", b"II", b"II*\0", b"XX*\0\x08\0\0\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"],
)
def test_damaged_exif_leaves_the_image_as_stored(exif: bytes) -> None:
    plain = encode(Image.fromarray(MARKED), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(exif)) + b"Exif\0\0" + exif
    np.testing.assert_array_equal(decode(plain[:2] + segment + plain[2:]), decode(plain))


def transparent(images: dict[str, np.ndarray]) -> Image.Image:
    image = Image.fromarray(images["china"]).convert("RGBA")
    image.putalpha(Image.fromarray(images["noise"][..., 0]))
    return image


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_blended_over_white(images: dict[str, np.ndarray], kind: str, mode: str) -> None:
    image = transparent(images).convert(mode)
    content = encode(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    stored = np.asarray(image.convert("RGBA")).astype(float)
    alpha = stored[..., 3:] / 255
    expected = np.rint(stored[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    np.testing.assert_array_equal(decode(content), expected)
    gray = np.asarray(Image.fromarray(expected).convert("L"))[..., None]
    np.testing.assert_array_equal(decode(content, channels=1), gray)


def test_a_transparent_colour_is_white(images: dict[str, np.ndarray]) -> None:
    palette = Image.fromarray(images["china"]).convert("P")
    hole = int(np.asarray(palette)[5, 5])
    hidden = np.asarray(palette) == hole
    for kind in ("PNG", "GIF"):
        pixels = decode(encode(palette, kind, transparency=hole))
        assert (pixels[hidden] == 255).all()
        np.testing.assert_array_equal(pixels[~hidden], np.asarray(palette.convert("RGB"))[~hidden])
    levels = Image.fromarray(images["china"][..., 0])
    pixels = decode(encode(levels, "PNG", transparency=90), channels=1)[..., 0]
    np.testing.assert_array_equal(pixels, np.where(images["china"][..., 0] == 90, 255, levels))
    graded = decode(encode(palette, "PNG", transparency=bytes(range(256))))
    alpha = np.asarray(palette)[..., None] / 255
    expected = np.asarray(palette.convert("RGB")) * alpha + 255 * (1 - alpha)
    np.testing.assert_array_equal(graded, np.rint(expected).astype(np.uint8))


def png(levels: np.ndarray, colour_type: int, size: tuple[int, int] | None = None) -> bytes:
    """A PNG of 16 bits, (H, W, n); its header may claim another size, (H, W)."""
    height, width = size or levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(bands: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, bands, **options)
    return file.getvalue()


LEVELS = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(40, 30)
COLOURS = np.stack([LEVELS, LEVELS[::-1], LEVELS // 3], axis=-1)


def windowed(levels: np.ndarray, low: float, high: float) -> np.ndarray:
    shares = (levels.astype(np.float64) - low) / (high - low)
    return np.rint(shares.clip(0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("window", [None, [0, 4095], [1000.5, 30000]])
@pytest.mark.parametrize(
    "write",
    [
        lambda: (png(LEVELS[..., None], 0), LEVELS[..., None]),
        lambda: (png(COLOURS, 2), COLOURS),
        lambda: (encode(Image.fromarray(LEVELS), "TIFF"), LEVELS[..., None]),
        lambda: (tiff(LEVELS, byteorder=">"), LEVELS[..., None]),
        lambda: (tiff(COLOURS, photometric="rgb"), COLOURS),
        lambda: (tiff(np.moveaxis(COLOURS, -1, 0), photometric="rgb", planarconfig="separate"), COLOURS),
        lambda: (b"P5 30 40 65535\n" + LEVELS.astype(">u2").tobytes(), LEVELS[..., None]),
    ],
    ids=["png", "png-rgb", "tiff", "tiff-big-endian", "tiff-rgb", "tiff-planes", "pgm"],
)
def test_sixteen_bits_are_seen_through_the_window(
    write: Callable[[], tuple[bytes, np.ndarray]], window: list[float] | None
) -> None:
    content, levels = write()
    expected = windowed(levels, *(window or (0, 65535)))
    cfg = DecodeConfig(window=window)
    np.testing.assert_array_equal(decode(content, cfg), np.broadcast_to(expected, (40, 30, 3)))
    gray = expected if levels.shape[2] == 1 else np.asarray(Image.fromarray(expected).convert("L"))[..., None]
    np.testing.assert_array_equal(decode(content, cfg, 1), gray)


def test_the_window_leaves_transparency_and_eight_bits_alone(images: dict[str, np.ndarray]) -> None:
    opaque = np.full_like(LEVELS, 65535)
    for levels, kind in (((LEVELS, opaque), 4), ((*np.moveaxis(COLOURS, -1, 0), opaque), 6)):
        content = png(np.stack(levels, axis=-1), kind)
        expected = np.broadcast_to(
            windowed(COLOURS if kind == 6 else LEVELS[..., None], 0, 99999), (40, 30, 3)
        )
        np.testing.assert_array_equal(decode(content, DecodeConfig(window=[0, 99999])), expected)
    clear = png(np.stack([LEVELS, LEVELS * 0], axis=-1), 4)
    assert (decode(clear) == 255).all()
    for kind in ("JPEG", "PNG"):
        content = encode(Image.fromarray(images["china"]), kind)
        np.testing.assert_array_equal(decode(content, DecodeConfig(window=[50, 60])), decode(content))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_levels_without_a_range_need_a_window(kind: type) -> None:
    levels = np.linspace(-1000, 3000, 1200).reshape(40, 30).astype(kind)
    content = encode(Image.fromarray(levels), "TIFF")
    with pytest.raises(
        ValueError, match=rf"^{kind.__name__} levels have no fixed range; give data.decode.window"
    ):
        decode(content)
    expected = windowed(levels, -100, 2000)[..., None]
    np.testing.assert_array_equal(decode(content, DecodeConfig(window=[-100, 2000]), 1), expected)


def test_levels_that_are_no_numbers_are_black() -> None:
    levels = np.array([[np.nan, np.inf], [-np.inf, 0.5]], np.float32)
    pixels = decode(encode(Image.fromarray(levels), "TIFF"), DecodeConfig(window=[0, 1]), 1)
    assert pixels[..., 0].tolist() == [[0, 255], [0, 128]]


@pytest.mark.parametrize("channels", [2, 4, 5, 8])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_bands_are_taken_as_they_are(channels: int, planes: bool, kind: type) -> None:
    limit = np.iinfo(kind).max
    bands = np.random.default_rng(0).integers(0, limit, (20, 30, channels), kind, endpoint=True)
    stored = np.moveaxis(bands, -1, 0) if planes else bands
    config = {"planarconfig": "separate" if planes else "contig", "photometric": "minisblack"}
    content = tiff(stored, compression="zlib", **config)
    np.testing.assert_array_equal(decode(content, channels=channels), windowed(bands, 0, limit))
    check_image(content)
    for other in {1, 3, channels + 1} - {channels}:
        with pytest.raises(ValueError, match=f"^has {channels} channels, data.channels={other}$"):
            decode(content, channels=other)


def test_four_channels_may_be_transparency_or_a_band(images: dict[str, np.ndarray]) -> None:
    image = transparent(images)
    np.testing.assert_array_equal(decode(encode(image, "PNG"), channels=4), np.asarray(image))
    infrared = tiff(np.asarray(image), photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(decode(infrared, channels=4), np.asarray(image))
    with pytest.raises(ValueError, match=r"^has 4 channels, data.channels=3$"):
        decode(infrared)
    with pytest.raises(ValueError, match=r"^has 3 channels, data.channels=4$"):
        decode(encode(Image.fromarray(images["china"]), "JPEG"), channels=4)


def test_a_volume_is_no_image() -> None:
    volume = np.zeros((4, 20, 30, 5), np.uint8)
    content = tiff(volume, photometric="minisblack", planarconfig="contig", volumetric=True, tile=(4, 16, 16))
    with pytest.raises(ValueError, match="not one flat image"):
        decode(content, channels=5)


KINDS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_image_is_an_error(images: dict[str, np.ndarray], kind: str) -> None:
    content = encode(Image.fromarray(images["china"]), kind)
    check_image(content)
    for part in (content[: len(content) // 2], content[:40]):
        with pytest.raises(ValueError, match=r"."):
            decode(part)


@pytest.mark.parametrize("channels", [2, 3])
def test_a_cut_image_of_16_bits_is_an_error(channels: int) -> None:
    bands = np.random.default_rng(0).integers(0, 65535, (50, 60, channels), np.uint16)
    kind = "rgb" if channels == 3 else "minisblack"
    cut = [tiff(bands, photometric=kind, planarconfig="contig", compression="zlib")]
    cut += [png(bands, 2)] if channels == 3 else []
    for content in cut:
        decode(content, channels=channels)
        with pytest.raises(ValueError, match=r"."):
            decode(content[: len(content) // 2], channels=channels)


@pytest.mark.parametrize("content", GARBAGE)
def test_other_bytes_are_an_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^(not an image in a known format|\w+: .{5,80})$"):
        decode(content)


def test_no_bytes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^is empty \(0 bytes\)$"):
        decode(b"")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_too_many_pixels_are_refused(images: dict[str, np.ndarray], kind: str, mode: str) -> None:
    content = encode(Image.fromarray(images["china"]).convert(mode), kind)
    decode(content, DecodeConfig(max_pixels=375 * 500))
    line = r"^500 x 375 pixels are more than data.decode.max_pixels=187499$"
    with pytest.raises(ValueError, match=line):
        decode(content, DecodeConfig(max_pixels=375 * 500 - 1))


def huge(content: bytes, place: int, form: str, *sides: int) -> bytes:
    """A file whose header claims another size."""
    size = struct.pack(form, *sides)
    return content[:place] + size + content[place + len(size) :]


def test_a_claim_is_judged_before_memory_is_taken(images: dict[str, np.ndarray]) -> None:
    """Each would take gigabytes."""
    picture = Image.fromarray(images["china"])
    jpeg, gif = encode(picture, "JPEG"), encode(picture, "GIF")
    long = tiff(images["china"], photometric="rgb")
    start = jpeg.index(b"\xff\xc0") + 5
    files = [
        huge(jpeg, start, ">HH", 60000, 60000),
        *(png(LEVELS[..., None], kind, (60000, 60000)) for kind in (0, 2)),
        huge(encode(picture, "BMP"), 18, "<II", 60000, 60000),
        huge(gif, 6, "<HH", 60000, 60000),
        huge(encode(picture, "WEBP", lossless=True), 21, "<I", 0x3FFF | 0x3FFF << 14),
        huge(encode(picture, "WEBP"), 26, "<HH", 0x3FFF, 0x3FFF),
        huge(encode(transparent(images), "WEBP"), 24, "<IH", 0xFFFFFFFF, 0xFFFF),
        b"P6 60000 60000 255\n" + bytes(1000),
        huge(long, long.index(struct.pack("<HHI", 256, 4, 1)) + 8, "<I", 600_000_000),
    ]
    for content in files:
        with pytest.raises(ValueError, match=r"^\d+ x \d+ pixels are more than data.decode.max_pixels=2"):
            decode(content)


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_reduced_jpegs(images: dict[str, np.ndarray], mode: str, reduction: int) -> None:
    picture = Image.fromarray(images["china"][:373, :499]).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(picture, "JPEG", quality=95, exif=exif)
    pixels = decode(content, reduction=reduction)
    assert pixels.shape == (-(-499 // reduction), -(-373 // reduction), 3)
    reference = Image.open(io.BytesIO(content))
    reference.draft("RGB", (499 // reduction, 373 // reduction))
    np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(reference).convert("RGB")))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_an_image_or_one_line(images: dict[str, np.ndarray], kind: str) -> None:
    content = np.frombuffer(encode(Image.fromarray(images["china"][:60, :80]), kind), np.uint8)
    rng, cfg = np.random.default_rng(0), DecodeConfig(max_pixels=10**6)
    refused = 0
    for _ in range(150):
        damaged = content.copy()
        places = rng.integers(0, rng.choice([100, len(content)]), 4)
        damaged[places] = rng.integers(0, 256, 4)
        try:
            assert decode(damaged.tobytes(), cfg).shape[2] == 3
        except ValueError as error:
            assert type(error) is ValueError and 0 < len(str(error)) < 250 and "\n" not in str(error)
            refused += 1
    assert refused > 10
