"""What a sweep will cost, before it runs: rows, chunks, FLOPs by layer, bytes, and seconds on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.calibrate import Speed, measure_speed
from subcircuit.engine.patching.flops import Flops, chunk_flops, clean_flops, readout_flops
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import DeltaExecutor, Precision
from subcircuit.engine.patching.plan import Chunk, Start, last_changed
from subcircuit.engine.patching.session import DeltaSession
from subcircuit.engine.patching.sites import Patch, PatchSet, Site, Source, as_patch_set
from subcircuit.engine.patching.sources import AlignedPrompts, PromptChunk


@dataclass(frozen=True)
class Plan:
    """What a sweep will cost. Bytes are beside the model's own weights.

    Rows that turn out to need float32 or a full forward are computed twice; which ones is not known before.
    """

    n_sites: int
    n_prompts: int
    n_pos: int
    n_prompt_chunks: int
    n_chunks: int
    """Chunks of rows, over all chunks of prompts."""
    sites_by_layer: tuple[int, ...]
    """By the layer of a site's first patch."""
    product_flops: tuple[int, ...]
    """Of δ times weights, by layer."""
    attention_flops: tuple[int, ...]
    """Of rows' attention, by layer, masked keys included."""
    readout_flops: int
    """Of all rows' final residual streams times W_U; 0 for the logit difference, which needs two columns of it."""
    clean_flops: int
    """Of the forward passes of clean prompts, and of the corrupted ones for their values or means."""
    full_flops: int
    """Of one forward pass per row, which is what patching costs without the delta form; of W_U, what rows need too."""
    budget_bytes: int
    copied_bytes: int
    """Copies of weights: in the products' precision, and side by side where products share an input."""
    clean_bytes: int
    """Clean and source activations of the prompts that are held together."""
    chunk_bytes: int
    """The largest chunk of rows where it is widest."""
    executor: str
    precision: str
    metric: str
    seconds: float | None
    """Predicted from a calibration; None without one."""

    @property
    def n_rows(self) -> int:
        return self.n_sites * self.n_prompts

    @property
    def row_flops(self) -> int:
        """Of all rows, all layers, products and attention, and of reading the metric."""
        return sum(self.product_flops) + sum(self.attention_flops) + self.readout_flops

    @property
    def peak_bytes(self) -> int:
        """The most that is held at any time."""
        return self.copied_bytes + self.clean_bytes + self.chunk_bytes

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self) | {"n_rows": self.n_rows, "row_flops": self.row_flops, "peak_bytes": self.peak_bytes}


def plan_effects(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    patch_sets: Sequence[Patch | Site | str | PatchSet],
    *,
    source: Source = "corrupted",
    executor: DeltaExecutor = "torch",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    budget_bytes: int | None = None,
    calibrate: bool = True,
) -> Plan:
    """The plan of `patch_effects` with the same arguments, from the session's own layout; no row is computed.

    With `calibrate`, a second or two goes into timing two blocks of the model, from which `seconds` is predicted.

    Raises PatchError as `patch_effects` does.
    """
    session = DeltaSession(
        model, prompts, source=source, executor=executor, precision=precision, budget_bytes=budget_bytes, metric=metric
    )
    sets = [as_patch_set(patch_set) for patch_set in patch_sets]
    session.check(sets)
    work = [_Work(session, sets, at, chunk) for at, chunks in session.work(sets) for chunk in chunks]
    layers: Counter[int] = Counter()
    attention: Counter[int] = Counter()
    for chunk in work:
        for layer, flops in chunk.flops.items():
            layers[layer] += flops.products
            attention[layer] += flops.attention
    all_layers = range(model.config.n_layers)
    names = session.wanted_names(sets)
    layout = session.layout(names)
    n_clean = _clean_flops(model.config, session, names)
    sites = Counter(patch_set[0].site.component.layer for patch_set in sets if patch_set)
    forward = clean_flops(model.config, session.n_pos, model.config.n_layers).all
    readout = readout_flops(model.config, metric)
    n_read = sum(chunk.n_rows for chunk in work if chunk.flops)  # above the last layer nothing differs
    widest = max(work, key=lambda chunk: sum(flops.all for flops in chunk.flops.values()), default=None)
    seconds = None
    if calibrate and widest is not None:
        speed = measure_speed(session, sets, widest.prompts, widest.chunk)
        seconds = speed.copy_s + n_clean * speed.clean_flop_s + sum(chunk.seconds(speed) for chunk in work)
    held = layout.most_prompts_held()
    return Plan(
        n_sites=len(sets),
        n_prompts=session.n_prompts,
        n_pos=session.n_pos,
        n_prompt_chunks=len(layout.prompt_chunks),
        n_chunks=len(work),
        sites_by_layer=tuple(sites[layer] for layer in all_layers),
        product_flops=tuple(layers[layer] for layer in all_layers),
        attention_flops=tuple(attention[layer] for layer in all_layers),
        readout_flops=readout * n_read,
        clean_flops=n_clean,
        full_flops=(forward + readout) * len(sets) * session.n_prompts,
        budget_bytes=session.budget_bytes,
        copied_bytes=session.copied_bytes,
        clean_bytes=held * session.sizes.prompt(names),
        chunk_bytes=max((chunk.n_bytes for chunk in work), default=0),
        executor=executor,
        precision=precision,
        metric=metric,
        seconds=seconds,
    )


