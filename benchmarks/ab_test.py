"""An A/B test looked at after every answer: false verdicts, power, and how many answers it takes.

    python benchmarks/ab_test.py --runs 2000 --answers 20000

Two streams of right and wrong answers, simulated; each run stops at the first verdict. The fixed-size test is
the usual one of two proportions (alpha 5 % two-sided, power 80 %), looked at once. Shares: of 100,000 keys.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from holotype.experiment import assign
from holotype.sequential import log_evidence


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--answers", type=int, default=20_000, help="of each arm at most")
    parser.add_argument("--rate", type=float, default=0.90, help="accuracy of the champion")
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--differences", type=float, nargs="+", default=[0.0, 0.01, 0.02, 0.05])
    arguments = parser.parse_args()
    print(f"champion {arguments.rate:.0%}, {arguments.runs} runs, a look after every answer of both arms")
    for difference in arguments.differences:
        stops, won = simulate(difference, arguments)
        report(difference, stops, won, arguments)
    shares()


def simulate(difference: float, arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """When each run stopped (answers of each arm; 0: never), and whether the challenger was called better."""
    rng = np.random.default_rng(round(1e6 * (1 + difference)))
    limit = math.log(1 / arguments.alpha)
    stops = np.zeros(arguments.runs, dtype=np.int64)
    won = np.zeros(arguments.runs, dtype=bool)
    count = np.arange(1, arguments.answers + 1)
    block = max(4_000_000 // arguments.answers, 1)
    for start in range(0, arguments.runs, block):
        size = min(block, arguments.runs - start)
        right = [
            np.cumsum(rng.random((size, arguments.answers)) < rate, axis=1)
            for rate in (arguments.rate, arguments.rate + difference)
        ]
        evidence = log_evidence(right[0], count - right[0], right[1], count - right[1])
        crossed = evidence > limit
        first = crossed.argmax(axis=1)
        ever = crossed[np.arange(size), first]
        rows = np.arange(size)
        stops[start : start + size] = np.where(ever, first + 1, 0)
        won[start : start + size] = ever & (right[1][rows, first] > right[0][rows, first])
    return stops, won


def report(difference: float, stops: np.ndarray, won: np.ndarray, arguments: argparse.Namespace) -> None:
    ever = stops > 0
    lost = ever & ~won
    if not difference:
        print(
            f"  equal arms: {won.mean():.2%} called better, {lost.mean():.2%} called worse"
            f" (at most {arguments.alpha:.0%} together)"
        )
        return
    fixed = fixed_size(arguments.rate, arguments.rate + difference)
    spent = np.where(ever, stops, arguments.answers)
    reached = {
        share: np.sort(np.where(won, stops, np.inf))[int(share * len(stops))] for share in (0.5, 0.8, 0.95)
    }
    told = ", ".join(f"{share:.0%} by {value:.0f}" for share, value in reached.items())
    print(
        f"  +{100 * difference:g} points: {won.mean():.1%} called better ({told} answers of each arm),"
        f" {lost.mean():.2%} worse; on average {spent.mean():.0f} answers, a fixed-size test needs {fixed}"
    )


def fixed_size(one: float, other: float) -> int:
    """Answers of each arm of a test of two proportions."""
    variance = one * (1 - one) + other * (1 - other)
    return math.ceil((1.96 + 0.84) ** 2 * variance / (other - one) ** 2)


def shares() -> None:
    for share in (0.01, 0.1, 0.5):
        keys = 100_000
        arms = [assign(f"user-{key}".encode(), experiment="shares", share=share) for key in range(keys)]
        count = arms.count("challenger")
        spread = 3.29 * math.sqrt(keys * share * (1 - share))  # 99.9 %
        inside = abs(count - keys * share) <= spread
        told = "inside" if inside else "OUTSIDE"
        print(f"  share {share:.0%}: {count:,} of {keys:,} keys, {told} ± {spread:.0f}")


if __name__ == "__main__":
    main()
