"""How a viewer turns a picture: EXIF's orientation, 1 to 8."""

import struct

from PIL import ExifTags, Image

from pretrain.data.pixels import Pixels

AS_STORED = 1
TRANSPOSED = 5  # from this orientation on, width and height are swapped
TURN_BACK = {6: 8, 8: 6}  # the orientation that undoes another; the others undo themselves
EXIF_START = b"Exif\0\0"
APP1, START_OF_SCAN = 0xE1, 0xDA
STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # JPEG markers without a length
MAX_ENTRIES = 512  # of a damaged directory, that could claim 65,535


def jpeg_orientation(content: bytes) -> int:
    """Of a JPEG; 1 where it has no EXIF or one that cannot be read. Looks at markers, not at the pixels."""
    position = 2
    while content[position : position + 1] == b"\xff" and position + 4 <= len(content):
        marker = content[position + 1]
        if marker == START_OF_SCAN:
            break
        if marker == 0xFF or marker in STANDALONE:  # 0xff: a fill byte
            position += 1 if marker == 0xFF else 2
            continue
        if marker == APP1 and content.startswith(EXIF_START, position + 4):
            return _orientation_tag(content, position + 4 + len(EXIF_START))
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return AS_STORED


def image_orientation(image: Image.Image) -> int:
    """Of an image that Pillow has opened, where its format and Pillow know one."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, AS_STORED)
    except Exception:  # damaged notes do not make the pixels worse; their parsers raise whatever they meet
        return AS_STORED
    return orientation if orientation in range(1, 9) else AS_STORED


def turn(pixels: Pixels, orientation: int) -> Pixels:
    """(H, W, C) as shown; a view, (W, H, C) for orientations 5 to 8."""
    match orientation:
        case 2:
            return pixels[:, ::-1]
        case 3:
            return pixels[::-1, ::-1]
        case 4:
            return pixels[::-1]
        case 5:
            return pixels.swapaxes(0, 1)
        case 6:
            return pixels[::-1].swapaxes(0, 1)
        case 7:
            return pixels[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return pixels[:, ::-1].swapaxes(0, 1)
    return pixels


def _orientation_tag(content: bytes, start: int) -> int:
    """The orientation in a TIFF directory that starts at a byte; 1 where it is damaged."""
    order = {b"II": "<", b"MM": ">"}.get(content[start : start + 2])
    if order is None:
        return AS_STORED
    try:
        (offset,) = struct.unpack_from(f"{order}I", content, start + 4)
        (count,) = struct.unpack_from(f"{order}H", content, start + offset)
        for i in range(min(count, MAX_ENTRIES)):
            entry = start + offset + 2 + 12 * i
            tag, kind = struct.unpack_from(f"{order}HH", content, entry)
            if tag == ExifTags.Base.Orientation:
                # Kind 4 is not what the standard says, but some programs write it.
                (value,) = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", content, entry + 8)
                return value if 1 <= value <= 8 else AS_STORED
    except struct.error:
        pass
    return AS_STORED
