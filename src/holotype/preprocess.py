"""The pixel path: the only code that turns the bytes of an image into `uint8[H, W, 3]`.

guard → decode → EXIF orientation → region → colour → resize. Training, evaluation, calibration, parity,
command line and HTTP all come through `read_pixels`, so a model is never served other pixels than it was
trained on.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from holotype.errors import (
    BrokenImageError,
    ConfigError,
    EmptyImageError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
    require,
)

__all__ = [
    "FORMATS",
    "MOST_PIXELS",
    "SUFFIXES",
    "Box",
    "Facts",
    "Limits",
    "Pixels",
    "Preprocess",
    "cut",
    "facts",
    "read_full",
    "read_pixels",
    "read_views",
]

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
"""Pillow's names of the formats we open; HEIF joins them with the `heic` extra."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
    | {".heic", ".heif"}
)
"""File name endings (lower case) that folders are searched for."""

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION = 0x0102, 0x0106, 0x0112
_WHITE_IS_ZERO = 0
# What in a PNG can say that it is turned: EXIF, or XMP as text, or XMP that is compressed.
_PNG_TURNS = (
    b"eXIf",
    b"Raw profile type exif",
    b"tiff:Orientation",
    b"XML:com.adobe.xmp\0\1",
    b"zTXtXML:com.adobe.xmp",
)
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A DCT-scaled JPEG is decoded to at least this multiple of the target, so that the antialiased resize, not
# the DCT, shapes the final pixels.
_DRAFT_HEADROOM = 1.5
# Real progressive JPEGs have about ten scans; each one more is another pass over every pixel, so that a small
# file with hundreds of them decodes for minutes.
_EXPECTED_SCANS, _MAX_SCANS = 20, 100
_MAX_SCANNED_PIXELS = 1_000_000_000
MOST_PIXELS = 1_000_000_000
_GUARD = threading.Lock()  # of Pillow's own limit, which belongs to the whole process
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",  # and MPO, which Pillow opens as JPEG first
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_BMP_HEADER_SIZES = frozenset({12, 40, 52, 56, 64, 108, 124})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})

_PILLOW_CHATTER = ("ignore", None, UserWarning, re.compile(r"(PIL|pillow_heif)\."), 0)


class Box(NamedTuple):
    """A rectangle in pixels of the upright (EXIF-oriented) image; right and bottom are exclusive."""

    left: float
    top: float
    right: float
    bottom: float


_Level = Annotated[int, Field(ge=0, le=255)]


class Preprocess(BaseModel):
    """A frozen, versioned description of how an image becomes pixels; stored in every bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    height: int = Field(224, ge=8, le=4096)
    width: int = Field(224, ge=8, le=4096)
    resize: Literal["squash", "letterbox", "crop"] = Field(
        "squash", description="stretch to the target | fit inside and pad | fill and cut the centre"
    )
    crop_fraction: float = Field(0.875, gt=0, le=1, description="share of the shorter side kept by `crop`")
    filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    background: tuple[_Level, _Level, _Level] = Field(
        (255, 255, 255), description="RGB under transparent pixels and around a letterboxed image"
    )

    def __str__(self) -> str:
        cut = f" {self.crop_fraction:g}" if self.resize == "crop" else ""
        ground = bytes(self.background).hex()
        return f"v{self.version} {self.height}x{self.width} {self.resize}{cut} {self.filter} on #{ground}"

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal digests give equal pixels."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Limits:
    """What an untrusted image may cost. `max_pixels` is checked on the header, before any decoding.

    `ConfigError` above a billion: the decoder holds up to four bytes of each pixel.
    """

    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        if self.max_pixels > MOST_PIXELS:
            raise ConfigError(
                f"{self.max_pixels:,} pixels are more than is ever decoded",
                where="max_pixels",
                fix=f"set at most {MOST_PIXELS:,}",
            )


@dataclass(frozen=True)
class Facts:
    """What the header of an image says: Pillow's names of format and mode, and its upright size in pixels."""

    format: str
    mode: str
    width: int
    height: int


def facts(data: bytes, *, limits: Limits | None = None) -> Facts:
    """Read the header alone, under the guards of `read_pixels`; raises an `ImageError` as it does."""
    limits = limits or Limits()
    try:
        image = _identify(data, limits=limits)
        width, height = image.size
        # Pillow decodes a whole PNG to look for EXIF and XMP behind the pixels; nearly none has any.
        plain = image.format == "PNG" and not any(mark in data for mark in _PNG_TURNS)
        if not plain and width * height <= limits.max_pixels and _orientation(image) >= 5:
            width, height = height, width
        return Facts(image.format or "", image.mode, width, height)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise BrokenImageError(f"broken image ({type(error).__name__}: {error})") from error


