"""Corruptions: published constants measured, draws that depend on names alone, refusals in one line."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from pretrain.analysis.corruptions import (
    NAMES,
    SEVERITIES,
    Corruption,
    CorruptionName,
    corrupt,
    parse_corruption,
)
from pretrain.data.pixels import Pixels
from pretrain.errors import InputError
from tests.analysis.small_images import photos, smooth

DRAWN = {  # the other kinds are functions of the pixels
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    *("motion_blur", "glass_blur", "fog", "snow_like"),
}
RGB_ONLY, NO_BANDS = {"saturate"}, {"saturate", "brightness", "jpeg_compression", "snow_like"}
# Severities in the order of their error where the constants do not make it grow from 1 to 5: saturate first
# takes colour away, then adds it; glass blur has its iterations 1 1 1 2 2, and of two that differ in nothing
# else, the stronger blur is the nearer to the image; motion blur only gets a longer, empty tail from 3 to 4.
ORDERS = {
    "saturate": [(1, 2), (3, 4, 5)],
    "glass_blur": [(2, 4), (3, 5), (1, 5)],
    "motion_blur": [(1, 2, 3, 5), (2, 4, 5)],
}


def flat(level: int, size: int = 192) -> Pixels:
    return np.full((size, size, 3), level, np.uint8)


def at_all_severities(name: CorruptionName, pixels: Pixels) -> list[Pixels]:
    return [corrupt(pixels, Corruption(name, severity), key=0) for severity in SEVERITIES]


def assert_rounded(pixels: Pixels, exact: np.ndarray) -> None:
    """The nearest levels of an image from 0 to 1, whichever of two that are equally near."""
    assert abs(pixels - np.clip(exact, 0, 1) * 255).max() < 0.501


def test_gaussian_noise_has_its_standard_deviation_at_any_level() -> None:
    for level in (110, 140):
        for noisy, sd in zip(
            at_all_severities("gaussian_noise", flat(level)), (0.04, 0.06, 0.08, 0.09, 0.1), strict=True
        ):
            assert noisy.std() / 255 == pytest.approx(sd, rel=0.02)
            assert noisy.mean() == pytest.approx(level, abs=0.4)


def test_shot_noise_has_the_variance_of_photons() -> None:
    for level in (64, 128):
        for noisy, photons in zip(
            at_all_severities("shot_noise", flat(level)), (500, 250, 100, 75, 50), strict=True
        ):
            assert (noisy / 255).var() == pytest.approx(level / 255 / photons, rel=0.04)
            assert noisy.mean() == pytest.approx(level, abs=0.4)


def test_speckle_noise_grows_with_the_level() -> None:
    for level in (64, 128):
        for noisy, sd in zip(
            at_all_severities("speckle_noise", flat(level)), (0.06, 0.1, 0.12, 0.16, 0.2), strict=True
        ):
            assert noisy.std() == pytest.approx(level * sd, rel=0.02)
    assert (corrupt(flat(0), Corruption("speckle_noise", 5), key=0) == 0).all()


def test_impulse_noise_replaces_its_share_half_by_black_half_by_white() -> None:
    pixels = flat(100, 256)
    for noisy, share in zip(
        at_all_severities("impulse_noise", pixels), (0.01, 0.02, 0.03, 0.05, 0.07), strict=True
    ):
        sd = np.sqrt(share / 2 / pixels.size)
        for extreme in (0, 255):
            assert abs((noisy == extreme).mean() - share / 2) < 4 * sd
        assert set(np.unique(noisy)) == {0, 100, 255}
        assert (noisy != 100).all(axis=2).mean() < share / 5  # each channel for itself


@pytest.mark.parametrize("severity, factor", list(enumerate((0.75, 0.5, 0.4, 0.3, 0.15), 1)))
def test_contrast_shrinks_the_distance_to_the_mean_of_the_channel(severity: int, factor: float) -> None:
    image = photos(32)[0] / 255
    mean = np.array([image[..., channel].mean() for channel in range(3)])
    changed = corrupt(photos(32)[0], Corruption("contrast", severity), key=0)
    assert_rounded(changed, mean + factor * (image - mean))


def hsv_changed(pixels: Pixels, channel: int, factor: float, shift: float) -> np.ndarray:
    """Pixel by pixel, by the standard library."""
    changed = np.empty(pixels.shape)
    for place in np.ndindex(pixels.shape[:2]):
        hsv = list(colorsys.rgb_to_hsv(*(pixels[place] / 255)))
        hsv[channel] = min(1, hsv[channel] * factor + shift)
        changed[place] = colorsys.hsv_to_rgb(*hsv)
    return changed


@pytest.mark.parametrize("severity, shift", list(enumerate((0.05, 0.1, 0.15, 0.2, 0.3), 1)))
def test_brightness_is_added_to_the_value(severity: int, shift: float) -> None:
    pixels = np.concatenate([photos(16)[1], np.zeros((2, 16, 3), np.uint8)])
    changed = corrupt(pixels, Corruption("brightness", severity), key=0)
    assert_rounded(changed, hsv_changed(pixels, 2, 1, shift))
    grey = smooth(16, seed=0, channels=1)
    assert_rounded(corrupt(grey, Corruption("brightness", severity), key=0), grey / 255 + shift)


@pytest.mark.parametrize(
    "severity, constants",
    list(enumerate(((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), 1)),
)
def test_saturation_is_multiplied_and_raised(severity: int, constants: tuple[float, float]) -> None:
    pixels = np.concatenate([photos(16)[1], flat(90, 16)])  # grey pixels have the hue of red
    changed = corrupt(pixels, Corruption("saturate", severity), key=0)
    assert_rounded(changed, hsv_changed(pixels, 1, *constants))


@pytest.mark.parametrize("severity, share", list(enumerate((0.95, 0.9, 0.85, 0.75, 0.65), 1)))
def test_pixelate_is_a_box_filter_down_and_up(severity: int, share: float) -> None:
    image = Image.fromarray(photos(32)[2][:, :24])
    small = image.resize((int(24 * share), int(32 * share)), Image.Resampling.BOX)
    expected = np.asarray(small.resize((24, 32), Image.Resampling.BOX))
    changed = corrupt(photos(32)[2][:, :24], Corruption("pixelate", severity), key=0)
    assert np.array_equal(changed, expected)


@pytest.mark.parametrize("severity, quality", list(enumerate((80, 65, 58, 50, 40), 1)))
def test_jpeg_is_stored_with_its_quality(severity: int, quality: int) -> None:
    for pixels in (photos(32)[3], smooth(32, seed=1, channels=1)):
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=quality)
        expected = np.asarray(Image.open(file)).reshape(pixels.shape)
        assert np.array_equal(corrupt(pixels, Corruption("jpeg_compression", severity), key=0), expected)


def error(name: CorruptionName, severity: int, images: list[Pixels]) -> float:
    """Root of the mean square over several images, levels."""
    copies = [corrupt(pixels, Corruption(name, severity), key=i) for i, pixels in enumerate(images)]
    squares = [(copy.astype(float) - pixels) ** 2 for copy, pixels in zip(copies, images, strict=True)]
    return float(np.sqrt(np.mean(squares)))


@pytest.mark.parametrize("name", NAMES)
def test_the_error_grows_with_the_severity(name: CorruptionName) -> None:
    images = [*photos(32), *(smooth(32, seed) for seed in range(4))] * 2  # with other keys the second time
    errors = {severity: error(name, severity, images) for severity in SEVERITIES}
    for order in ORDERS.get(name, [SEVERITIES]):
        grown = [errors[severity] for severity in order]
        assert grown[0] > 0.5 and (np.diff(grown) > 0).all(), errors


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_depends_on_image_key_kind_severity_and_seed_alone(name: CorruptionName) -> None:
    images, corruption = photos(32), Corruption(name, 3)
    copies = [corrupt(pixels, corruption, key) for key, pixels in enumerate(images)]
    for key in reversed(range(len(images))):
        assert np.array_equal(corrupt(images[key], corruption, key), copies[key])
    others = [corrupt(images[0], corruption, "another"), corrupt(images[0], corruption, 0, seed=1)]
    assert [np.array_equal(other, copies[0]) for other in others] == [name not in DRAWN] * 2


def test_severities_of_a_kind_have_their_own_draws() -> None:
    first, fifth = (
        copy.astype(float) - 128 for copy in (at_all_severities("gaussian_noise", flat(128)))[::4]
    )
    assert abs(np.corrcoef(first.ravel(), fifth.ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(32, 32, 3), (20, 33, 3), (1, 1, 3), (32, 17, 1), (5, 20, 5)])
def test_shape_and_type_are_kept_and_the_image_is_left_alone(
    name: CorruptionName, shape: tuple[int, int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels.flags.writeable = False
    corruption = Corruption(name, 5)
    if name in {1: RGB_ONLY, 5: NO_BANDS}.get(shape[2], ()):
        with pytest.raises(InputError, match=rf"^corruption {name}: needs .* channels, the image has \d$"):
            corrupt(pixels, corruption, key=0)
        return
    copy = corrupt(pixels, corruption, key=0)
    assert copy.shape == shape and copy.dtype == np.uint8
    assert shape[0] < 16 or not np.array_equal(copy, pixels)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DRAWN | NO_BANDS])
def test_bands_are_treated_alike(name: CorruptionName) -> None:
    bands, corruption = smooth(32, seed=3, channels=5), Corruption(name, 4)
    single = [corrupt(bands[..., i : i + 1], corruption, key=0) for i in range(5)]
    together = corrupt(bands, corruption, key=0)
    assert abs(together - np.concatenate(single, axis=2).astype(float)).max() <= 1  # float32 rounds ties


@pytest.mark.parametrize("name", sorted(DRAWN - {"snow_like"}))
def test_clouds_and_motion_are_shared_by_the_channels_and_noise_is_not(name: CorruptionName) -> None:
    grey = np.repeat(smooth(32, seed=3, channels=1), 3, axis=2)
    copy = corrupt(grey, Corruption(name, 4), key=0)
    assert (copy == copy[..., :1]).all() == (not name.endswith("noise"))


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_is_read_as_it_is_written(name: CorruptionName) -> None:
    corruption = Corruption(name, 4)
    assert str(corruption) == f"{name}:4" and parse_corruption(str(corruption)) == corruption


@pytest.mark.parametrize(
    "text, place",
    [
        ("contrast:0", "severity 0 must be 1, 2, 3, 4 or 5"),
        ("contrast:6", "severity 6 must be 1, 2, 3, 4 or 5"),
        ("frost:3", "must be one of gaussian_noise, "),
        ("contrast", "must be NAME:SEVERITY"),
        ("contrast:", "must be NAME:SEVERITY"),
        ("contrast:-1", "must be NAME:SEVERITY"),
        ("contrast:2.5", "must be NAME:SEVERITY"),
    ],
)
def test_wrong_text_is_refused_in_one_line_with_the_choices(text: str, place: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_corruption(text)
    message = str(caught.value)
    assert message.startswith("corruption ") and place in message and "\n" not in message
    assert "severity" in message or all(name in message for name in NAMES)


@pytest.mark.parametrize(
    "pixels", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)]
)
def test_what_is_no_image_is_refused(pixels: Pixels) -> None:
    with pytest.raises(InputError, match=r"^corruption fog: needs \(H, W, C\) uint8 pixels, not .*$"):
        corrupt(pixels, Corruption("fog", 1), key=0)
