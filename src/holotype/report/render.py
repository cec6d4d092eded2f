"""A template and what it shows, as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from holotype.bundle import write_text
from holotype.errors import require

__all__ = ["Figure", "data_uri", "embed_figure", "percent", "write_html"]


@dataclass(frozen=True)
class Figure:
    """A figure as data URIs and its natural size in CSS pixels."""

    light: str
    dark: str | None
    width: int
    height: int


def write_html(
    file: Path,
    template: str,
    *,
    content: Mapping[str, Any],
    filters: Mapping[str, Callable[..., str]],
    package: str | None = None,
) -> None:
    """Render `template` to `file`, atomically: no request to anywhere, and only our own script may run.

    Templates are those of the reports, and before them the files in the folder of `package`, whose pages
    share style and script with them. Filters `count`, `fixed`, `name` and `percent` are always there. The
    template gets `script` and its `script_hash` beside `content`. `MissingExtraError` where Jinja2 is
    missing.
    """
    require("jinja2", extra="train", purpose="drawing a report")
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    own = [PackageLoader(package, "")] if package is not None else []
    environment = Environment(
        loader=ChoiceLoader([*own, PackageLoader("holotype.report")]),
        autoescape=True,  # class names, annotators and paths are whatever somebody called them
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "fixed": lambda value, digits: f"{value:.{digits}f}",
        "percent": percent,
        "name": lambda path: PurePosixPath(path.replace("\\", "/")).name or path,
        **filters,
    }
    script = environment.get_template("report.js").render()
    page = environment.get_template(template).render(
        script=Markup(script),  # noqa: S704 - our own file, nothing of the user's is in it
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        **content,
    )
    write_text(file, page)


def data_uri(data: bytes | None) -> str | None:
    """A PNG or JPEG as a URI that holds it; None where there is none."""
    if not data:
        return None
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def embed_figure(light: Path, dark: Path | None) -> Figure:
    """A PNG file, and the one that is shown instead of it in dark mode."""
    with Image.open(light) as image:
        scale = 96 / image.info.get("dpi", (96, 96))[0]
        width, height = round(image.width * scale), round(image.height * scale)
    return Figure(
        light=data_uri(light.read_bytes()) or "",
        dark=None if dark is None else data_uri(dark.read_bytes()),
        width=width,
        height=height,
    )


def percent(value: float) -> str:
    """A share as people read it: "93.4 %", never broken across lines."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
