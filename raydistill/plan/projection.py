"""What a student that begins as a projection of its teacher will have of it, and the memory that making it takes."""

from __future__ import annotations

from raydistill.config.base import Config
from raydistill.config.models import ProjectionInit
from raydistill.config.schema import RunConfig
from raydistill.errors import RaydistillError
from raydistill.models.projection.forecast import Row, forecast
from raydistill.plan.words import bytes_of


class ProjectionPlan(Config):
    """What the stage `init` makes of the teacher, and what it needs."""

    teacher: str
    """The model that is projected."""
    coverage: float
    """Share of the student's parameters that come from it."""
    random: tuple[str, ...]
    """Tensors that do not."""
    blocks: tuple[int, int]
    """Blocks of the student and of the teacher."""
    memory: int
    """Most bytes of host memory: `student`, the larger one of `reading` and of `running`, and what libraries take."""
    student: int
    """The student in fp32."""
    reading: int
    """The teacher's largest tensor while it is read."""
    running: int
    """The part of the teacher that is in memory while it runs on the calibration rows, and what they leave behind; 0
    without calibration."""


def plan_projection(config: RunConfig, row: Row, missing: list[str]) -> ProjectionPlan | None:
    """The plan of the student's projection, calibrated on rows like `row`; None when it begins otherwise or cannot,
    which is then in `missing`."""
    student = config.first_student
    if not isinstance(student.init, ProjectionInit) or student.init.teacher is None:
        return None
    try:
        found = forecast(student, row)
    except RaydistillError as error:
        missing.append(f"the student's projection: {error}")
        return None
    report = found.report
    return ProjectionPlan(
        teacher=student.init.teacher.source,
        coverage=report.coverage,
        random=tuple(tensor.name for tensor in report.tensors if tensor.origin == "random"),
        blocks=(len(report.blocks), found.teacher_blocks),
        memory=found.peak,
        student=found.student,
        reading=found.reading,
        running=found.weights + found.activations if found.activations else 0,
    )


def projection_lines(plan: ProjectionPlan | None) -> list[tuple[str, str]]:
    """Lines of the section about the student."""
    if plan is None:
        return []
    lines = [
        (
            "begins as",
            f"projection of {plan.teacher.partition('#')[0]}: {plan.coverage:.1%} of its parameters, "
            f"{plan.blocks[0]} of {plan.blocks[1]} blocks",
        )
    ]
    if plan.random:
        more = f" and {len(plan.random) - 3} more" if len(plan.random) > 3 else ""
        lines.append(("", f"(at random: {', '.join(plan.random[:3])}{more})"))
    running = f", the teacher block by block {bytes_of(plan.running)}" if plan.running else ""
    parts = f"student {bytes_of(plan.student)}, largest tensor {bytes_of(plan.reading)}{running}"
    lines.append(("init memory", f"{bytes_of(plan.memory)} ({parts})"))
    return lines
