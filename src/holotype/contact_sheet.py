"""A contact sheet: some images of a dataset with their boxes and labels, to look at before training."""

from __future__ import annotations

import hashlib
import io
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from holotype.bundle import write_bytes
from holotype.dataset import Listing, Record
from holotype.dataset.listing import file_and_region
from holotype.errors import ConfigError, DatasetError, ImageError
from holotype.fields import printable
from holotype.preprocess import Box, Limits, Preprocess, facts, read_pixels

__all__ = ["check_sheet", "draw_sheet"]

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_WIDTH, _SMALLEST, _LARGEST, _MOST_COLUMNS, _GAP = 2400, 200, 800, 12, 12
_LISTED = 24
_PAPER, _INK, _FAINT, _MOUNT = (255, 255, 255), (20, 20, 20), (110, 110, 110), (235, 235, 235)

# S. Trubetskoy's list of simple, distinct colours, the dark and the very light ones left out.
_COLOURS: tuple[Colour, ...] = (
    (230, 25, 75),
    (60, 180, 75),
    (0, 130, 200),
    (245, 130, 48),
    (240, 50, 230),
    (255, 225, 25),
    (70, 240, 240),
    (145, 30, 180),
    (210, 245, 60),
    (170, 110, 40),
    (0, 128, 128),
    (250, 190, 212),
    (128, 128, 0),
    (220, 190, 255),
)


@dataclass(frozen=True)
class _Photo:
    """An image file and what the dataset says about it: regions with labels, or the label of all of it."""

    path: str
    marks: tuple[tuple[Box | None, str], ...]


@dataclass(frozen=True)
class _Style:
    """Colours by class and the fonts that fit the tiles."""

    colours: Mapping[str, Colour]
    tile: tuple[int, int]
    label: Font
    small: Font
    captioned: bool

    @property
    def strip(self) -> int:
        """Height of what stands under a picture: its label, where it has one of its own, and its name."""
        return _height(self.small) + 8 + (_height(self.label) + 6 if self.captioned else 0)


def check_sheet(file: Path) -> None:
    """Refuse a file that a sheet cannot be written to, before any work is done for it."""
    if file.suffix.lower() not in _FORMATS:
        raise ConfigError("is no name for a picture", where=file, fix="name it .png or .jpg")
    if file.exists():
        raise DatasetError("exists", where=file, fix="name another file, or remove it")


