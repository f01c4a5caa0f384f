"""Stops a training whose loss is no number, or many times what it was."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

import torch.distributed as dist

from raydistill.cache.loader import StepBatches
from raydistill.errors import TrainingDiverged
from raydistill.train.engine import Update

WINDOW = 100
"""Steps over which the usual loss is taken."""
FEWEST = 20
"""Steps before which no loss counts as an explosion."""
SHOWN_ROWS = 8


class Guard:
    """Looks at every step; `losses` are those of the steps before."""

    def __init__(self, *, phase: str, explode_factor: float, losses: Sequence[float] = ()):
        self._phase, self._factor = phase, explode_factor
        self.losses = deque(losses, maxlen=WINDOW)

    def check(self, update: Update, batches: StepBatches, *, last_checkpoint: str | None) -> None:
        """Raise `TrainingDiverged` on every rank alike if this step went wrong."""
        usual = statistics.median(self.losses) if len(self.losses) >= FEWEST else math.inf
        if not update.taken:
            what = f"the loss is {update.loss}"
            rows = _gathered([r for i in update.unsound for r in _rows_of(batches, i)])
        elif not math.isfinite(update.grad_norm):
            what, rows = f"the gradient's norm is {update.grad_norm}", _gathered(batches.row_ids)
        elif usual > 0 and update.loss > self._factor * usual:
            what = f"the loss exploded to {update.loss:.4g} from a usual {usual:.4g} (explode_factor {self._factor:g})"
            rows = _gathered(batches.row_ids)
        else:
            self.losses.append(update.loss)
            return
        shown = ", ".join(rows[:SHOWN_ROWS]) + (f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else "")
        kept = f"The last good checkpoint is {last_checkpoint}" if last_checkpoint else "There is no checkpoint yet"
        raise TrainingDiverged(
            f"phase {self._phase!r}, step {batches.step + 1}: {what}; rows: {shown or 'not known'}. {kept}; the same "
            "command continues from there. A lower lr, a smaller clip_norm or data without these rows may help."
        )


def _rows_of(batches: StepBatches, micro_batch: int) -> list[str]:
    start = sum(len(p) for p in batches.positions[:micro_batch])
    return batches.row_ids[start : start + len(batches.positions[micro_batch])]


def _gathered(rows: list[str]) -> list[str]:
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
