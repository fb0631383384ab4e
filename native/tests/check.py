"""Check libmm1 without a GPU: `check.py --library libmm1.so --code build/code [--driver stub] NAME`."""

import argparse
from pathlib import Path

import devices
import harness
import launches
import tables

from mm1.autotune import ahead

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--archs", type=lambda archs: archs.split(","), default=list(ahead.GPUS))
    parser.add_argument("--driver", type=Path)
    parser.add_argument("--late", type=Path, help="where the driver is put while the process runs")
    parser.add_argument("name")
    options = parser.parse_args()
    harness.begin(options)
    next(vars(module)[options.name] for module in (tables, launches, devices) if options.name in vars(module))()
