"""What a sweep will cost, before it runs."""

from __future__ import annotations

from collections.abc import Iterable

from subcircuit.analysis.sweep import Components, sites_of
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Source
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Executor, Precision
from subcircuit.engine.patching.planner import Plan, plan_effects


def plan(
    model: HookedTransformer,
    task: Task,
    components: Components = "heads",
    *,
    source: Source = "corrupted",
    positions: str | Iterable[int] | None = None,
    executor: Executor = "torch",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    budget_bytes: int | None = None,
    calibrate: bool = True,
) -> Plan:
    """The plan of `sweep` with the same options: rows, chunks, FLOPs, bytes, seconds. No row is computed.

    With `calibrate`, a second or two goes into timing two of the model's blocks; without it `seconds` is None.

    Raises PatchError as `sweep` does, and for the executor `reference`, which needs no plan: it runs one full forward
    pass per row; for features of a dictionary too.
    """
    if executor == "reference":
        raise PatchError("executor 'reference' has no plan; expected 'torch' or 'triton'")
    sites = sites_of(model.config, components, positions, task.clean.shape[1], model.dictionaries)
    features = [site for site in sites if site.component.is_feature]
    if features:
        raise PatchError(f"site '{features[0]}' has no plan: what features of a dictionary cost is not modelled")
    return plan_effects(
        model,
        task,
        sites,
        source=source,
        executor=executor,
        precision=precision,
        budget_bytes=budget_bytes,
        metric=metric,
        calibrate=calibrate,
    )
