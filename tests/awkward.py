"""Awkward images as bytes, always the same: odd colour modes, hostile headers, damaged files."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from holotype.errors import ImageError
from holotype.preprocess import Preprocess, read_pixels

Array = npt.NDArray[Any]

ORIENTATION = 0x0112


# ---------------------------------------------------------------------------------------------- pictures


def picture(width: int, height: int, *, seed: int = 0) -> Array:
    """`uint8[height, width, 3]`, unlike any turned or mirrored copy of itself: slopes, boxes, texture."""
    random_numbers = np.random.default_rng(seed)
    down, across = np.mgrid[0:height, 0:width].astype(np.float32)
    across, down = across / max(width - 1, 1), down / max(height - 1, 1)
    channels = np.stack([230 * across, 200 * down, 120 * (1 - across) * (1 + down)], axis=2)
    for _ in range(12):
        left, top = random_numbers.random(2) * 0.8
        wide, high = 0.04 + random_numbers.random(2) * 0.3
        inside = (across >= left) & (across < left + wide) & (down >= top) & (down < top + high)
        channels[inside] = 0.4 * channels[inside] + 0.6 * random_numbers.integers(0, 256, 3)
    coarse = random_numbers.integers(-40, 41, (max(height // 8, 1), max(width // 8, 1)), dtype=np.int8)
    texture = np.kron(coarse, np.ones((9, 9), np.int8))
    texture = np.pad(texture, ((0, max(height - len(texture), 0)), (0, max(width - texture.shape[1], 0))))
    return np.clip(channels + texture[:height, :width, None], 0, 255).astype(np.uint8)


def encode(image: Image.Image | Array, kind: str, **options: Any) -> bytes:
    """An image or `uint8[H, W(, 3|4)]` array as a file of Pillow's format `kind`."""
    buffer = io.BytesIO()
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    opened.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes) -> Array:
    """What Pillow alone makes of a file: full decode, no orientation, RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


# ------------------------------------------------------------------------------------------- orientation


def turned_upright(stored: Array, orientation: int) -> Array:
    """What a viewer shows of `stored` pixels under an EXIF orientation, by the table of the EXIF standard."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation](stored)


def with_orientation(pixels: Array, kind: str, orientation: int, **options: Any) -> bytes:
    """`pixels` as they are, in a file that asks the viewer to turn them."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(pixels, kind, exif=exif, **options)


# --------------------------------------------------------------------------------------------------- PNG

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
"""PNG colour types."""


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int,
    height: int,
    *,
    bits: int,
    colour: int,
    rows: bytes,
    extra: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """A PNG of packed `rows` (all of equal length), with `extra` chunks before the pixels."""
    stride = len(rows) // height
    filtered = b"".join(b"\0" + rows[at : at + stride] for at in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(filtered)), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(kind, content) for kind, content in chunks)


def png_claiming(width: int, height: int) -> bytes:
    """A valid PNG header of any size in front of a few bytes of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, RGB, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(kind, content) for kind, content in chunks)


def grey16_png(values: Array) -> bytes:
    height, width = values.shape
    return png(width, height, bits=16, colour=GREY, rows=values.astype(">u2").tobytes())


@cache
def huge_png() -> bytes:
    """9500 x 9500 white pixels, 90 megapixels in a few kilobytes."""
    return encode(Image.new("1", (9500, 9500), 1), "PNG")


# -------------------------------------------------------------------------------------------------- TIFF


def tiff(
    pixels: bytes,
    *,
    width: int,
    height: int,
    bits: int,
    order: str = "<",
    photometric: int = 1,
    sample_format: int = 1,
) -> bytes:
    """An uncompressed single-channel TIFF in byte `order` "<" or ">"."""
    short, long = 3, 4
    tags = [
        (256, long, width),
        (257, long, height),
        (258, short, bits),
        (259, short, 1),
        (262, short, photometric),
        (273, long, 8 + 2 + 12 * 10 + 4),
        (277, short, 1),
        (278, long, height),
        (279, long, len(pixels)),
        (339, short, sample_format),
    ]
    directory = struct.pack(order + "H", len(tags))
    for tag, kind, value in tags:
        field = struct.pack(
            order + ("HH" if kind == short else "I"), *([value, 0] if kind == short else [value])
        )
        directory += struct.pack(order + "HHI", tag, kind, 1) + field
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "I", 8) + directory + bytes(4) + pixels


