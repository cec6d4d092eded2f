"""`holotype agree plan`: the same images for several annotators, who see no label and no other's work."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image
from pydantic import ValidationError

from holotype.agree.contract import Item, Plan
from holotype.bundle import replace_folder, write_text
from holotype.config import AgreeConfig, SourceConfig
from holotype.dataset.listing import Listing, Problem, Record, file_and_region, problems_error
from holotype.dataset.revisions import revise
from holotype.dataset.store import cache_folder
from holotype.errors import BrokenImageError, ConfigError, ImageError
from holotype.preprocess import SUFFIXES, Limits, Pixels, cut, facts, read_full
from holotype.progress import track

__all__ = ["CLASSES", "PLAN", "plan", "read_plan"]

PLAN = "plan.json"
CLASSES = "predefined_classes.txt"
"""What LabelImg calls its list of classes."""

_NAME = re.compile(r"\w[\w .@+-]{0,62}\w|\w")
# What Windows does not take as a file name, whatever its ending.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_ANNOTATIONS = frozenset({".csv", ".json", ".parquet", ".txt", ".xml"})
_HOTKEYS = "123456789"


def plan(
    data: Path | str,
    *,
    annotators: Sequence[str],
    overlap: float = 0.1,
    out: Path | str,
    classes: Sequence[str] | None = None,
    config: AgreeConfig | None = None,
) -> Plan:
    """Deal the images of a dataset, or of a folder of unlabelled images, to annotators and write their tasks.

    Every annotator gets the same `max(config.least, overlap · N)` random images, all N where there are fewer;
    the others are dealt out evenly, one annotator each. Each sees them in another random order under neutral
    names. `classes` default to those of the data. Into `out`, a new or empty folder, go

    - `plan.json`, for whoever scores and for no annotator: which name is which image;
    - for each annotator a folder `NAME` of copies with `predefined_classes.txt`, for LabelImg or any viewer
      (a part of an image as PNG), `NAME.csv` with `image_path,label` to fill in, and `NAME-label-studio.json`
      to import into Label Studio, whose LOCAL_FILES_DOCUMENT_ROOT is then `out`;
    - `label-studio-config.xml`, its labelling interface.

    Images that cannot be read are left out and listed in `Plan.problems`; above `config.data.max_unreadable`
    they are an error. `ConfigError`: fewer than two annotators or classes, names that are equal or unfit for
    a file, `out` in use.
    """
    config = config or AgreeConfig()
    data, out = Path(data), Path(out).absolute()
    _check_annotators(annotators)
    if not 0 < overlap <= 1:
        raise ConfigError(f"is {overlap:g}", where="overlap", fix="give a share above 0, at most 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("exists already and is not empty", where=out, fix="choose another folder")
    root, names, found, bad_records = _examples(data, config=config.data)
    classes = _check_classes(classes if classes is not None else found, data=data, given=classes is not None)
    limits = Limits(max_pixels=config.data.max_pixels)
    hashes, unreadable = _check_images(root, names, limits=limits)
    problems, total = (*bad_records, *unreadable), len(names) + len(bad_records)
    if not hashes or len(problems) > config.data.max_unreadable * total:
        raise problems_error(data, problems, total=total)
    rng = np.random.default_rng(config.seed)
    shuffled = [list(hashes)[i] for i in rng.permutation(len(hashes))]
    shared = min(len(hashes), max(config.least, math.ceil(overlap * len(hashes))))
    common = set(shuffled[:shared])
    result = Plan(
        root=str(root.resolve()),
        classes=tuple(classes),
        seed=config.seed,
        items=tuple(Item(path=path, sha256=sha, common=path in common) for path, sha in hashes.items()),
        tasks=_deal(shuffled, annotators, shared=shared, rng=rng),
        problems=tuple(str(problem) for problem in problems),
    )
    with replace_folder(out) as folder:
        _write(folder, result, limits=limits)
    return result


def read_plan(file: Path) -> Plan:
    """The `plan.json` that `plan` wrote."""
    try:
        return Plan.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=file) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"is not a plan of holotype ({' '.join(map(str, (*first['loc'], first['msg'])))})",
            where=file,
            fix="give the plan.json that holotype agree plan wrote, or move this file away",
        ) from error


def _check_annotators(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise ConfigError(
            "agreement needs at least two annotators", where="annotators", fix="for example: ann,bob"
        )
    for name in names:
        taken = PurePosixPath(name).suffix.lower() in _ANNOTATIONS  # by the files of somebody else
        if taken or not _NAME.fullmatch(name) or _RESERVED.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be a file name",
                where="annotators",
                fix="use letters, digits, and inside a name space . _ - + @",
            )
    # Some file systems take Ann and ann for one.
    known: dict[str, str] = {}
    for name in names:
        if known.setdefault(name.casefold(), name) is not name:
            raise ConfigError(
                f"{name!r} occurs twice", where="annotators", fix="give each annotator an own name"
            )


def _check_classes(classes: Sequence[str], *, data: Path, given: bool) -> list[str]:
    if not given and not classes:
        raise ConfigError(
            "the images have no labels, so the classes are not known", where=data, fix="name the classes"
        )
    where = "classes" if given else data
    for name in classes:
        if name != name.strip() or len(name.splitlines()) != 1:
            raise ConfigError(
                f"{name!r} cannot be a class", where=where, fix="use names of one line without outer spaces"
            )
    if len(set(classes)) < len(classes):
        raise ConfigError("a class occurs twice", where=where, fix="name each once")
    if len(classes) < 2:
        raise ConfigError("there is nothing to choose from", where=where, fix="name two or more classes")
    return list(classes)


def _examples(data: Path, *, config: SourceConfig) -> tuple[Path, list[str], list[str], tuple[Problem, ...]]:
    """Root, names of all examples, their classes, and bad records, as of the revision `config` asks for."""
    from holotype.dataset.source import read_source

    if config.format == "auto" and (loose := _loose_images(data)):
        listing = Listing(data, tuple(Record(name, "") for name in loose))
    else:
        listing = read_source(data, config=config)
    listing, _ = revise(listing, cache_folder(data), config.revision)
    names = sorted({record.path for record in listing.records})
    return listing.root, names, sorted({record.label for record in listing.records} - {""}), listing.problems


def _loose_images(folder: Path) -> list[str]:
    """The images of a folder that holds images and nothing that could label them; else none."""
    if not folder.is_dir():
        return []
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if any(entry.is_dir() or entry.suffix.lower() in _ANNOTATIONS for entry in entries):
        return []
    return [entry.name for entry in entries if entry.suffix.lower() in SUFFIXES]


def _check_images(
    root: Path, names: Sequence[str], *, limits: Limits
) -> tuple[dict[str, str], tuple[Problem, ...]]:
    """The SHA-256 of each example's file, in order, and what no annotator could look at."""
    hashes: dict[str, str] = {}
    problems: list[Problem] = []
    with track("checking images", total=len(names)) as progress:
        for path, examples in _by_file(names):
            digest = ""
            for name, view in _views(root / path, examples, limits=limits):
                progress.advance()
                if isinstance(view, Exception):
                    what = view.strerror if isinstance(view, OSError) else str(view)
                    problems.append(Problem(name, str(what), "repair the image or take it out of the data"))
                else:
                    digest = digest or hashlib.sha256((root / path).read_bytes()).hexdigest()
                    hashes[name] = digest
    return hashes, tuple(problems)


