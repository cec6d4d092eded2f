"""Accuracy on 32-pixel images after five minutes from scratch: holotype against a plain PyTorch loop.

    python benchmarks/small_images.py CIFAR10 --minutes 5 --seeds 0 1 2 --out small.jsonl

CIFAR10 is a class folder with train/ and test/. Both train a ResNet-18 with a 3x3 stem from random weights,
each in a process of its own from the class folder, imports and decoding counted. Short runs measure what an
epoch costs; then the schedule of each is planned to end with the time given. The plain loop
(rivals/plain_small.py) trains on all of train/; holotype holds a part out to choose the best epoch, and its
time is that of the whole command, with export, parity gate and report. Both are scored on test/ outside it.
Runs are appended to --out one by one, and one that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rivals.outcome import Outcome, append_outcome, of, paired_difference, read_outcomes
from rivals.race import Plan, Rival, our_outcome, race_rival, train_ours

SIZE = 32
SETTINGS = (
    "model.name=resnet18",
    "model.weights=none",
    "model.stem=small",
    f"data.size={SIZE}",
    "model.dropout=0.0",
    "augment.preset=light",
    "augment.crop=0.6",
    "fit.scale=1",
    "fit.unfreeze=all",
    "fit.freeze_norm=false",
    "fit.batch_size=128",
    "fit.optimizer.name=sgd",
    "fit.optimizer.learning_rate=0.1",
    "fit.optimizer.weight_decay=5e-4",
    "fit.schedule.name=one-cycle",
    "fit.label_smoothing=0.0",
    "fit.patience=100",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0, help="given to each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of holotype")
    parser.add_argument("--out", type=Path, help="where runs are kept, one JSON a line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder) / "small.jsonl"
        for seed in arguments.seeds:
            for who, run in (("ours", run_ours), ("plain", run_plain)):
                known = of(read_outcomes(out), who, minutes=arguments.minutes)
                if any(outcome.seed == seed for outcome in known):
                    continue
                print(f"{who}, seed {seed} …", flush=True)
                plan = (known[0].epochs, known[0].mode) if known else None
                append_outcome(out, run(arguments, seed=seed, plan=plan))
        outcomes = read_outcomes(out)
        report(*(of(outcomes, who, minutes=arguments.minutes) for who in ("ours", "plain")))


def run_ours(arguments: argparse.Namespace, *, seed: int, plan: Plan | None) -> Outcome:
    data, minutes, settings = arguments.data, arguments.minutes, [*SETTINGS, *arguments.set]
    epochs = plan[0] if plan else 0
    if not plan:
        with train_ours(data, seed=seed, settings=[*settings, "fit.epochs=2"]) as trial:
            epoch = trial.points[-1].seconds - trial.points[-2].seconds
            epochs = max(2 + math.floor((60 * minutes - trial.watched.seconds) / epoch), 1)
    with train_ours(data, seed=seed, settings=[*settings, f"fit.epochs={epochs}"]) as run:
        return our_outcome(run, data, splits=("test",), seed=seed, minutes=minutes)


def run_plain(arguments: argparse.Namespace, *, seed: int, plan: Plan | None) -> Outcome:
    rival = Rival("plain", "plain_small", options=("--size", str(SIZE)))
    return race_rival(rival, arguments.data, seed=seed, minutes=arguments.minutes, plan=plan)


def report(ours: Sequence[Outcome], plain: Sequence[Outcome]) -> None:
    print(f"\n{'':8} {'seed':>4} {'epochs':>6} {'seconds':>8} {'test':>7} {'peak MB':>8} {'firm MB':>8}")
    for outcome in (*ours, *plain):
        print(
            f"{outcome.who:8} {outcome.seed:4} {outcome.epochs:6} {outcome.seconds:8.0f}"
            f" {outcome.accuracy:7.1%} {outcome.peak_mb:8.0f} {outcome.firm_mb:8.0f}"
        )
    seeds = sorted({outcome.seed for outcome in ours} & {outcome.seed for outcome in plain})
    for chosen in ([seed] for seed in seeds):
        print(f"seed {chosen[0]}: {difference(ours, plain, chosen)}")
    print(f"all seeds: {difference(ours, plain, seeds)}")


def difference(ours: Sequence[Outcome], plain: Sequence[Outcome], seeds: Sequence[int]) -> str:
    mine, theirs = ([outcome for outcome in side if outcome.seed in seeds] for side in (ours, plain))
    return str(paired_difference(mine, theirs))


if __name__ == "__main__":
    main()