def grey16_tiff(values: Array, *, order: str = "<", photometric: int = 1) -> bytes:
    height, width = values.shape
    pixels = values.astype(order + "u2").tobytes()
    return tiff(pixels, width=width, height=height, bits=16, order=order, photometric=photometric)


def grey12_tiff(values: Array) -> bytes:
    """Two 12-bit values in three bytes; the width must be even."""
    height, width = values.shape
    pairs = values.reshape(-1, 2)
    packed = b"".join(((int(a) << 12) | int(b)).to_bytes(3, "big") for a, b in pairs)
    return tiff(packed, width=width, height=height, bits=12)


def float_tiff(values: Array) -> bytes:
    height, width = values.shape
    return tiff(values.astype("<f4").tobytes(), width=width, height=height, bits=32, sample_format=3)


def int32_tiff(values: Array) -> bytes:
    height, width = values.shape
    return tiff(values.astype("<i4").tobytes(), width=width, height=height, bits=32, sample_format=2)


def pages_tiff(pages: list[Array]) -> bytes:
    first, *others = (Image.fromarray(page) for page in pages)
    return encode(first, "TIFF", save_all=True, append_images=others)


# -------------------------------------------------------------------------------------------------- JPEG


def cmyk_jpeg(inks: tuple[int, int, int, int], *, size: tuple[int, int] = (16, 16)) -> bytes:
    """A flat colour in Adobe's inverted CMYK."""
    return encode(Image.new("CMYK", size, inks), "JPEG", quality=100)


def ycck_jpeg(inks: tuple[int, int, int, int], *, size: tuple[int, int] = (16, 16)) -> bytes:
    """The same colour with its CMY stored as YCbCr, which only the Adobe marker tells."""
    cyan, magenta, yellow, black = inks
    ycc = Image.new("RGB", (1, 1), (cyan, magenta, yellow)).convert("YCbCr").getpixel((0, 0))
    assert isinstance(ycc, tuple)
    stored = (*(255 - int(level) for level in ycc), black)
    data = bytearray(encode(Image.new("CMYK", size, stored), "JPEG", quality=100, subsampling=0))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    return bytes(data)


