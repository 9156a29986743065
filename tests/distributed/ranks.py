"""Run a function on several processes that are ranks of one group, and collect what each returns."""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=60)
"""How long a rank waits for the others."""


def _rank(function: Callable[..., Any], rank: int, count: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count, timeout=TIMEOUT)
    try:
        made: Any = function(*args)
    except Exception as error:
        error.add_note(traceback.format_exc())
        made = error
    Path(folder, f"{rank}.tmp").write_bytes(pickle.dumps(made))
    Path(folder, f"{rank}.tmp").rename(Path(folder, f"{rank}"))
    if not isinstance(made, Exception):
        dist.destroy_process_group()


def run(function: Callable[..., Any], count: int, folder: Path, *args: Any) -> list[Any]:
    """Return what a function returns on each rank, an error where it raised one, and None for a rank that died."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(function, rank, count, str(folder), args)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(900)
        if process.is_alive():
            process.kill()
    return [pickle.loads((folder / f"{rank}").read_bytes()) if (folder / f"{rank}").exists() else None for rank in range(count)]
