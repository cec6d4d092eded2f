"""XML from elsewhere, through defusedxml, with the line of every element."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holotype.errors import DatasetError, require

__all__ = ["Element", "read_xml"]


@dataclass
class Element:
    """An element with the line it starts on, from 1."""

    tag: str
    line: int
    pieces: list[str] = field(default_factory=list, repr=False)
    children: list[Element] = field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        """What stands between its tags, less the space around it and what its children hold."""
        return "".join(self.pieces).strip()

    def child(self, tag: str) -> Element | None:
        """The first child named `tag`; deeper ones are other things' (a part's box is not the object's)."""
        return next((child for child in self.children if child.tag == tag), None)

    def text_of(self, tag: str) -> str:
        """The text of child `tag`; "" where there is none."""
        found = self.child(tag)
        return "" if found is None else found.text


class _Builder:
    """What the parser calls. ElementTree's own elements have no room for a line."""

    def __init__(self) -> None:
        self.parser: Any = None
        self._open = [Element("", 0)]

    def start(self, tag: str, attributes: object) -> None:  # noqa: ARG002  (the parser passes it)
        element = Element(tag, self.parser.CurrentLineNumber)
        self._open[-1].children.append(element)
        self._open.append(element)

    def end(self, tag: str) -> None:  # noqa: ARG002
        self._open.pop()

    def data(self, text: str) -> None:
        self._open[-1].pieces.append(text)

    def close(self) -> Element:
        return self._open[0].children[0]


def read_xml(file: Path, *, name: str) -> Element:
    """The root element; `DatasetError` where it is not XML, or declares entities."""
    xml = require("defusedxml.ElementTree", extra="train", purpose="reading Pascal VOC")
    builder = _Builder()
    parser = xml.DefusedXMLParser(target=builder)
    builder.parser = parser.parser
    try:
        parser.feed(file.read_bytes())
        root: Element = parser.close()
    except OSError as error:
        raise DatasetError(f"cannot be read ({error.strerror})", where=name, fix="check the file") from error
    except xml.ParseError as error:
        raise DatasetError(
            f"is not XML ({str(error).partition(':')[0]})",
            where=f"{name}: line {error.position[0]}",
            fix="export it again",
        ) from error
    except (ValueError, LookupError) as error:  # defusedxml's refusals, encodings that do not exist
        kind = type(error).__name__
        if kind in ("EntitiesForbidden", "ExternalReferenceForbidden", "DTDForbidden"):
            raise DatasetError(
                "declares entities, which annotations do not need and which can harm",
                where=f"{name}: line {parser.parser.CurrentLineNumber}",
                fix="remove the DOCTYPE",
            ) from error
        raise DatasetError(f"is not readable XML ({error})", where=name, fix="save it as UTF-8") from error
    return root
