"""What a run will cost, before it runs: `plan(config)` for programs, `table(plan)` for people."""

from raydistill.plan.estimate import Plan, plan
from raydistill.plan.table import table

__all__ = ["Plan", "plan", "table"]
