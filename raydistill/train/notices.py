"""When workers save because they will soon be replaced: their node is to be taken away, or more of them find room."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from raydistill.progress import say
from raydistill.train.job import PhaseJob

SECONDS = 5.0
"""Between two questions; clouds say 30 to 120 seconds before that they take a node away."""


class Notices:
    """Asked by all ranks after each step: whether to save now.

    The workers ask Ray Train together, which makes them wait for each other; so they do when rank 0's clock says so.
    Ray Train looks every `grow_seconds` whether an elastic training can have more, and then replaces all of them.
    """

    def __init__(self, job: PhaseJob):
        self._job, self._asked = job, time.monotonic()
        self._known: set[str] = set()
        self._room = dist.get_world_size()
        self._device = "cuda" if job.config.resources.train.gpus else "cpu"

    def __call__(self) -> bool:
        """Whether there is news, on every rank alike."""
        import ray.train

        if not self._of_rank_0(time.monotonic() - self._asked > SECONDS):
            return False
        self._asked = time.monotonic()
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._known if info is not None else set()
        self._known |= new
        before, self._room = self._room, self._places()
        more = self._of_rank_0(self._room > before)
        if dist.get_rank() == 0 and new:
            say(f"phase {self._job.phase.name}: {len(new)} node(s) will be taken away; saving now")
        elif dist.get_rank() == 0 and more:
            say(f"phase {self._job.phase.name}: there may be room for more workers; saving now")
        return bool(new) or more

    def _of_rank_0(self, value: bool) -> bool:
        """What rank 0 thinks."""
        said = torch.tensor([value], device=self._device, dtype=torch.int32)
        dist.broadcast(said, src=0)
        return bool(said)

    def _places(self) -> int:
        """Workers that an elastic training could have on the nodes of the moment; 0 where the number is fixed."""
        from raydistill.cache.pool import room

        wanted = self._job.config.resources.train
        if dist.get_rank() or isinstance(wanted.workers, int):
            return 0
        return min(wanted.workers[1], room(wanted.cpus, wanted.gpus, wanted.accelerator))
