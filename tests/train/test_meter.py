"""What a logged line says where players take turns."""

from __future__ import annotations

from raydistill.cache.loader import StepBatches
from raydistill.train.checkpoint import Progressed
from raydistill.train.engine import Update
from raydistill.train.meter import Meter

BATCHES = StepBatches(7, 0, 3, [], 2, [(0, 1), (2,)], ["a", "b", "c"], 0.0)


def update(loss: float, **parts: float) -> Update:
    return Update(loss, parts, {}, loss + 1, {"all": loss / 10}, (), True)


def test_a_line_has_the_last_step_of_each_player_since_the_line_before() -> None:
    meter = Meter()
    done = meter.advanced(Progressed(), BATCHES, update(5.0, dmd=5.0), "student")
    done = meter.advanced(done, BATCHES, update(2.0, denoising=2.0), "critic")
    last = update(3.0, denoising=3.0)
    line = meter.line(meter.advanced(done, BATCHES, last, "critic"), last)
    assert line["parts"] == {"dmd": 5.0, "denoising": 3.0}
    assert (line["loss"], line["grad_norm"]) == (5.0, 6.0)
    assert line["lr"] == {"all": 0.5, "critic/all": 0.3}
    done = meter.advanced(done, BATCHES, last, "critic")
    line = meter.line(done, last)
    assert (line["loss"], line["parts"]) == (3.0, {"denoising": 3.0})