def read_full(data: bytes, *, region: Box | None = None, limits: Limits | None = None) -> Pixels:
    """Decode `data` at its own size: `uint8[H, W, 3]`, RGB, upright, or the `region` of it (see `cut`).

    For pictures that people look at and for crops written as files. Raises an `ImageError` as `read_pixels`.
    """
    try:
        image, _ = _open_upright(data, spec=None, region=None, limits=limits or Limits())
        pixels = np.array(_to_rgb(image, background=Preprocess().background))
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise BrokenImageError(f"broken image ({type(error).__name__}: {error})") from error
    return pixels if region is None else cut(pixels, region)


def cut(pixels: Pixels, region: Box) -> Pixels:
    """The part of `uint8[H, W, 3]` in `region`, in whole pixels, at least one; `BrokenImageError` outside."""
    height, width = pixels.shape[:2]
    box = _clip(region, extent=Box(0, 0, width, height))
    left, top = min(round(box.left), width - 1), min(round(box.top), height - 1)
    return pixels[top : max(round(box.bottom), top + 1), left : max(round(box.right), left + 1)]


def read_pixels(
    data: bytes, *, spec: Preprocess, region: Box | None = None, limits: Limits | None = None
) -> Pixels:
    """Decode `data` to `uint8[spec.height, spec.width, 3]`, RGB, upright.

    `region` is a box in upright pixels of the full-size image (an annotated object); None is the whole
    image. Raises an `ImageError` whose class says why: empty (400), over `limits` (413), not an image format
    we read (415), broken or truncated (422).
    """
    return read_views(data, spec=spec, sizes=((spec.height, spec.width),), region=region, limits=limits)[0]


def read_views(
    data: bytes,
    *,
    spec: Preprocess,
    sizes: tuple[tuple[int, int], ...],
    region: Box | None = None,
    limits: Limits | None = None,
) -> tuple[Pixels, ...]:
    """Decode once and resize to several (height, width) `sizes`, all showing what `spec` shows.

    The training cache keeps a larger view beside the exact one. The DCT scale of the decoder follows
    `spec`, never `sizes`, so the exact view is the same whatever else is asked for.
    """
    try:
        image, box = _open_upright(data, spec=spec, region=region, limits=limits or Limits())
        image = _to_rgb(image, background=spec.background)
        views = {size: _resize(image, box, spec=spec, height=size[0], width=size[1]) for size in set(sizes)}
        return tuple(views[size] for size in sizes)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # Pillow's parsers raise anything at all on hostile bytes; this is the border of untrusted input.
        raise BrokenImageError(f"broken image ({type(error).__name__}: {error})") from error


def _open_upright(
    data: bytes, *, spec: Preprocess | None, region: Box | None, limits: Limits
) -> tuple[Image.Image, Box]:
    """Guard and decode; returns the upright image and the region to show, in the pixels of that image.

    A JPEG comes at the smallest scale that `spec` needs, and at its own without one.
    """
    image = _identify(data, limits=limits)
    full_width, full_height = image.size
    if full_width * full_height > limits.max_pixels:
        raise ImageTooLargeError(
            f"image of {full_width} x {full_height} pixels is over the limit of {limits.max_pixels:,} pixels"
        )
    factor = 1
    if image.format in ("JPEG", "MPO"):
        _refuse_scan_bomb(data, image)
        factor = 1 if spec is None else _draft(image, spec=spec, region=region)
    _fix_transparent_value(image)
    try:
        image.load()
    except OSError as error:
        truncated = "truncated" in str(error) or "Truncated" in str(error)
        raise BrokenImageError("truncated image" if truncated else f"broken image ({error})") from error
    orientation = _orientation(image)
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    return image, _visible(
        image, full=(full_width, full_height), factor=factor, turn=orientation, region=region
    )


def _visible(image: Image.Image, *, full: tuple[int, int], factor: int, turn: int, region: Box | None) -> Box:
    """The whole image or `region` of it, in the pixels of the upright `image` decoded at 1/`factor`.

    The decoder rounds the scaled size up: the content ends in the middle of the last stored column and row,
    which the orientation may have turned into the first.
    """
    width, height = full
    if factor == 1:
        width, height = image.size
    elif turn >= 5:
        width, height = height, width
    box = Box(0, 0, width, height)
    if region is not None:
        box = _clip(region, extent=box)
    left = image.width - width / factor if turn in (2, 3, 6, 7) else 0.0
    top = image.height - height / factor if turn in (3, 4, 7, 8) else 0.0
    return Box(
        left + box.left / factor, top + box.top / factor, left + box.right / factor, top + box.bottom / factor
    )


