"""What a run will cost, before it runs: `plan(config)` for programs, `table(plan)` for people."""

from __future__ import annotations

from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.plan.estimate import Plan, plan_text
from raydistill.plan.image_table import image_table
from raydistill.plan.images import ImagePlan, plan_images
from raydistill.plan.placement import placement_table
from raydistill.plan.table import text_table

__all__ = ["ImagePlan", "Plan", "placement_table", "plan", "table"]


def plan(config: RunConfig) -> Plan | ImagePlan:
    """The cost of `config`, whose paths are resolved. Runs nothing; what cannot be known is None and in `missing`."""
    match config.source:
        case TextSource():
            return plan_text(config)
        case ImagesSource() | VideosSource() | PromptsSource():
            return plan_images(config)


def table(plan: Plan | ImagePlan) -> str:
    """The plan for a terminal; what is not known is a question mark, and the reasons stand at the end."""
    return text_table(plan) if isinstance(plan, Plan) else image_table(plan)
