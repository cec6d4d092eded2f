"""What the budget search decides, and what it takes: a loose budget, a tight one, one that cannot be met.

    python benchmarks/budgets.py RUN CLOTHING [--out budgets] [--set structured.epochs=1]

RUN is what `train` wrote. For each budget `holotype compress --json` is asked as a user would, in a folder of
its own; its decision is right when what it chose was measured inside every limit, and when nothing was chosen
only if no candidate is. The tight limits are 28 % of the bytes of the parent and half its latency.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from holotype.machine import machine_name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, help="keep the folders here; default: a temporary one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of compress")
    arguments = parser.parse_args()
    print(f"on {machine_name()}")
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        loose = asked(arguments, out / "loose", "--max-drop", "2")
        show("loose", loose)
        parent = loose["parent"]
        size, latency = 0.28 * parent["bytes"] / 1e6, parent["latency_ms"] / 2
        limits = ("--max-drop", "1", "--max-size", f"{size:.2f}MB", "--max-latency", f"{latency:.2f}ms")
        show("tight", asked(arguments, out / "tight", *limits))
        limits = ("--max-drop", "0.5", "--max-size", "100kB", "--max-latency", "0.1ms")
        show("impossible", asked(arguments, out / "impossible", *limits))


def asked(arguments: argparse.Namespace, out: Path, *limits: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "holotype",
        "compress",
        str(arguments.run),
        "--data",
        str(arguments.data),
    ]
    for setting in arguments.set:
        command += ["--set", setting]
    done = subprocess.run(
        [*command, *limits, "--out", str(out), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    if (found["decision"] == "nothing-fits") != (done.returncode == 3):
        raise SystemExit(f"exit code {done.returncode} for {found['decision']}")
    return found


def show(name: str, found: dict[str, Any]) -> None:
    budget = {limit: value for limit, value in found["budget"].items() if value is not None}
    chosen, parent = found["chosen"], found["parent"]
    inside = [one["method"] for one in (*found["candidates"], parent) if fits(one, budget)]
    right = not inside if chosen is None else fits(chosen, budget)
    print(
        f"\n{name}: {budget}\n{found['decision']}: {found['reason']}\n"
        f"{len(found['candidates'])} candidates in {found['seconds']:.0f} s; inside the limits:"
        f" {', '.join(inside) or 'none'}; the decision is {'right' if right else 'WRONG'}"
    )
    for one in found["candidates"]:
        why = "; ".join(one["rejected_because"]) or "chosen"
        print(
            f"  {one['method']:14} {-one['drop']['value']:+.2f} points {one['bytes'] / 1e6:6.2f} MB"
            f" {one['latency_ms']:6.2f} ms  {why}"
        )
    if found["test"]:
        print("  test {accuracy:.1%} ({low:.1%} - {high:.1%})".format(**found["test"]))


def fits(one: dict[str, Any], budget: dict[str, float]) -> bool:
    values = {
        "drop": one["drop"]["value"],
        "class_drop": one["class_drop"],
        "size": one["bytes"],
        "latency": one["latency_ms"],
    }
    return all(values[limit] <= most for limit, most in budget.items())


if __name__ == "__main__":
    main()
