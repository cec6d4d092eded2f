"""How much faster the pixel path is than a full decode and resize with Pillow, in one interleaved run.

    python benchmarks/pixel_path.py [FOLDER] [--rounds 5] [--photos 200] [--json]

FOLDER holds photos of ordinary size; without it, noise-plus-shapes photos of 400 x 533 pixels are made. A
12-megapixel JPEG is always made. Both sides start from bytes in memory and end in the same
`uint8[224, 224, 3]`; every image goes through one and at once through the other, first and second in turns,
so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from holotype.preprocess import SUFFIXES, Pixels, Preprocess, read_pixels

SPEC = Preprocess()


def ours(data: bytes) -> Pixels:
    return read_pixels(data, spec=SPEC)


def plain_pillow(data: bytes) -> Pixels:
    """Full decode, EXIF orientation, the same resize: what a first version would do."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.array(upright.resize((SPEC.width, SPEC.height), Image.Resampling.BICUBIC))


def made_photo(width: int, height: int, *, seed: int) -> bytes:
    """A JPEG of shapes under grain, with about the bytes per pixel of a photo."""
    dice = np.random.default_rng(seed)
    canvas = Image.new("RGB", (width, height), tuple(int(level) for level in dice.integers(0, 256, 3)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(40):
        (left, top), (wide, high) = dice.random(2), 0.05 + 0.3 * dice.random(2)
        box = (left * width, top * height, (left + wide) * width, (top + high) * height)
        draw.ellipse(box, fill=tuple(int(level) for level in dice.integers(0, 256, 3)))
    grain = dice.integers(-12, 13, (height, width, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(canvas).astype(np.int16) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def photos_of(folder: Path | None, *, count: int) -> list[bytes]:
    if folder is None:
        return [made_photo(400, 533, seed=seed) for seed in range(min(count, 50))]
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"no images in {folder}")
    step = max(len(files) // count, 1)
    return [file.read_bytes() for file in files[::step][:count]]


def seconds(read: Callable[[bytes], Pixels], data: bytes) -> float:
    started = time.perf_counter()
    read(data)
    return time.perf_counter() - started


def compare(images: Sequence[bytes], *, rounds: int) -> dict[str, float]:
    """Median milliseconds per image of both sides, and the median of their ratios image by image."""
    times: dict[str, list[float]] = {"ours": [], "pillow": []}
    ratios, gaps = [], []
    for turn in range(rounds + 1):
        for index, data in enumerate(images):
            first, second = (ours, plain_pillow) if (turn + index) % 2 else (plain_pillow, ours)
            spent = {first: seconds(first, data), second: seconds(second, data)}
            if turn == 0:  # warm-up, and proof that both give the same picture
                gaps.append(float(np.abs(ours(data).astype(int) - plain_pillow(data)).mean()))
                continue
            times["ours"].append(spent[ours])
            times["pillow"].append(spent[plain_pillow])
            ratios.append(spent[plain_pillow] / spent[ours])
    return {
        "images": len(images),
        "pillow_ms": 1000 * statistics.median(times["pillow"]),
        "ours_ms": 1000 * statistics.median(times["ours"]),
        "speedup": statistics.median(ratios),
        "mean_difference": statistics.mean(gaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="photos to read; made when not given")
    parser.add_argument("--photos", type=int, default=200, help="how many of them, evenly spread")
    parser.add_argument("--rounds", type=int, default=5, help="times each image is read by both sides")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()

    results = {
        "12 MP JPEG": compare([made_photo(4000, 3000, seed=0)], rounds=3 * arguments.rounds),
        "photos": compare(photos_of(arguments.folder, count=arguments.photos), rounds=arguments.rounds),
    }
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'':12}{'images':>8}{'Pillow ms':>12}{'ours ms':>10}{'speed-up':>10}{'mean diff':>11}")
    for name, row in results.items():
        print(
            f"{name:12}{row['images']:8.0f}{row['pillow_ms']:12.2f}{row['ours_ms']:10.2f}"
            f"{row['speedup']:9.2f}x{row['mean_difference']:11.2f}"
        )


if __name__ == "__main__":
    main()
