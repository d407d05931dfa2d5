"""Many files: plans what a tree of checkpoints needs, converts it, and remembers what is done."""

from fastsd.zoo.engines import Engine, PoolEngine, RayEngine
from fastsd.zoo.plan import Options, Plan, PlanItem, plan_zoo
from fastsd.zoo.run import StartError, Summary, run_plan
from fastsd.zoo.work import Outcome, convert_one

__all__ = [
    "Engine",
    "Options",
    "Outcome",
    "Plan",
    "PlanItem",
    "PoolEngine",
    "RayEngine",
    "StartError",
    "Summary",
    "convert_one",
    "plan_zoo",
    "run_plan",
]
