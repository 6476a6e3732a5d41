"""Which transport a run uses: what its recipe says, as far as its placement allows."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, assert_never

from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe
from fopd_cli.runtime.memory.weights import Layout, WeightChannel, layout_bytes
from fopd_cli.runtime.placement import Plan
from fopd_cli.runtime.weights.broadcast import Broadcast
from fopd_cli.runtime.weights.ipc import Ipc
from fopd_cli.runtime.weights.transport import Shared, Transport

KEY = "placement.transport"


def chosen(recipe: Recipe, plan: Plan) -> Literal["shared", "broadcast", "ipc"]:
    """Raises `UserError` if the recipe names one that the placement does not allow."""
    if (wrong := misfit(recipe, plan)) is not None:
        raise UserError("; ".join(wrong))
    wanted = recipe.placement.transport
    return "shared" if wanted == "auto" else wanted  # until whole runs on GPUs say what is faster


def misfit(recipe: Recipe, plan: Plan) -> tuple[str, str] | None:
    """Why the placement does not allow the transport that the recipe names, and what to do about it."""
    wanted = recipe.placement.transport
    if wanted in ("auto", "shared"):
        return None
    learners = {d for spec in plan.learners for d in spec.devices}
    samplers = {d for spec in plan.samplers for d in spec.devices}
    if plan.exclusive:
        what = "reads from a learner that is awake, and in time-slicing it sleeps while samplers load"
        return f"{KEY}: {wanted} {what}", "set it to shared"
    if wanted == "broadcast" and (both := sorted(learners & samplers)):
        what = f"needs learner and samplers on different devices, and both use cuda:{both[0]}"
        return f"{KEY}: broadcast {what}", "set it to ipc or shared"
    if wanted == "ipc" and not samplers:
        what = "hands over memory of a CUDA device, and samplers run on the CPU here"
        return f"{KEY}: ipc {what}", "set it to shared or broadcast"
    if wanted == "ipc" and (alone := sorted(samplers - learners)):
        what = f"needs a learner rank on every device of a sampler, and cuda:{alone[0]} has none"
        return f"{KEY}: ipc {what}", "set it to broadcast or shared, or placement.mode to colocate"
    return None


def host_bytes(recipe: Recipe, layout: Layout) -> int:
    """Bytes of the host's slots in shared memory."""
    reserved = recipe.placement.transport in ("auto", "shared") or conductor_reads(recipe)
    return 2 * layout_bytes(layout) if reserved else 0


def conductor_reads(recipe: Recipe) -> bool:
    """Whether the conductor reads weights itself: to keep the best student, or to save the version before."""
    return recipe.eval.keep_best is not None or recipe.schedule.lag is not None


def made(recipe: Recipe, plan: Plan, layout: Layout, rendezvous: Path) -> Transport:
    """The run's transport; `rendezvous` begins the names of files that its processes meet at. Raises
    `UserError` as `chosen` does.
    """
    mirrored, devices = conductor_reads(recipe), sorted({d for s in plan.samplers for d in s.devices})
    match chosen(recipe, plan):
        case "shared":
            return Shared(WeightChannel.create(layout, ranks=len(plan.learners)))
        case "broadcast":
            return Broadcast.create(layout, rendezvous, recipe.runtime.timeout_s, mirrored)
        case "ipc":
            return Ipc.create(layout, devices, rendezvous, mirrored)
        case other:
            assert_never(other)
