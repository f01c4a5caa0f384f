"""Runs a function on several gloo ranks of this machine, in a process each."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

T = TypeVar("T")
HEAVY = (
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
    "toys",
    "deepspeed",
    "raydistill.train.engine",
)


def run_ranks(fn: Callable[..., T], world_size: int = 2, args: tuple = (), timeout: float = 120) -> list[T]:
    """Call `fn(rank, world_size, *args)` on every rank of a gloo group and return what they return, by rank.

    `fn` is a function of a module's top level and its results can be pickled. When a rank fails, the others are
    ended and `RuntimeError` carries its traceback; a rank that takes longer than `timeout` seconds fails.
    """
    context = mp.get_context("forkserver")
    # Imported once in the server and forked from there: importing them anew in every rank takes seconds. (The server
    # finds `toys` through PYTHONPATH, which conftest.py sets.)
    context.set_forkserver_preload([name for name in HEAVY if name in sys.modules])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes: list[Connection] = []
    processes = []
    for rank in range(world_size):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(fn, rank, world_size, args, port, send), daemon=True)
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    results: dict[int, T] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) < world_size:
            ready = wait([p for r, p in enumerate(pipes) if r not in results], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"ranks {sorted(set(range(world_size)) - set(results))} took over {timeout} s")
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    good, value = pipe.recv()
                except EOFError:
                    processes[rank].join()
                    good, value = False, f"the process ended with status {processes[rank].exitcode}"
                if not good:
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{value}")
                results[rank] = value
        for process in processes:
            process.join(timeout=10)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank(fn: Callable[..., T], rank: int, world_size: int, args: tuple, port: int, pipe: Connection) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        pipe.send((True, fn(rank, world_size, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        pipe.close()
    dist.destroy_process_group()