class _Work:
    """A chunk of rows of one chunk of prompts."""

    def __init__(self, session: DeltaSession, sets: Sequence[PatchSet], prompts: PromptChunk, chunk: Chunk) -> None:
        self.prompts, self.chunk = prompts, chunk
        start, n_sets, n_pos = chunk.start, len(chunk.sets), session.n_pos
        chosen = [sets[i] for i in chunk.sets]
        self.flops = _row_flops(session, chosen, len(prompts), start)
        self.n_rows = n_sets * len(prompts)
        self.n_tokens = self.n_rows * (n_pos - start.first)
        # Rows, the difference of source and clean that they share, and at least a layer of the clean run's forward.
        rows = self.n_tokens * session.sizes.row_token() + len(prompts) * session.sizes.at_hooks(
            session.masks(chosen, start)
        )
        self.n_bytes = max(rows, len(prompts) * session.sizes.clean_layer())

    def seconds(self, speed: Speed) -> float:
        blocks = sum(speed.block.seconds(layer.all) for layer in self.flops.values())
        return blocks + speed.entry.seconds(self.n_tokens)


def _row_flops(session: DeltaSession, patch_sets: Sequence[PatchSet], n_prompts: int, start: Start) -> dict[int, Flops]:
    """FLOPs by layer of rows that start together."""
    config, backend, n_pos, first = session.model.config, session.backend, session.n_pos, start.first
    end = last_changed(patch_sets, start, config.n_layers, n_pos) + 1
    masks, size = session.masks(patch_sets, start), (len(patch_sets), n_prompts)
    if end == n_pos:
        return chunk_flops(config, backend, masks, *size, n_pos, start.layer, first)
    short = chunk_flops(config, backend, session.masks(patch_sets, start, end), *size, end, start.layer, first)
    above = chunk_flops(
        config, backend, masks, *size, n_pos, start.layer + 1, first, entering=True, n_moved=end - first
    )
    return {start.layer: short[start.layer]} | above


def _clean_flops(config: ModelConfig, session: DeltaSession, names: dict[Any, list[str]]) -> int:
    """Of a clean forward pass of every prompt, with what the metric reads of it, and one up to the last patched layer
    for corrupted values and means."""

    def up_to() -> Iterator[int]:
        yield config.n_layers
        for source in ("corrupted", "mean"):
            layers = [int(name.split(".")[1]) for name in names.get(source, [])]
            yield max(layers, default=-1) + 1

    passes = sum((clean_flops(config, session.n_pos, n_layers) for n_layers in up_to()), Flops())
    # The log-probabilities, and the mean unembedding under them.
    return session.n_prompts * (passes.all + 2 * readout_flops(config, session.metric))
