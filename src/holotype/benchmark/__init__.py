"""`holotype benchmark`: bundles across runtimes, precisions, batches and threads, in one interleaved run."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holotype.benchmark.figures import Row, draw
from holotype.bundle import Bundle, open_bundle
from holotype.config import BenchmarkConfig
from holotype.errors import BundleError, ConfigError, require
from holotype.machine import machine_name
from holotype.metrics import Interval, evaluate_predictions
from holotype.predictor import load
from holotype.progress import note
from holotype.runtime import Choice, RuntimeName, has_tensorrt, remember, served_bytes
from holotype.timing import Setup, Timing, race, setups_of, usable

if TYPE_CHECKING:
    from holotype.dataset import Dataset

__all__ = ["Benchmark", "Row", "as_json", "benchmark"]

_PHOTOS = 32


@dataclass(frozen=True)
class Benchmark:
    """All rows, and which of them to deploy: the fastest for one image, and the most images per second."""

    rows: tuple[Row, ...]
    for_latency: Row
    for_throughput: Row
    machine: str


def benchmark(
    targets: Sequence[Path | str],
    *,
    data: Path | str | None = None,
    out: Path | str | None = None,
    config: BenchmarkConfig | None = None,
) -> Benchmark:
    """Measure bundles or run folders; the fastest setup of each is remembered for `runtime=auto`.

    It is not remembered where `config` leaves out a way to run it, names threads, or leaves out a batch of
    one image. With `data`, also from the bytes of real files to a label, and accuracy; with `out`, a PNG
    file, also figures. `ConfigError` where no setup is possible.
    """
    config = config or BenchmarkConfig()
    bundles = {target.path: target for target in (open_bundle(target) for target in targets)}
    setups = [setup for bundle in bundles.values() for setup in _setups(bundle, config)]
    if config.runtimes is None:
        setups = usable(setups)
    if not setups:
        raise ConfigError(
            "nothing to measure", where="benchmark", fix="choose other --set runtimes=... or precisions"
        )
    datasets = _datasets(bundles, data, config)
    first = next(iter(bundles))
    timings = race(
        setups,
        batches=config.batches,
        files=_photos(datasets.get(first)),
        rounds=config.rounds,
        seconds=config.seconds,
    )
    rows = tuple(
        _row(timing, bundles[timing.setup.bundle], datasets.get(timing.setup.bundle)) for timing in timings
    )
    least, most = min(config.batches), max(config.batches)
    for bundle in bundles.values():
        _remember(bundle, [row for row in rows if row.bundle == str(bundle.path)], config)
    result = Benchmark(
        rows=rows,
        for_latency=min(rows, key=lambda row: row.timing.batches[least].p50),
        for_throughput=max(rows, key=lambda row: row.timing.batches[most].images_per_second),
        machine=machine_name(),
    )
    if out is not None:
        draw(result.rows, Path(out))
    return result


def as_json(result: Benchmark) -> dict[str, Any]:
    """What `benchmark --json` prints: keys stay, new ones may come; milliseconds by the size of a batch."""
    return {
        "rows": [_row_as_json(row) for row in result.rows],
        "for_latency": _row_as_json(result.for_latency),
        "for_throughput": _row_as_json(result.for_throughput),
        "machine": result.machine,
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    content = asdict(row)
    del content["timing"]["setup"]  # said by the row itself
    content["timing"]["batches"] = {str(count): call for count, call in content["timing"]["batches"].items()}
    return content


def _setups(bundle: Bundle, config: BenchmarkConfig) -> list[Setup]:
    """What there are files and libraries for; what is asked for by name must be possible."""
    payloads = bundle.manifest.payloads
    able: dict[RuntimeName, bool] = {
        "onnxruntime": "onnx" in payloads,
        "openvino": ("onnx" in payloads or "openvino" in payloads) and _installed("openvino"),
        "torch": "weights" in payloads and _installed("torch"),
        "tensorrt": "tensorrt" in payloads and has_tensorrt(),
    }
    wanted: tuple[RuntimeName, ...] = config.runtimes or tuple(
        name for name, possible in able.items() if possible
    )
    for name in wanted:
        if not able.get(name, False):
            raise BundleError(f"cannot run in {name} here", where=bundle.path, fix="leave it out of runtimes")
    return [
        Setup(bundle.path, name, precision, threads)
        for name, precision, threads in itertools.product(
            wanted, config.precisions, config.threads or (None,)
        )
        if not (name in ("onnxruntime", "tensorrt") and precision == "bf16")
    ]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _remember(bundle: Bundle, rows: Sequence[Row], config: BenchmarkConfig) -> None:
    """Keep what is fastest for one image, where all ways to run it as it was accepted were measured."""
    ways = setups_of(bundle)
    asked = [
        way
        for way in ways
        if way.precision in config.precisions and (config.runtimes is None or way.runtime in config.runtimes)
    ]
    if asked != ways or config.threads is not None or 1 not in config.batches:
        note(f"{bundle.path}: measured in part, so what `auto` takes stays as it was")
        return
    own = [row for row in rows if _keeps_answers(row, bundle)]
    if own:
        best = min(own, key=lambda row: row.timing.batches[1].p50)
        remember(bundle, Choice(best.timing.setup.runtime, best.timing.setup.precision, best.threads))


def _keeps_answers(row: Row, bundle: Bundle) -> bool:
    """A bundle that was accepted in fp32 is not served in bf16 unless somebody says so."""
    return not (bundle.manifest.precision == "fp32" and row.precision == "bf16")


def _datasets(
    bundles: Mapping[Path, Bundle], data: Path | str | None, config: BenchmarkConfig
) -> dict[Path, Dataset]:
    """The images of `data` as each bundle sees them; reading them takes what `[train]` installs."""
    if data is None:
        return {}
    require("polars", extra="train", purpose="measuring accuracy (--data)")
    from holotype.dataset import open_for

    return {path: open_for(bundle, data, config=config.data) for path, bundle in bundles.items()}


def _photos(dataset: Dataset | None) -> tuple[Path, ...]:
    if dataset is None:
        return ()
    from holotype.scoring import choose_split

    rows = dataset.rows(choose_split(dataset))
    chosen = rows[:: max(len(rows) // _PHOTOS, 1)][:_PHOTOS]
    return tuple(dataset.root / path for path in dataset.paths(chosen))


def _row(timing: Timing, bundle: Bundle, dataset: Dataset | None) -> Row:
    setup = timing.setup
    return Row(
        bundle=str(bundle.path),
        method=str(bundle.manifest.compression.get("method", bundle.manifest.precision)),
        runtime=setup.runtime,
        precision=setup.precision,
        threads=setup.threads,
        timing=timing,
        bytes=served_bytes(bundle, setup.runtime),
        accuracy=None if dataset is None else _accuracy(setup, bundle, dataset),
    )


def _accuracy(setup: Setup, bundle: Bundle, dataset: Dataset) -> Interval:
    from holotype.scoring import choose_split, score

    predictor = load(bundle.path, runtime=setup.runtime, precision=setup.precision, threads=setup.threads)
    return evaluate_predictions(score(predictor, dataset, split=choose_split(dataset)))["accuracy"]
