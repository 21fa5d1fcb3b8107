"""subcircuit itself: one sweep over all patches, with the executor and the precision that the job names."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import subcircuit as sc
from subcircuit.bench.gemm import gemm_rate, matrix_product_flops

if TYPE_CHECKING:
    from subcircuit.bench.workers.harness import Job


def prepare(job: Job) -> Sweep:
    return Sweep(job)


class Sweep:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = sc.load(job.model, device=job.device)
        tokens = {name: getattr(job, name).cpu() for name in ("clean", "corrupted", "answer", "wrong")}
        self.task = sc.task_from_tokens(**tokens, name="bench", d_vocab=self.model.config.d_vocab)
        self.sites = [
            sc.Site(sc.Component(layer, "z", head), None if position is None else (position,))
            for layer, head, position in job.patches
        ]
        self.n_precise = self.n_full = 0
        self.flops: dict[str, int] = {}
        self.rates: dict[str, list[float]] = {}

    def sweep(self) -> Any:
        result = sc.patch_effects(self.model, self.task, self.sites, **self.job.options)
        self.n_precise, self.n_full = result.n_precise, result.n_full
        return result.effects

    def calibrate(self) -> None:
        if not self.flops:
            self.flops = matrix_product_flops(self.sweep)
        for dtype in self.flops:
            self.rates.setdefault(dtype, []).append(gemm_rate(dtype, self.job.device))

    def notes(self) -> dict[str, Any]:
        """FLOPs of one sweep and the rate of plain large products, by dtype; rows that were not run as asked."""
        rates = {dtype: median(measured) for dtype, measured in self.rates.items()}
        rows = {"n_precise_rows": self.n_precise, "n_full_rows": self.n_full}
        return {"gemm_flops": self.flops, "gemm_flops_per_s": rates, **rows}
