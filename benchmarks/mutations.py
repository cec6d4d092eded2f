"""What a server says to damaged images: 10,000 of each format, all over HTTP.

    python benchmarks/mutations.py RUN --count 10000

The damage is that of the tests (`tests/awkward.py`), with seeds of its own. For each format: how many of
which status, the longest answer, and how often an inference process was lost. Exits with 1 where an answer
is neither pixels (200) nor a word about the image (400, 413, 415, 422), where there is none, or where a
process was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

from faults import Server, serving

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from awkward import VARIANTS, mutation

ALLOWED = {200, 400, 413, 415, 422}
CLIENTS = 16
FIRST_SEED = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--formats", nargs="+", choices=sorted(VARIANTS), default=sorted(VARIANTS))
    arguments = parser.parse_args()
    failed = False
    with serving(arguments.run) as server:
        for kind in arguments.formats:
            before = server.workers()
            statuses, longest = asyncio.run(send_all(server, kind, arguments.count))
            lost = len(set(before) - set(server.workers()))
            told = ", ".join(f"{count:,} x {status}" for status, count in sorted(statuses.items()))
            print(
                f"{kind}: {told}; longest {1e3 * longest:.0f} ms; {lost} inference processes lost", flush=True
            )
            failed |= lost > 0 or not set(statuses) <= ALLOWED or statuses.total() < arguments.count
    sys.exit(1 if failed else 0)


async def send_all(server: Server, kind: str, count: int) -> tuple[Counter[int], float]:
    """Statuses of all answers, and the seconds of the longest."""
    originals = [make() for make in VARIANTS[kind]]
    seeds = iter(range(FIRST_SEED, FIRST_SEED + count))
    statuses: Counter[int] = Counter()
    longest = 0.0
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:

        async def work() -> None:
            nonlocal longest
            for seed in seeds:
                data = mutation(kind, originals, seed=seed)
                began = time.monotonic()
                answer = await client.post("/predict", content=data)
                longest = max(longest, time.monotonic() - began)
                statuses[answer.status_code] += 1

        await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return statuses, longest


if __name__ == "__main__":
    main()
