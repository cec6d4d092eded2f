"""One label per image of a split through torch, onnxruntime, OpenVINO, the command line and HTTP.

    python benchmarks/every_door.py runs/NAME DATA --split test

Prints the number of images, the disagreements of each door with onnxruntime, and the largest difference of a
probability. Exits with 1 where any label differs.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from holotype import load
from holotype.config import DatasetConfig
from holotype.dataset import open_dataset

Answers = list[tuple[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="test")
    arguments = parser.parse_args()
    spec = load(arguments.target).bundle.manifest.preprocess
    dataset = open_dataset(arguments.data, spec=spec, config=DatasetConfig())
    files = [dataset.file(path) for path in dataset.paths(dataset.rows(arguments.split))]
    doors = {
        name: through_python(arguments.target, files, name) for name in ("onnxruntime", "torch", "openvino")
    }
    doors["command line"] = through_command_line(arguments.target, files)
    doors["HTTP"] = through_http(arguments.target, files)
    differing = 0
    for door, answers in doors.items():
        wanted = doors["onnxruntime"]
        labels = sum(a[0] != b[0] for a, b in zip(answers, wanted, strict=True))
        gap = max(abs(a[1] - b[1]) for a, b in zip(answers, wanted, strict=True))
        print(f"{door:13} {len(answers)} images, {labels} other labels, probabilities within {gap:.1e}")
        differing += labels
    sys.exit(1 if differing else 0)


def through_python(target: Path, files: list[Path], runtime: str) -> Answers:
    predictor = load(target, runtime=runtime)  # type: ignore[arg-type]
    return [(str(p.label), float(p.probability or 0)) for p in predictor.predict_many(files)]


def through_command_line(target: Path, files: list[Path]) -> Answers:
    command = [sys.executable, "-m", "holotype", "predict", str(target), "-", "--format", "jsonl"]
    names = "\n".join(str(file) for file in files)
    done = subprocess.run(command, input=names, capture_output=True, text=True, check=True)
    return [(row["label"], row["probability"]) for row in map(json.loads, done.stdout.splitlines())]


def through_http(target: Path, files: list[Path]) -> Answers:
    command = [sys.executable, "-m", "holotype", "serve", str(target), "--port", "0", "--set", "log=none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        found = None
        while found is None:
            line = process.stderr.readline() if process.stderr else ""
            if not line:
                raise SystemExit("no server")
            found = re.search(r"http://[\d.]+:\d+", line)
        answers = []
        with httpx.Client(base_url=found[0], timeout=30) as client:
            while client.get("/readyz").status_code != 200:
                time.sleep(0.1)
            for file in files:
                result = client.post("/predict", content=file.read_bytes()).json()["results"][0]
                answers.append((result["label"], result["probability"]))
        process.send_signal(signal.SIGINT)
        return answers


if __name__ == "__main__":
    main()
