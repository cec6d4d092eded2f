"""What becomes of labelled boxes: each an example, the class of its image, or nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from holotype.config import SourceConfig
from holotype.dataset.annotated import Annotated, Annotations, LabelledBox, problem_of
from holotype.dataset.listing import Listing, Problem, Record, example_name
from holotype.dataset.settle import Placed, settle
from holotype.errors import DatasetError, ImageError
from holotype.preprocess import Box, Limits, facts
from holotype.progress import track

__all__ = ["examples_of"]

_REDRAW = "draw the box again, or remove it"
_ROUNDING = 0.01
"""Pixels that a side may lie beyond a whole pixel for no other reason than six decimals of a share."""


@dataclass
class _Outcome:
    placed: list[Placed] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def examples_of(
    annotations: Annotations, *, source: Path, config: SourceConfig, keep_annotators: bool = False
) -> Listing:
    """The examples that `config.boxes` makes of annotated images.

    `crop`: each box, with `config.margin` of its size on every side, widened to whole pixels and clipped to
    the image; the group is the photo, so that its crops stay in one split. `single`: each image whose boxes
    are of one class. `reject`: images without boxes only. Images known to be empty get `config.background`.
    Boxes that reach over the edge are legal; those that are empty or wholly outside are problems.
    """
    images, problems = _merge(annotations.images)
    boxed = [image for image in images if image.boxes]
    if boxed and config.boxes is None:
        count = sum(len(image.boxes) for image in boxed)
        raise DatasetError(
            f"has {count:,} boxes in {len(boxed):,} images",
            where=source,
            fix="say what to do with them: --set data.boxes=crop, single or reject",
        )
    outcome = _Outcome(ignored=list(annotations.ignored), problems=[*annotations.problems, *problems])
    if not keep_annotators:
        images, rivals = _without_rivals(images, policy=config.boxes)
        outcome.problems += rivals
    with track("reading image sizes", total=len(images)) as progress:
        for image in images:
            _decide(image, outcome, root=annotations.root, config=config)
            progress.advance()
    records, contradictions = settle(outcome.placed, keep_annotators=keep_annotators)
    return Listing(
        annotations.root,
        records,
        ignored=tuple(sorted(set(outcome.ignored))),
        problems=(*outcome.problems, *contradictions),
    )


def _merge(images: Iterable[Annotated]) -> tuple[list[Annotated], list[Problem]]:
    """One `Annotated` for each image and annotator; those that name two splits or labels are problems."""
    groups: dict[tuple[str, str | None], list[Annotated]] = {}
    for image in images:
        groups.setdefault((image.path, image.annotator), []).append(image)
    merged: list[Annotated] = []
    problems: list[Problem] = []
    for same in groups.values():
        problem = _difference(same, "split") or _difference([i for i in same if i.label], "label")
        if problem is not None:
            problems.append(problem)
            continue
        merged.append(
            dataclasses.replace(
                same[0],
                boxes=tuple(box for image in same for box in image.boxes),
                label=next((image.label for image in same if image.label), None),
                complete=all(image.complete for image in same),
            )
        )
    return merged, problems


def _difference(same: Sequence[Annotated], name: str) -> Problem | None:
    first = same[0] if same else None
    other = next((i for i in same if getattr(i, name) != getattr(first, name)), None)
    if first is None or other is None:
        return None
    text = (
        f"{first.path} has {name} {getattr(first, name)!r} here and {getattr(other, name)!r} at {other.where}"
    )
    return Problem(str(first.where), text, f"keep the right {name}")


def _without_rivals(
    images: Iterable[Annotated], *, policy: str | None
) -> tuple[list[Annotated], list[Problem]]:
    """Leave out images whose annotators disagree on where objects are.

    Two sets of boxes on one photo would show each object twice, a little displaced.
    """
    groups: dict[str, list[Annotated]] = {}
    for image in images:
        groups.setdefault(image.path, []).append(image)
    kept: list[Annotated] = []
    problems: list[Problem] = []
    for path, same in groups.items():
        boxed = sum(bool(image.boxes) for image in same)
        if len(same) > 1 and boxed and (policy == "crop" or boxed < len(same)):
            text = f"{path} has boxes by {boxed} of {len(same)} annotators"
            fix = "keep one annotator's, or mark one as ground truth"
            problems.append(Problem(str(same[0].where), text, fix))
        else:
            kept += same
    return kept, problems


def _decide(image: Annotated, outcome: _Outcome, *, root: Path, config: SourceConfig) -> None:
    """Add the examples of one image, or why there are none, to `outcome`."""
    if image.label is not None and not image.boxes:
        outcome.placed.append((_record(image, image.label), image.where))
    elif image.label is not None:
        text = f"{image.path} has both a label and boxes"
        outcome.problems.append(Problem(str(image.where), text, "keep one of them"))
    elif not image.boxes and image.complete and config.background is not None:
        outcome.placed.append((_record(image, config.background), image.where))
    elif not image.boxes or config.boxes == "reject":
        outcome.ignored.append(image.path)
    else:
        _use_boxes(image, outcome, root=root, config=config)


def _use_boxes(image: Annotated, outcome: _Outcome, *, root: Path, config: SourceConfig) -> None:
    try:
        extent = _extent(root / image.path, limits=Limits(max_pixels=config.max_pixels))
    except DatasetError as error:
        outcome.problems.append(problem_of(error, image.where))
        return
    sound: list[tuple[LabelledBox, Box]] = []
    for labelled in image.boxes:
        try:
            sound.append((labelled, _visible(labelled, extent=extent)))
        except DatasetError as error:
            outcome.problems.append(problem_of(error, labelled.where))
    if config.boxes == "crop":
        for labelled, box in sound:
            name = example_name(image.path, _with_margin(box, share=config.margin, extent=extent))
            record = dataclasses.replace(_record(image, labelled.label), path=name, group=image.path)
            outcome.placed.append((record, labelled.where))
        return
    labels = sorted({labelled.label for labelled in image.boxes})
    if len(labels) > 1:
        text = f"{image.path} has boxes of {len(labels)} classes ({', '.join(labels[:3])})"
        fix = "remove it, or make each box an example: --set data.boxes=crop"
        outcome.problems.append(Problem(str(image.where), text, fix))
    elif image.complete and len(sound) == len(image.boxes):
        outcome.placed.append((_record(image, labels[0]), image.where))
    else:
        outcome.ignored.append(image.path)


def _record(image: Annotated, label: str) -> Record:
    return Record(image.path, label, image.split, annotator=image.annotator)


def _extent(file: Path, *, limits: Limits) -> Box:
    """The upright image as a box; sizes that annotation files name are not trusted."""
    fix = "restore it, or remove its annotation"
    try:
        found = facts(file.read_bytes(), limits=limits)
    except OSError as error:
        raise DatasetError(f"{file.name} cannot be read ({error.strerror})", fix=fix) from error
    except ImageError as error:
        raise DatasetError(f"{file.name} cannot be read ({error})", fix=fix) from error
    return Box(0, 0, found.width, found.height)


def _visible(labelled: LabelledBox, *, extent: Box) -> Box:
    """The part of a box inside the image, in pixels."""
    box = labelled.box
    if labelled.relative:
        box = Box(
            box.left * extent.right,
            box.top * extent.bottom,
            box.right * extent.right,
            box.bottom * extent.bottom,
        )
    width, height = box.right - box.left, box.bottom - box.top
    if not (width > 0 and height > 0 and math.isfinite(width) and math.isfinite(height)):
        raise DatasetError(f"box of {width:g} x {height:g} pixels", fix=_REDRAW)
    if labelled.rotation:
        box = _enclosing(box, degrees=labelled.rotation)
    clipped = _clip(box, extent=extent)
    if clipped.right <= clipped.left or clipped.bottom <= clipped.top:
        corners = f"({box.left:g}, {box.top:g}) to ({box.right:g}, {box.bottom:g})"
        size = f"{extent.right:g} x {extent.bottom:g}"
        raise DatasetError(f"box from {corners} lies outside the image of {size} pixels", fix=_REDRAW)
    return clipped


def _enclosing(box: Box, *, degrees: float) -> Box:
    """The upright box around `box` turned clockwise about its left top corner."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    width, height = box.right - box.left, box.bottom - box.top
    across = (0.0, width * cosine, -height * sine, width * cosine - height * sine)
    down = (0.0, width * sine, height * cosine, width * sine + height * cosine)
    return Box(box.left + min(across), box.top + min(down), box.left + max(across), box.top + max(down))


def _with_margin(box: Box, *, share: float, extent: Box) -> Box:
    """Whole pixels, outwards, so that the region of a record is exactly the crop that can be stored."""
    across, down = share * (box.right - box.left), share * (box.bottom - box.top)
    left = min(math.floor(box.left - across + _ROUNDING), extent.right - 1)
    top = min(math.floor(box.top - down + _ROUNDING), extent.bottom - 1)
    right = max(math.ceil(box.right + across - _ROUNDING), left + 1)
    bottom = max(math.ceil(box.bottom + down - _ROUNDING), top + 1)
    return _clip(Box(left, top, right, bottom), extent=extent)


def _clip(box: Box, *, extent: Box) -> Box:
    return Box(
        max(box.left, extent.left),
        max(box.top, extent.top),
        min(box.right, extent.right),
        min(box.bottom, extent.bottom),
    )
