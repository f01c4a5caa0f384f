"""The training loop: batch, turn, update, average, report, evaluate, checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from raydistill.progress import Progress
from raydistill.train.checkpoint import Progressed
from raydistill.train.evaluation import Evaluations, Report
from raydistill.train.guard import Guard
from raydistill.train.meter import Meter
from raydistill.train.metrics import Metrics
from raydistill.train.prepare import Prepared


def train(prepared: Prepared, report: Report, leaving: Callable[[], bool] = lambda: False) -> Progressed:
    """Train a phase from where it stands to its end, all ranks together; returns how far it came.

    `report` is called on every rank after each logged step and each evaluation. `leaving` is asked on every rank after
    each step, with one answer for all: whether to save at once, since the workers will soon be replaced.
    Raises `TrainingDiverged` when the loss is no number or explodes.
    """
    job, phase, rank = prepared.job, prepared.job.phase, prepared.rank
    done = prepared.resume()
    saved = done.step
    # Losses of different players are on different scales.
    guards = {
        player: Guard(
            phase=phase.name, explode_factor=phase.explode_factor, losses=done.losses if player == "student" else ()
        )
        for player in prepared.engines
    }
    meter = Meter()
    metrics = Metrics(job.metrics_store, phase.name, done.step, job.config) if rank == 0 else None
    evaluations = Evaluations(prepared, metrics, report, first_step=done.step)
    label, total = f"train {phase.name}", prepared.num_steps
    with Progress(label, total=total, unit="steps", done=saved, silent=rank > 0) as progress:
        for batches in prepared.loader(done.step):
            player = prepared.recipe.turn(batches.step)
            update = prepared.engines[player].update(batches.micro_batches, prepared.draws(batches), batches.step)
            guards[player].check(update, batches, last_checkpoint=prepared.checkpoints.name(saved) if saved else None)
            if prepared.ema is not None and player == "student":
                prepared.ema.update(batches.step)
            done = meter.advanced(done, batches, update, player)
            progress.advance(1, note=f"loss {update.loss:.4f}, {meter.speed}")

            last = done.step == total
            if done.step % phase.log_every == 0 or done.step == 1 or last:
                if metrics is not None:
                    metrics.write(done.step, meter.line(done, update))
                report({"step": done.step, "loss": update.loss, **update.parts})
            if evaluations.due(done.step, last=last):
                evaluations.run(done.step)
                meter.pause()
            warned = leaving()
            if done.step % phase.checkpoint.every_steps == 0 or last or warned:
                if metrics is not None:
                    metrics.flush()
                prepared.save(done, guards["student"].losses)
                if warned:
                    prepared.checkpoints.settle()
                saved = done.step
                meter.pause()
    prepared.checkpoints.settle()
    if metrics is not None:
        metrics.close()
    return done