def _by_file(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Image files with the examples in each, so that a file of many boxes is decoded once."""
    for path, examples in itertools.groupby(names, key=lambda name: file_and_region(name)[0]):
        yield path, list(examples)


def _views(
    file: Path, examples: Sequence[str], *, limits: Limits
) -> Iterator[tuple[str, Pixels | OSError | ImageError | None]]:
    """What an annotator gets of each example: None for the file as it is, pixels for a part, or why nothing.

    Whole images are looked at by their header alone.
    """
    regions = {name: file_and_region(name)[1] for name in examples}
    pixels: Pixels | None = None
    try:
        if str(file).encode("utf-8", "replace").decode() != str(file):
            raise BrokenImageError("the file's name is not UTF-8")
        data = file.read_bytes()
        facts(data, limits=limits)
        if any(regions.values()):
            pixels = read_full(data, limits=limits)
    except (OSError, ImageError) as error:
        yield from ((name, error) for name in examples)
        return
    for name, region in regions.items():
        try:
            yield name, None if region is None or pixels is None else cut(pixels, region)
        except BrokenImageError as error:
            yield name, error


def _deal(
    shuffled: Sequence[str], annotators: Sequence[str], *, shared: int, rng: np.random.Generator
) -> dict[str, dict[str, str]]:
    """The first `shared` images for everybody, the others in turn; in another random order for each."""
    common, others = shuffled[:shared], shuffled[shared:]
    tasks: dict[str, dict[str, str]] = {}
    for position, annotator in enumerate(annotators):
        mine = [*common, *others[position :: len(annotators)]]
        digits = max(4, len(str(len(mine))))
        tasks[annotator] = {
            f"{number:0{digits}d}{_suffix(mine[chosen])}": mine[chosen]
            for number, chosen in enumerate(rng.permutation(len(mine)), start=1)
        }
    return tasks


def _suffix(name: str) -> str:
    path, region = file_and_region(name)
    return PurePosixPath(path).suffix.lower() if region is None else ".png"


def _write(folder: Path, made: Plan, *, limits: Limits) -> None:
    targets: dict[str, list[Path]] = {}
    for annotator, tasks in made.tasks.items():
        home = folder / annotator
        home.mkdir()
        write_text(home / CLASSES, "".join(f"{name}\n" for name in made.classes))
        write_text(folder / f"{annotator}.csv", _sheet(annotator, tasks))
        write_text(folder / f"{annotator}-label-studio.json", _label_studio_tasks(annotator, tasks))
        for name, path in tasks.items():
            targets.setdefault(path, []).append(home / name)
    write_text(folder / "label-studio-config.xml", _label_studio_config(made.classes))
    # Copies, not links: whoever turns or crops a picture in a viewer must not change the dataset.
    with track("writing tasks", total=len(targets)) as progress:
        for path, examples in _by_file(item.path for item in made.items):
            for name, view in _views(Path(made.root, path), examples, limits=limits):
                if isinstance(view, Exception):
                    raise view
                first, *others = targets[name]
                if view is None:
                    shutil.copyfile(Path(made.root, path), first)
                else:
                    Image.fromarray(view).save(first, compress_level=1)
                for other in others:
                    shutil.copyfile(first, other)
                progress.advance()
    write_text(folder / PLAN, made.model_dump_json(indent=1) + "\n")


def _sheet(annotator: str, tasks: Iterable[str]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("image_path", "label"))
    rows.writerows((f"{annotator}/{name}", "") for name in tasks)
    return text.getvalue()


def _label_studio_tasks(annotator: str, tasks: Iterable[str]) -> str:
    """https://labelstud.io/guide/tasks: with local storage, `d` is relative to the document root."""
    urls = (f"/data/local-files/?d={quote(f'{annotator}/{name}')}" for name in tasks)
    return json.dumps([{"data": {"image": url}} for url in urls], indent=1) + "\n"


def _label_studio_config(classes: Sequence[str]) -> str:
    keys = itertools.chain((f' hotkey="{key}"' for key in _HOTKEYS), itertools.repeat(""))
    choices = "".join(
        f"    <Choice value={quoteattr(name)}{key}/>\n" for name, key in zip(classes, keys, strict=False)
    )
    return (
        "<View>\n"
        '  <Image name="image" value="$image"/>\n'
        '  <Choices name="label" toName="image" choice="single" required="true">\n'
        f"{choices}"
        "  </Choices>\n"
        "</View>\n"
    )
