"""The gates as JUnit XML, which GitLab, Jenkins, GitHub and others show as a test report."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from holotype.audit.contract import Audit, Gate
from holotype.bundle import write_text

__all__ = ["write_junit"]

# All that XML 1.0 allows in a document, which leaves out most control characters and lone surrogates.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(file: Path, audit: Audit) -> None:
    """Write one test case for each gate to `file`, atomically; a gate that was not measured is skipped.

    Elements and attributes are those that the schema of Jenkins' JUnit plugin and GitLab's reader share. A
    gate takes no time of its own, so the suite has the time of the audit and the cases have none.
    """
    failures = sum(gate.passed is False for gate in audit.gates)
    skipped = sum(gate.passed is None for gate in audit.gates)
    totals = {"tests": f"{len(audit.gates)}", "failures": f"{failures}", "errors": "0"}
    totals["time"] = f"{audit.seconds:.3f}"
    root = ET.Element("testsuites", {"name": "holotype audit", **totals})
    name = _clean(f"holotype audit {audit.source.path}")
    suite = ET.SubElement(root, "testsuite", {"name": name, **totals, "skipped": f"{skipped}"})
    for gate in audit.gates:
        _add_case(suite, gate)
    output = ET.SubElement(suite, "system-out")
    output.text = _clean("\n".join([f"verdict: {audit.verdict}", *audit.reasons]))
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode")
    write_text(file, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')


def _add_case(suite: ET.Element, gate: Gate) -> None:
    case = ET.SubElement(
        suite, "testcase", {"classname": "holotype.audit", "name": _clean(gate.name), "time": "0.000"}
    )
    if gate.passed is None:
        ET.SubElement(case, "skipped", {"message": _clean(f"not measured: {gate.advice}")})
    elif not gate.passed:
        value = "no value" if gate.value is None else f"{gate.value:.6g}"
        message = _clean(f"{gate.name} is {value}, the threshold is {gate.threshold:.6g}")
        failure = ET.SubElement(case, "failure", {"message": message, "type": gate.severity})
        failure.text = _clean(gate.advice)


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
