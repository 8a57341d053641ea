"""``python -m bench accuracy``: make the runs of PROTOCOL.md that are missing, then print the tables."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.accuracy.price import price
from bench.accuracy.run import METHODS, PUBLISHED
from bench.accuracy.schedule import groups, work
from bench.accuracy.tables import tables
from bench.accuracy.tasks import NAMES, load

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench accuracy", description=__doc__)
    parser.add_argument("--tables", action="store_true", help="make no run, print the tables of those that are there")
    parser.add_argument("--price", action="store_true", help="make no run, time a step of each method and count memory")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the runs that are there")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no run after so many minutes")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=PUBLISHED)
    parser.add_argument("--ranks", nargs="+", type=int, default=(8,))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data", type=Path, default=Path(".cache"), help="folder of the reviews and the images")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    wanted = groups(chosen.tasks, chosen.methods, chosen.ranks)
    torch.set_num_threads(chosen.threads)
    if chosen.price:
        for name in chosen.tasks:
            print(price(load(name, chosen.data), wanted), flush=True)
        return 0
    if not chosen.tables:
        left = work(wanted, chosen.results, lambda name: load(name, chosen.data), chosen.budget)
        if left:
            print(f"a subset: the budget left out {left} runs and those that depend on them; the same command goes on")
    if chosen.plot:
        from bench.accuracy.plots import save  # matplotlib, for this alone

        save(chosen.results, chosen.plot)
    print(tables(chosen.results))
    return 0
