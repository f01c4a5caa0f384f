"""What a run will cost, before it runs: `plan(config)` for programs, `table(plan)` for people."""

from __future__ import annotations

from raydistill.config.schema import RunConfig
from raydistill.config.sources import ImagesSource, PromptsSource, TextSource, VideosSource
from raydistill.config.world import EpisodesSource
from raydistill.plan.estimate import Plan, plan_text
from raydistill.plan.image_table import image_table
from raydistill.plan.images import ImagePlan, plan_images
from raydistill.plan.placement import placement_table
from raydistill.plan.table import text_table
from raydistill.plan.worlds import WorldPlan, plan_worlds, world_table

__all__ = ["ImagePlan", "Plan", "WorldPlan", "placement_table", "plan", "table"]


def plan(config: RunConfig) -> Plan | ImagePlan | WorldPlan:
    """The cost of `config`, whose paths are resolved. Runs nothing; what cannot be known is None and in `missing`."""
    match config.source:
        case TextSource():
            return plan_text(config)
        case ImagesSource() | VideosSource() | PromptsSource():
            return plan_images(config)
        case EpisodesSource():
            return plan_worlds(config)


def table(plan: Plan | ImagePlan | WorldPlan) -> str:
    """The plan for a terminal; what is not known is a question mark, and the reasons stand at the end."""
    match plan:
        case Plan():
            return text_table(plan)
        case ImagePlan():
            return image_table(plan)
        case WorldPlan():
            return world_table(plan)