@cache
def photo_jpeg(width: int = 4000, height: int = 3000, **options: Any) -> bytes:
    """A photo-like JPEG with grain, 12 megapixels unless told otherwise."""
    coarse = Image.fromarray(picture(width // 8, height // 8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = np.random.default_rng(1).integers(-12, 13, (height, width, 1), dtype=np.int16)
    return encode(np.clip(smooth + grain, 0, 255).astype(np.uint8), "JPEG", quality=88, **options)


def progressive_jpeg(*, extra_scans: int, width: int = 64, height: int = 48) -> bytes:
    """A progressive JPEG whose last refinement scan is repeated."""
    data = encode(picture(width, height), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * extra_scans + data[-2:]


def two_frame_mpo(first: Array, second: Array) -> bytes:
    return encode(first, "MPO", save_all=True, append_images=[Image.fromarray(second)], quality=90)


def with_app1(jpeg: bytes, content: bytes) -> bytes:
    """`jpeg` with one more APP1 segment, such as an EXIF block, in front."""
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def corrupt_exif_jpeg(pixels: Array) -> bytes:
    """An EXIF block whose tags claim more data than there is, at offsets outside of it."""
    tags = b"".join(
        struct.pack("<HHII", tag, 5, 40_000, 0x7FFFFFF0) for tag in (0x010F, 0x011A, 0x0112, 0x8769)
    )
    return with_app1(
        encode(pixels, "JPEG"), b"Exif\0\0II*\0" + struct.pack("<IH", 8, 4) + tags + b"\xff\xff\xff\xff"
    )


# ---------------------------------------------------------------------------------------------- animation


@cache
def animation(kind: str, *, frames: int = 500, side: int = 32) -> bytes:
    """Frames that all differ; the first one is flat grey of level 200."""
    texture = picture(side, side)[..., 0]
    others = [Image.fromarray(np.roll(texture, shift)) for shift in range(1, frames)]
    options: dict[str, Any] = {"lossless": True, "method": 0} if kind == "WEBP" else {}
    first = Image.new("L", (side, side), 200)
    return encode(first, kind, save_all=True, append_images=others, duration=40, **options)


# ---------------------------------------------------------------------------------------------- not images


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("photo.jpg", encode(picture(8, 8), "JPEG"))
    return buffer.getvalue()


def not_images() -> dict[str, bytes]:
    """Files that someone may have named .jpg."""
    return {
        "text": b"This is not an image.\n" * 20,
        "text like BMP": b"BMW and Mercedes are cars.\n" * 20,
        "html": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n(x) show\n%%EOF\n",
        "binary eps": struct.pack("<IIIIIII", 0xC6D3D0C5, 32, 64, 0, 0, 0, 0)
        + bytes(4)
        + b"%!PS-Adobe-3.0 EPSF",
        "pdf": b"%PDF-1.7\n1 0 obj <</Type /Catalog>> endobj\ntrailer <</Root 1 0 R>>\n%%EOF\n",
        "zip": _zip(),
        "pickle": b"\x80\x04\x95\x1b\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "ppm": b"P6 2 2 255\n" + bytes(12),
        "ico": b"\0\0\1\0\1\0\1\1\0\0\1\0\x18\0\x30\0\0\0\x16\0\0\0" + bytes(48),
        "tga": bytes([0, 0, 2]) + bytes(9) + struct.pack("<HHBB", 2, 2, 24, 0) + bytes(12),
        "webm": b"\x1aE\xdf\xa3" + bytes(60),
        "mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(60),
        "wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
        "zeros": bytes(4096),
        "one byte": b"\xff",
    }


# -------------------------------------------------------------------------------------------- every format


def heic(pixels: Array, *, orientation: int = 1, **options: Any) -> bytes:
    """Needs pillow-heif; a test asks for it with `pytest.importorskip` first."""
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(pixels, "HEIF", exif=exif.tobytes(), **options)


def _bilevel(side: int = 16) -> Image.Image:
    return Image.fromarray(picture(side, side)[..., 0] > 120)


SMALL: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: encode(picture(64, 48), "JPEG"),
    "PNG": lambda: encode(picture(48, 32), "PNG"),
    "WEBP": lambda: encode(picture(48, 32), "WEBP", quality=80),
    "AVIF": lambda: encode(picture(48, 32), "AVIF", speed=10),
    "BMP": lambda: encode(picture(24, 16), "BMP"),
    "GIF": lambda: animation("GIF", frames=3, side=24),
    "TIFF": lambda: encode(picture(24, 16), "TIFF", compression="tiff_lzw"),
    "MPO": lambda: two_frame_mpo(picture(48, 32), picture(48, 32, seed=1)),
}
"""A small valid file of each format that we read."""

VARIANTS: dict[str, tuple[Callable[[], bytes], ...]] = {
    "JPEG": (
        SMALL["JPEG"],
        lambda: encode(picture(64, 48), "JPEG", progressive=True),
        lambda: with_orientation(picture(40, 24), "JPEG", 6),
        lambda: cmyk_jpeg((10, 100, 200, 50)),
    ),
    "PNG": (
        SMALL["PNG"],
        lambda: encode(
            Image.fromarray(picture(32, 24)).quantize(16), "PNG", transparency=bytes(range(0, 160, 10))
        ),
        lambda: grey16_png(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257),
        lambda: encode(_bilevel(), "PNG"),
        lambda: encode(Image.fromarray(picture(16, 16)).convert("LA"), "PNG"),
    ),
    "WEBP": (
        SMALL["WEBP"],
        lambda: encode(picture(24, 16), "WEBP", lossless=True),
        lambda: animation("WEBP", frames=3, side=24),
    ),
    "AVIF": (SMALL["AVIF"], lambda: with_orientation(picture(32, 16), "AVIF", 5, speed=10)),
    "BMP": (
        SMALL["BMP"],
        lambda: encode(Image.fromarray(picture(24, 16)).quantize(16), "BMP"),
        lambda: encode(_bilevel(), "BMP"),
    ),
    "GIF": (SMALL["GIF"], lambda: encode(picture(24, 16), "GIF", transparency=3)),
    "TIFF": (
        SMALL["TIFF"],
        lambda: encode(picture(24, 16), "TIFF"),
        lambda: encode(picture(24, 16), "TIFF", compression="jpeg"),
        lambda: encode(picture(24, 16), "TIFF", compression="tiff_adobe_deflate"),
        lambda: encode(_bilevel(), "TIFF", compression="group4"),
        lambda: grey16_tiff(np.arange(64, dtype=np.uint16).reshape(8, 8), order=">"),
        lambda: with_orientation(picture(24, 16), "TIFF", 7),
    ),
    "MPO": (SMALL["MPO"],),
    "HEIF": (lambda: heic(picture(64, 48)), lambda: heic(picture(64, 32), orientation=6)),
}
"""Files that together reach most of its decoder; the mutators start here. HEIF needs pillow-heif."""


# ------------------------------------------------------------------------------------------------ mutation

_TELLING = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)


def mutate(data: bytes, *, seed: int) -> bytes:
    """Damage `data` in one to four places, as a bad disk, a cut connection or an attacker would."""
    dice = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        if not damaged:
            break
        # Headers are short and decide most: half of all damage goes there.
        end = min(len(damaged), 128) if dice.random() < 0.5 else len(damaged)
        at = dice.randrange(end)
        length = min(dice.choice((1, 2, 4, 16, 64)), len(damaged) - at)
        match dice.randrange(7):
            case 0:
                damaged[at] ^= 1 << dice.randrange(8)
            case 1:
                damaged[at : at + length] = bytes([dice.choice(_TELLING)]) * length
            case 2:
                damaged[at : at + length] = dice.randbytes(length)
            case 3:
                del damaged[at : at + length]
            case 4:
                damaged[at:at] = damaged[at : at + length]
            case 5:
                other = dice.randrange(len(damaged))
                damaged[at : at + length] = damaged[other : other + length]
            case 6:
                del damaged[dice.randrange(len(damaged)) :]
    return bytes(damaged)


def with_right_checksums(data: bytes) -> bytes:
    """A damaged PNG whose chunks pass their CRC, so that the damage reaches the decoder."""
    repaired, at = bytearray(data), len(PNG_SIGNATURE)
    while at + 12 <= len(repaired):
        end = at + 8 + int.from_bytes(repaired[at : at + 4], "big")
        if end + 4 > len(repaired):
            break
        repaired[end : end + 4] = struct.pack(">I", zlib.crc32(repaired[at + 4 : end]))
        at = end + 4
    return bytes(repaired)


def mutation(kind: str, originals: Sequence[bytes], *, seed: int) -> bytes:
    """One of `originals` of a format, damaged; of PNG files three of four pass their checksums."""
    data = mutate(originals[seed % len(originals)], seed=seed)
    return with_right_checksums(data) if kind == "PNG" and seed % 4 else data


def patience(seconds: float = 2.0) -> float:
    """CPU seconds that one image may cost here: `seconds`, or more on a core slower than the usual.

    An image of just under 50 megapixels is legal and takes most of `seconds`, so a core of half the speed
    needs twice as long; how fast this one is, an honest image of 12 megapixels tells (0.12 s on the usual).
    """
    buffer = io.BytesIO()
    Image.effect_noise((4000, 3000), 64).convert("RGB").save(buffer, "JPEG")
    began = time.process_time()
    Image.open(io.BytesIO(buffer.getvalue())).resize((32, 32), Image.Resampling.BICUBIC)
    return seconds * max(1.0, (time.process_time() - began) / 0.12)


def hammer(kind: str, *, start: int, count: int) -> None:
    """Read `count` mutations of format `kind`; for a process of its own, since a decoder may take it down.

    Each seed is written to stdout before it is tried, so that the last line names the one that crashed.
    """
    seconds = patience()
    spec = Preprocess(height=32, width=32, background=(0, 0, 0))
    originals = [make() for make in VARIANTS[kind]]
    for seed in range(start, start + count):
        os.write(1, b"%d\n" % seed)
        data = mutation(kind, originals, seed=seed)
        began = time.process_time()
        with contextlib.suppress(ImageError):
            read_pixels(data, spec=spec)
        spent = time.process_time() - began
        if spent > seconds:
            raise AssertionError(f"{kind} mutation {seed} took {spent:.1f} s")