def draw_sheet(listing: Listing, file: Path, *, examples: int, limits: Limits | None = None) -> int:
    """Draw images with at least `examples` examples of all classes in turn; returns how many were drawn.

    The sample depends on nothing but the records. Regions are drawn as boxes on their photo, as wide as they
    are cut out, so with the margin of `data.margin`. An image that cannot be read is an empty tile.
    """
    limits = limits or Limits()
    photos = _sample(listing.records, examples=examples)
    counts = Counter(record.label for record in listing.records)
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(sorted(counts))}
    contents = [_read(listing.root / photo.path) for photo in photos]
    columns = min(_MOST_COLUMNS, max(1, round((len(photos) * 1.4) ** 0.5)))
    width = min(max(_WIDTH // columns, _SMALLEST), _LARGEST)
    height = round(width * _aspect(contents, limits))
    captioned = any(region is None for photo in photos for region, _ in photo.marks)
    style = _Style(
        colours,
        (width, height),
        label=_font(min(max(width // 18, 15), 26)),
        small=_font(min(max(width // 30, 11), 18)),
        captioned=captioned,
    )
    tiles = [
        _tile(photo, data, style=style, limits=limits) for photo, data in zip(photos, contents, strict=True)
    ]
    drawn = sum(len(photo.marks) for photo in photos)
    title = f"{drawn:,} of {len(listing.records):,} examples, {len(photos):,} images"
    _write(_arrange(tiles, columns=columns, title=title, counts=counts, style=style), file)
    return drawn


def _sample(records: Sequence[Record], *, examples: int) -> list[_Photo]:
    """Photos by classes in turn, each class in an order that is random to the eye and always the same."""
    marks: dict[str, list[tuple[Box | None, str]]] = {}
    for record in records:
        path, region = file_and_region(record.path)
        marks.setdefault(path, []).append((region, record.label))
    shuffled = sorted(
        marks, key=lambda path: hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    )
    queues: dict[str, deque[str]] = {}
    for path in shuffled:
        for label in {label for _, label in marks[path]}:
            queues.setdefault(label, deque()).append(path)
    chosen: dict[str, None] = {}
    drawn = 0
    while queues and drawn < examples:
        for label in sorted(queues):
            while queues[label] and queues[label][0] in chosen:
                queues[label].popleft()
            if not queues[label]:
                del queues[label]
            elif drawn < examples:
                path = queues[label].popleft()
                chosen[path] = None
                drawn += len(marks[path])
    return [_Photo(path, tuple(marks[path])) for path in chosen]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _aspect(contents: Sequence[bytes], limits: Limits) -> float:
    """Height over width of the usual image, within bounds."""
    ratios = []
    for data in contents:
        try:
            found = facts(data, limits=limits)
        except ImageError:
            continue
        ratios.append(found.height / found.width)
    return min(max(statistics.median(ratios), 0.5), 1.5) if ratios else 0.75


def _tile(photo: _Photo, data: bytes, *, style: _Style, limits: Limits) -> Image.Image:
    width, height = style.tile
    tile = Image.new("RGB", (width, height + style.strip), _PAPER)
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, width - 1, height - 1), fill=_MOUNT)
    try:
        found = facts(data, limits=limits)
        scale = min(width / found.width, height / found.height)
        # The smallest size a `Preprocess` has; a line of pixels becomes a bar.
        inner = max(round(found.width * scale), 8), max(round(found.height * scale), 8)
        pixels = read_pixels(data, spec=Preprocess(width=inner[0], height=inner[1]), limits=limits)
    except ImageError as error:
        draw.text(
            (8, 8), _fitting(f"cannot be read: {error}", width - 16, style.small), _INK, font=style.small
        )
    else:
        picture = Image.fromarray(pixels)
        across, down = inner[0] / found.width, inner[1] / found.height
        _draw_boxes(picture, photo, across=across, down=down, style=style)
        tile.paste(picture, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    _caption(draw, photo, top=height + 2, style=style)
    return tile


def _draw_boxes(picture: Image.Image, photo: _Photo, *, across: float, down: float, style: _Style) -> None:
    draw = ImageDraw.Draw(picture)
    line = max(style.tile[0] // 240, 2)
    boxes = [
        (_within(box, picture.size, across=across, down=down), label)
        for box, label in photo.marks
        if box is not None
    ]
    for box, label in boxes:
        draw.rectangle(box, outline=style.colours[label], width=line)
    taken: list[Box] = []
    for box, label in boxes:
        text = _fitting(label, picture.width, style.label)
        place = _free_place(box, _size(text, style.label), picture.size, taken)
        taken.append(place)
        _chip(draw, place, text, colour=style.colours[label], font=style.label)


def _within(box: Box, extent: tuple[int, int], *, across: float, down: float) -> Box:
    """The corners of a region on the picture of its photo; a table may name any numbers."""
    left = min(max(box.left * across, 0), extent[0] - 1)
    top = min(max(box.top * down, 0), extent[1] - 1)
    right = min(max(box.right * across - 1, left), extent[0] - 1)
    return Box(left, top, right, min(max(box.bottom * down - 1, top), extent[1] - 1))


def _free_place(box: Box, size: tuple[int, int], extent: tuple[int, int], taken: Sequence[Box]) -> Box:
    """Where a label hides no other: above its box, in a corner of it, or below."""
    width, height = size
    corners = (
        (box.left, box.top - height),
        (box.left, box.top),
        (box.right - width, box.top),
        (box.left, box.bottom - height),
        (box.right - width, box.bottom - height),
        (box.left, box.bottom),
    )
    moved = (
        (min(max(left, 0), extent[0] - width), min(max(top, 0), extent[1] - height)) for left, top in corners
    )
    places = [Box(left, top, left + width, top + height) for left, top in moved]
    return next((place for place in places if not any(_overlap(place, other) for other in taken)), places[1])


def _overlap(one: Box, other: Box) -> bool:
    return (
        one.left < other.right
        and other.left < one.right
        and one.top < other.bottom
        and other.top < one.bottom
    )


def _caption(draw: ImageDraw.ImageDraw, photo: _Photo, *, top: int, style: _Style) -> None:
    width = style.tile[0]
    left = 0
    for label in sorted({label for box, label in photo.marks if box is None}):
        text = _fitting(label, width, style.label)
        size = _size(text, style.label)
        place = Box(left, top, left + size[0], top + size[1])
        _chip(draw, place, text, colour=style.colours[label], font=style.label)
        left += size[0] + 4
    below = top + _height(style.label) + 6 if left else top
    draw.text((0, below), _fitting(photo.path, width, style.small, keep_end=True), _FAINT, font=style.small)


def _arrange(
    tiles: Sequence[Image.Image], *, columns: int, title: str, counts: Mapping[str, int], style: _Style
) -> Image.Image:
    tile_width, tile_height = tiles[0].size
    rows = -(-len(tiles) // columns)
    width = max(columns * (tile_width + _GAP) + _GAP, 640)
    header = _header(width, title=title, counts=counts, style=style)
    sheet = Image.new("RGB", (width, header.height + rows * (tile_height + _GAP) + _GAP), _PAPER)
    sheet.paste(header, (0, 0))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(
            tile, (_GAP + column * (tile_width + _GAP), header.height + _GAP + row * (tile_height + _GAP))
        )
    return sheet


def _header(width: int, *, title: str, counts: Mapping[str, int], style: _Style) -> Image.Image:
    """The title, and each class in its colour with its count."""
    font = _font(24)
    line = _height(font) + 12
    chips = [(label, f"{label} {counts[label]:,}") for label in sorted(counts)[:_LISTED]]
    if len(counts) > _LISTED:
        chips.append(("", f"and {len(counts) - _LISTED:,} more classes"))
    places: list[tuple[Box, str, str]] = []
    left, top = _GAP, _GAP + line
    for label, full in chips:
        text = _fitting(full, width - 2 * _GAP, font)
        size = _size(text, font)
        if left + size[0] > width - _GAP and left > _GAP:
            left, top = _GAP, top + line
        places.append((Box(left, top, left + size[0], top + size[1]), text, label))
        left += size[0] + 8
    header = Image.new("RGB", (width, top + line), _PAPER)
    draw = ImageDraw.Draw(header)
    draw.text((_GAP, _GAP), title, _INK, font=font)
    for place, text, label in places:
        _chip(draw, place, text, colour=style.colours.get(label, _MOUNT), font=font)
    return header


def _chip(draw: ImageDraw.ImageDraw, place: Box, text: str, *, colour: Colour, font: Font) -> None:
    """Text on its class's colour, black or white, whichever is easier to read (ITU-R BT.601 luma)."""
    draw.rectangle(place, fill=colour)
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    draw.text((place.left + 4, place.top + 1), text, _INK if luma > 140 else _PAPER, font=font)


def _fitting(text: str, width: int, font: Font, *, keep_end: bool = False) -> str:
    """`text` on one line, shortened to `width` pixels."""
    text = " ".join(printable(text).split())[-500 if keep_end else 0 :][:500]
    if font.getlength(text) <= width - 8:
        return text
    while text and font.getlength(f"...{text}") > width - 8:
        text = text[1:] if keep_end else text[:-1]
    return f"...{text}" if keep_end else f"{text}..."


def _size(text: str, font: Font) -> tuple[int, int]:
    return round(font.getlength(text)) + 8, _height(font) + 4


def _height(font: Font) -> int:
    return round(font.getbbox("Ág")[3])


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _write(sheet: Image.Image, file: Path) -> None:
    buffer = io.BytesIO()
    sheet.save(buffer, _FORMATS[file.suffix.lower()], quality=90)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, buffer.getvalue())
    except OSError as error:
        raise DatasetError(
            f"cannot be written ({error.strerror})", where=file, fix="name another file"
        ) from error
