"""What `holotype audit` finds of faults that were planted, and what it costs.

    python benchmarks/audit.py labels DATA            # 8 % of the labels flipped: recall and precision at k
    python benchmarks/audit.py copies DATA --sheet F  # 50 training images altered and put into test
    python benchmarks/audit.py neighbours             # exact and approximate search at 3k, 12k, 100k

DATA is a class folder with train/ and test/. Nothing in it is changed: images are linked elsewhere.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from holotype.config import SourceConfig
from holotype.dataset.source import read_source


def link_tree(source: Path, target: Path) -> list[Path]:
    """Hard links (else copies) of every image below `source`; their paths relative to it, sorted."""
    files = [Path(record.path) for record in read_source(source, config=SourceConfig()).records]
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / file, target / file)
        except OSError:
            shutil.copy2(source / file, target / file)
    return files


def run_audit(data: Path, out: Path) -> tuple[dict, float, float]:
    """`holotype audit` as a user runs it; its JSON, seconds, and peak memory of all its processes in MB."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "holotype", "audit", str(data), "--out", str(out), "--json", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode not in (0, 3, 4):
        sys.exit(done.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    return json.loads(done.stdout), seconds, peak


def flip_labels(data: Path, scratch: Path, *, share: float, seed: int) -> dict[str, str]:
    """A linked copy in which `share` of the files lie in a wrong class; new path → true class."""
    dice = random.Random(seed)
    files = sorted(str(file) for file in link_tree(data, scratch))
    classes = sorted({Path(file).parts[-2] for file in files})
    flipped = {}
    for file in dice.sample(files, round(share * len(files))):
        path = Path(file)
        wrong = dice.choice([name for name in classes if name != path.parts[-2]])
        moved = path.parent.parent / wrong / f"{path.parts[-2]}-{path.stem}{path.suffix}"
        (scratch / path).rename(scratch / moved)
        flipped[moved.as_posix()] = path.parts[-2]
    return flipped


def measure_labels(data: Path, *, share: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        flipped = flip_labels(data, Path(scratch) / "data", share=share, seed=seed)
        found, seconds, peak = run_audit(Path(scratch) / "data", Path(scratch) / "out")
    images = found["source"]["images"]
    ranking = [suspect["path"] for suspect in found["label_suspects"]]
    print(
        f"{len(flipped)} of {images} labels flipped; {len(ranking)} suspects; {seconds:.0f} s, {peak:.0f} MB"
    )
    for k in (len(flipped) // 4, len(flipped) // 2, len(flipped), round(0.1 * images)):
        hits = sum(path in flipped for path in ranking[:k])
        print(f"first {k:5}: precision {hits / k:.1%}, recall {hits / len(flipped):.1%}")
    named = [s for s in found["label_suspects"] if s["path"] in flipped]
    right = sum(suspect["suggested"] == flipped[suspect["path"]] for suspect in named)
    print(f"suggested label right for {right} of {len(named)} found; estimate of label accuracy "
          f"{found['label_accuracy']['estimate']:.1%} (true at most {1 - share:.1%})")  # fmt: skip


def alter(image: Image.Image, kind: str, dice: random.Random) -> bytes:
    """A re-encoded image, mirrored or with 5 % of each side cut off as `kind` says."""
    if "flipped" in kind:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "cropped" in kind:
        width, height = round(image.width * 0.95), round(image.height * 0.95)
        left, top = dice.randint(0, image.width - width), dice.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=dice.randint(60, 90))
    return buffer.getvalue()


KINDS = ("exact", "re-encoded", "flipped", "cropped", "flipped and cropped")


def plant_copies(data: Path, scratch: Path, *, count: int, seed: int) -> dict[tuple[str, str], str]:
    """A linked copy with `count` training images put into test; (training path, test path) → kind."""
    dice = random.Random(seed)
    files = sorted(str(file) for file in link_tree(data, scratch))
    chosen = dice.sample([file for file in files if file.startswith("train/")], count)
    planted = {}
    for place, file in enumerate(chosen):
        kind, path = KINDS[place % len(KINDS)], Path(file)
        target = Path("test") / path.parts[-2] / f"planted-{place:03}.jpg"
        content = (scratch / path).read_bytes()
        if kind != "exact":
            content = alter(Image.open(io.BytesIO(content)).convert("RGB"), kind, dice)
        (scratch / target).write_bytes(content)
        planted[file, target.as_posix()] = kind
    return planted


def measure_copies(data: Path, *, count: int, seed: int, sheet: Path | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "data"
        planted = plant_copies(data, root, count=count, seed=seed)
        found, seconds, peak = run_audit(root, Path(scratch) / "out")
        clusters = [set(cluster["paths"]) for cluster in found["duplicates"]["clusters"]]
        print(f"{count} planted; {len(clusters)} clusters; {seconds:.0f} s, {peak:.0f} MB")
        for kind in KINDS:
            pairs = [pair for pair, what in planted.items() if what == kind]
            hit = sum(any(set(pair) <= cluster for cluster in clusters) for pair in pairs)
            print(f"{kind:20} {hit} of {len(pairs)} found")
        print("calibration", json.dumps(found["duplicates"]["calibration"]))
        print("leakage", found["leakage"]["fraction"], json.dumps(found["leakage"]["effects"]))
        others = beyond(found, planted)
        print(f"{len(others)} pairs beyond the planted ones")
        if sheet is not None:
            draw_pairs(root, random.Random(seed).sample(others, min(50, len(others))), sheet)


def beyond(found: dict, planted: dict[tuple[str, str], str]) -> list[tuple[str, str]]:
    """Of each cluster, every path but the planted ones beside the first."""
    added = {test for _, test in planted}
    pairs = []
    for cluster in found["duplicates"]["clusters"]:
        paths = [path for path in cluster["paths"] if path not in added]
        pairs += [(paths[0], path) for path in paths[1:]]
    return pairs


def draw_pairs(root: Path, pairs: list[tuple[str, str]], file: Path, *, side: int = 120) -> None:
    """The pairs side by side, five a row."""
    rows = max(-(-len(pairs) // 5), 1)
    canvas = Image.new("RGB", (5 * (2 * side + 10), rows * (side + 16)), "white")
    draw = ImageDraw.Draw(canvas)
    for place, pair in enumerate(pairs):
        left, top = place % 5 * (2 * side + 10), place // 5 * (side + 16)
        draw.text((left, top), f"{place} {Path(pair[0]).parts[-2]} | {Path(pair[1]).parts[-2]}", "black")
        for column, name in enumerate(pair):
            image = Image.open(root / name).convert("RGB")
            scale = side / max(image.size)
            size = round(image.width * scale), round(image.height * scale)
            canvas.paste(image.resize(size, Image.Resampling.BICUBIC), (left + column * side, top + 14))
    canvas.save(file)


def measure_neighbours(sizes: list[int]) -> None:
    """Search of synthetic embeddings (1280 numbers) and hashes, of which 1 % have a copy."""
    from holotype.audit.neighbours import hash_pairs, nearest

    for size in sizes:
        dice = np.random.default_rng(0)
        copies = size // 100
        vectors = dice.standard_normal((size, 1280), dtype=np.float32)
        vectors[:copies] = vectors[-copies:] + 0.1 * dice.standard_normal((copies, 1280), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        hashes = dice.integers(0, 2**64, (size, 8), dtype=np.uint64)
        hashes[:copies, 0] = hashes[-copies:, 0] ^ np.uint64(0b111)
        for approximate in (False, True):
            began = time.perf_counter()
            rows, _ = nearest(vectors, count=8, approximate=approximate)
            embedded = time.perf_counter() - began
            hit = (rows[:copies, 0] == np.arange(size - copies, size)).mean()
            began = time.perf_counter()
            pairs = hash_pairs(hashes, within=5, approximate=approximate)
            hashed = time.perf_counter() - began
            wanted = set(zip(range(copies), range(size - copies, size), strict=True))
            same = len(wanted & set(map(tuple, pairs.tolist()))) / copies
            print(
                f"{size:7,} {'approximate' if approximate else 'exact':11} embeddings {embedded:7.1f} s, "
                f"recall {hit:.1%}; hashes {hashed:6.1f} s, recall {same:.1%}; "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("labels", "copies", "neighbours"))
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--share", type=float, default=0.08)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3_000, 12_000, 100_000])
    options = parser.parse_args()
    if options.what == "neighbours":
        measure_neighbours(options.sizes)
    elif options.data is None:
        parser.error("name a dataset")
    elif options.what == "labels":
        measure_labels(options.data, share=options.share, seed=options.seed)
    else:
        measure_copies(options.data, count=options.count, seed=options.seed, sheet=options.sheet)


if __name__ == "__main__":
    main()
