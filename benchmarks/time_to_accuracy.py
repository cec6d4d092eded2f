"""Seconds to an accuracy: holotype against a plain PyTorch loop, timm's way and fastai's, in one run.

    python benchmarks/time_to_accuracy.py CLOTHING --minutes 12 --seeds 0 1 2 --out race.jsonl
    python benchmarks/time_to_accuracy.py --report race.jsonl [MORE.jsonl ...]

CLOTHING is a class folder with train/, validation/ and test/. Everybody has the same backbone
(tf_efficientnet_lite0) and ImageNet weights, starts from the class folder in a process of its own, with
imports and decoding counted and holotype's pixel cache cold. rivals/ says how each rival trains. A rival is
first run for one epoch (timm's with and without --amp: the faster is raced); then its schedule is planned to
end with the time given. Each keeps the weights of its best epoch on validation, and outside the time says
what it makes of validation and test; holotype is the whole command, with export, parity gate and report.

Runs are appended to --out one by one, and one that is there already is not repeated, so that seeds and
rivals can be run in several sessions (a file for each choice of --preset and --set); --only runs one
contestant. Of equal runs in several files the last is reported. fastai may live in an environment of
its own (`pip install fastai`): --fastai-python.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rivals.outcome import Outcome, append_outcome, of, paired_difference, read_outcomes
from rivals.race import Plan, Rival, our_outcome, race_rival, train_ours, write_weights

SCRIPTS = {"plain": "plain_loop", "timm": "timm_recipe", "fastai": "fastai_recipe"}


def main() -> None:
    arguments = read_arguments()
    if arguments.report:
        report([outcome for file in arguments.report for outcome in read_outcomes(file)])
        return
    if arguments.data is None:
        sys.exit("give the folder of images, or --report FILES")
    everybody = [arguments.only] if arguments.only else ["ours", *arguments.rivals]
    if "fastai" in everybody:
        need_fastai(arguments.fastai_python)
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder) / "race.jsonl"
        weights = Path(folder) / "imagenet.pth"
        write_weights(weights)
        for seed in arguments.seeds:
            for who in everybody:
                known = of(read_outcomes(out), who, minutes=arguments.minutes)
                if any(outcome.seed == seed for outcome in known):
                    continue
                print(f"{who}, seed {seed} …", flush=True)
                rival = None if who == "ours" else rival_of(who, arguments, weights=weights)
                plan = (known[0].epochs, known[0].mode) if known else None
                append_outcome(out, run(rival, seed, arguments, plan=plan))
        report(read_outcomes(out))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=12.0, help="given to each rival")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rivals", nargs="*", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--only", choices=["ours", *SCRIPTS], help="run one of them")
    parser.add_argument("--preset", default="balanced", help="of holotype")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of holotype")
    parser.add_argument("--fastai-python", default=sys.executable, help="an interpreter that has fastai")
    parser.add_argument("--out", type=Path, help="where runs are kept, one JSON a line")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only report these runs")
    return parser.parse_args()


def need_fastai(python: str) -> None:
    found = subprocess.run([python, "-W", "ignore", "-c", "import fastai, timm"], check=False)
    if found.returncode:
        sys.exit(f"{python} has no fastai: name one that has (--fastai-python), or leave it out (--rivals)")


def rival_of(who: str, arguments: argparse.Namespace, *, weights: Path) -> Rival:
    python = arguments.fastai_python if who == "fastai" else sys.executable
    modes = ((), ("--amp",)) if who == "timm" else ((),)
    return Rival(who, SCRIPTS[who], python=python, options=("--weights", str(weights)), modes=modes)


def run(rival: Rival | None, seed: int, arguments: argparse.Namespace, *, plan: Plan | None) -> Outcome:
    """One run of a rival, or ours."""
    data, minutes = arguments.data, arguments.minutes
    if rival is not None:
        return race_rival(rival, data, seed=seed, minutes=minutes, plan=plan)
    options = ["--preset", arguments.preset]
    with train_ours(data, seed=seed, settings=arguments.set, options=options) as ours:
        return our_outcome(ours, data, splits=("validation", "test"), seed=seed, minutes=minutes)


def report(runs: Sequence[Outcome]) -> None:
    outcomes = list({(run.who, run.seed, run.minutes): run for run in runs}.values())
    print(f"\n{'':8} {'seed':>4} {'seconds':>8} {'validation':>11}")
    for outcome in outcomes:
        for point in outcome.points:
            print(f"{outcome.who:8} {outcome.seed:4} {point.seconds:8.0f} {point.accuracy:11.1%}")
    print(
        f"\n{'':8} {'seed':>4} {'epochs':>6} {'seconds':>8} {'given':>6} {'both splits':>11}"
        f" {'peak MB':>8} {'firm MB':>8}"
    )
    for outcome in outcomes:
        given = 60 * outcome.minutes
        remarks = [*outcome.mode, *(["over its time"] if outcome.seconds > 1.05 * given else [])]
        print(
            f"{outcome.who:8} {outcome.seed:4} {outcome.epochs:6} {outcome.seconds:8.0f} {given:6.0f}"
            f" {outcome.accuracy:11.1%} {outcome.peak_mb:8.0f} {outcome.firm_mb:8.0f} {' '.join(remarks)}"
        )
    for rival, minutes in dict.fromkeys((o.who, o.minutes) for o in outcomes if o.who != "ours"):
        ours, theirs = of(outcomes, "ours", minutes=minutes), of(outcomes, rival, minutes=minutes)
        paired = [(mine, his) for mine in ours for his in theirs if mine.seed == his.seed]
        if paired:
            compare(paired, rival=rival)


def compare(paired: Sequence[tuple[Outcome, Outcome]], *, rival: str) -> None:
    print(f"\nagainst {rival}")
    ratios = []
    for ours, theirs in paired:
        best = max(point.accuracy for point in theirs.points)
        took = next(point.seconds for point in theirs.points if point.accuracy == best)
        reached = next((point.seconds for point in ours.points if point.accuracy >= best), None)
        if reached is None:
            print(
                f"  seed {ours.seed}: its best on validation, {best:.1%} after {took:.0f} s, was not reached"
            )
        else:
            ratios.append(took / reached)
            print(
                f"  seed {ours.seed}: to its best on validation, {best:.1%}: it {took:.0f} s, holotype"
                f" {reached:.0f} s, ratio {ratios[-1]:.1f}"
            )
        print(f"    both splits after {ours.minutes:g} minutes: {paired_difference([ours], [theirs])}")
    mine, others = [ours for ours, _ in paired], [theirs for _, theirs in paired]
    print(f"  all seeds: {paired_difference(mine, others)}", end="")
    if len(ratios) == len(paired):
        print(f"; ratio of times {min(ratios):.1f} to {max(ratios):.1f}", end="")
    memory = statistics.median(o.peak_mb for o in mine) / statistics.median(o.peak_mb for o in others)
    print(f"; peak memory {memory:.2f} of its")


if __name__ == "__main__":
    main()