def _identify(data: bytes, *, limits: Limits) -> Image.Image:
    if not data:
        raise EmptyImageError("empty file, no image bytes")
    name = _format_of(data)
    if name is None:
        raise UnsupportedImageError("not an image we read", fix="use JPEG, PNG, WebP, AVIF, BMP, GIF or TIFF")
    if name == "HEIF":
        _register_heif()
    _mute_pillow()
    _allow_pillow(limits)
    try:
        return Image.open(io.BytesIO(data), formats=[name])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = min(limits.max_pixels, Image.MAX_IMAGE_PIXELS or limits.max_pixels)
        raise ImageTooLargeError(f"image is over the limit of {most:,} pixels") from error
    except UnidentifiedImageError as error:
        raise BrokenImageError(f"broken {name} header") from error


def _format_of(data: bytes) -> str | None:
    """Pillow's name of the format, by the first bytes alone; other bytes never reach a decoder."""
    if data[4:8] == b"ftyp":
        return _iso_brand(data)
    if data.startswith(b"RIFF"):
        return "WEBP" if data[8:12] == b"WEBP" else None
    if data.startswith(b"BM"):  # so does some text
        return "BMP" if int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES else None
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)


def _iso_brand(data: bytes) -> str | None:
    """Which of the two still formats in an ISO media container this is, by all the brands it lists."""
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[at : at + 4] for at in (8, *range(16, end, 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else None


def _mute_pillow() -> None:
    """Ignore what Pillow warns about odd metadata, now and from now on, in this process.

    Strange bytes must not fill the log of a server, nor be read differently under `python -W error`. The
    filters of `warnings` belong to the whole process and `catch_warnings` is not safe in threads, so these
    two stay: plain `UserWarning`s of Pillow's own modules, and, where the program says nothing else about it,
    the bomb warning, which `Limits` replaces.
    """
    if not warnings.filters or warnings.filters[0] != _PILLOW_CHATTER:
        warnings.filterwarnings("ignore", category=UserWarning, module=_PILLOW_CHATTER[3].pattern)
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)


def _allow_pillow(limits: Limits) -> None:
    """Let Pillow open what somebody allows who has raised our limit above its own guard against bombs.

    That guard is left alone otherwise, is raised no further than to what was asked for, and never lowered:
    another thread may be reading under its own limits, which are checked on every header as well.
    """
    if limits.max_pixels > Limits.max_pixels:
        with _GUARD:
            if Image.MAX_IMAGE_PIXELS is not None and limits.max_pixels > Image.MAX_IMAGE_PIXELS:
                Image.MAX_IMAGE_PIXELS = limits.max_pixels


def _register_heif() -> None:
    try:
        pillow_heif = require("pillow_heif", extra="heic", purpose="reading HEIC images")
    except Exception as error:
        raise UnsupportedImageError(
            "HEIC images need an extra", fix="run: pip install 'holotype[heic]', or convert to JPEG"
        ) from error
    pillow_heif.register_heif_opener(thumbnails=False)


def _refuse_scan_bomb(data: bytes, image: Image.Image) -> None:
    first = next(_scan_headers(data), None)
    if first is None or (not image.info.get("progressive") and data[first + 2] == len(image.getbands())):
        return  # all components in one scan: the decoder stops behind it
    budget = min(_MAX_SCANS, max(_MAX_SCANNED_PIXELS // (image.width * image.height), _EXPECTED_SCANS))
    # Counting a byte pair is fast and never too low; a video appended by a phone makes it too high.
    if data.count(b"\xff\xda") > budget and (scans := sum(1 for _ in _scan_headers(data))) > budget:
        raise BrokenImageError(f"JPEG with {scans} scans, more than the {budget} allowed at its size")


def _scan_headers(data: bytes) -> Iterator[int]:
    """Where the scans of the first image in a JPEG file start: a walk over its markers, as libjpeg walks."""
    position = 2
    while found := _MARKER.search(data, position):
        marker, position = found[1], found.end()
        if marker == b"\xd9":
            return
        if marker == b"\xda" and position + 2 < len(data):
            yield position
        position += max(int.from_bytes(data[position : position + 2], "big"), 2)


def _draft(image: Image.Image, *, spec: Preprocess, region: Box | None) -> int:
    """Let the JPEG decoder drop resolution that the resize would throw away; returns 1, 2, 4 or 8."""
    full_width = image.width
    width, height = image.size
    if _orientation(image) >= 5:
        width, height = height, width
    visible = Box(0, 0, width, height)
    if region is not None:
        visible = _clip(region, extent=visible)
    across = (visible.right - visible.left) / spec.width
    down = (visible.bottom - visible.top) / spec.height
    if spec.resize == "letterbox":
        shrink = max(across, down)
    else:
        shrink = min(across, down) * (spec.crop_fraction if spec.resize == "crop" else 1.0)
    factor = next((f for f in (8, 4, 2) if shrink / f >= _DRAFT_HEADROOM), 1)
    if factor == 1:
        return 1
    # draft() picks the largest DCT scale that still covers the wanted size, and tells the true extent.
    drafted = image.draft(None, (max(image.width // factor, 1), max(image.height // factor, 1)))
    return 1 if drafted is None else round(full_width / drafted[1][2])


def _fix_transparent_value(image: Image.Image) -> None:
    """Bring a PNG's transparent value to 8 bits, as Pillow does with the pixels but not with the value."""
    value = image.info.get("transparency")
    tiles = getattr(image, "tile", ())
    if image.format != "PNG" or value is None or not tiles:
        return
    match tiles[0].args, value:
        case "L;2", int():
            image.info["transparency"] = value * 85
        case "L;4", int():
            image.info["transparency"] = value * 17
        case "RGB;16B", tuple():
            image.info["transparency"] = tuple(level >> 8 for level in value)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8. A damaged EXIF block says nothing about the pixels: the image is upright."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF upright while loading
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _clip(region: Box, *, extent: Box) -> Box:
    box = Box(
        max(region.left, extent.left),
        max(region.top, extent.top),
        min(region.right, extent.right),
        min(region.bottom, extent.bottom),
    )
    if box.right <= box.left or box.bottom <= box.top:
        raise BrokenImageError(f"region {tuple(region)} lies outside the image")
    return box


def _to_rgb(image: Image.Image, *, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _deep_grey_to_rgb(image, background=background)
    if image.mode in ("I", "F"):
        kind = "signed or 32-bit integer" if image.mode == "I" else "floating point"
        raise UnsupportedImageError(f"{kind} pixels have no fixed range", fix="convert to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        straight = image.convert("LA") if image.mode == "La" else image
        layer = straight if straight.mode == "RGBA" else straight.convert("RGBA")
        ground = Image.new("RGB", image.size, background)
        ground.paste(layer, mask=layer)
        return ground
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, *, background: tuple[int, int, int]) -> Image.Image:
    """Scale grey of 16 bits (12 in some TIFFs) to 8, to the nearest; Pillow's own conversion saturates."""
    tags = image.getexif() if image.format == "TIFF" else {}
    peak = 4095 if tags.get(_BITS_PER_SAMPLE) == 12 else 65535
    levels = _levels(peak=peak, white_is_zero=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)
    rgb = image.convert("I").point(levels, "L").convert("RGB")
    transparent = image.info.get("transparency")
    if transparent is not None:
        rgb.paste(background, mask=Image.fromarray(np.asarray(image) == transparent))
    return rgb


@cache
def _levels(*, peak: int, white_is_zero: bool) -> tuple[int, ...]:
    """For each 16-bit value its 8-bit one: round(255 * value / peak)."""
    values = np.minimum(np.arange(65536, dtype=np.uint32), peak)
    levels = (values * 255 + peak // 2) // peak
    return tuple(int(level) for level in (255 - levels if white_is_zero else levels))


def _resize(image: Image.Image, box: Box, *, spec: Preprocess, height: int, width: int) -> Pixels:
    kernel = _FILTERS[spec.filter]
    box_width, box_height = box.right - box.left, box.bottom - box.top
    if spec.resize == "letterbox":
        scale = min(width / box_width, height / box_height)
        inner = max(round(box_width * scale), 1), max(round(box_height * scale), 1)
        canvas = Image.new("RGB", (width, height), spec.background)
        canvas.paste(
            image.resize(inner, kernel, box=box), ((width - inner[0]) // 2, (height - inner[1]) // 2)
        )
        return np.array(canvas)
    if spec.resize == "crop":
        scale = min(box_width / width, box_height / height) * spec.crop_fraction
        kept = min(width * scale, box_width), min(height * scale, box_height)
        left = box.left + (box_width - kept[0]) / 2
        top = box.top + (box_height - kept[1]) / 2
        box = Box(left, top, left + kept[0], top + kept[1])
    return np.array(image.resize((width, height), kernel, box=box))
