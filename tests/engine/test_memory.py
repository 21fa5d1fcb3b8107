"""What a session holds, measured by the allocator, and what it does when memory runs out."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from patching_cases import CONFIGS, random_model, random_prompts, relative_error
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import DeltaSession, patch_effects
from subcircuit.engine.patching.delta import DeltaRun
from subcircuit.engine.patching.edge_delta import EdgeRun
from subcircuit.engine.patching.edge_session import EdgeSession
from subcircuit.engine.patching.graph import edges
from subcircuit.engine.patching.memory import is_out_of_memory
from subcircuit.engine.patching.sites import as_patch_set

SEED = random.randrange(10**6)
ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: …"),
    "host": MemoryError(),
}


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    return random_model(CONFIGS[request.param], SEED), random_prompts(SEED + 1, n_prompts=8)


def sites_of(model):
    return [f"a{layer}.h{head}" for layer in range(3) for head in range(4)] + ["m0", "m1", "m2"]


def run_out(monkeypatch, name, too_much, error, run_class=DeltaRun):
    """Let a method of DeltaRun fail wherever `too_much` says so of its arguments; the sizes at which it did."""
    failed, original = [], getattr(run_class, name)

    def method(self, *args):
        n = too_much(self, *args)
        if n:
            failed.append(n)
            raise error
        return original(self, *args)

    monkeypatch.setattr(run_class, name, method)
    return failed


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_rows_that_do_not_fit_are_halved(case, monkeypatch, error):
    model, prompts = case
    expected = patch_effects(model, prompts, sites_of(model), precision="fp64")
    assert expected.n_halvings == 0
    failed = run_out(monkeypatch, "enter", lambda run, sets, *_: len(sets) if len(sets) > 1 else 0, error)
    session = DeltaSession(model, prompts, precision="fp64")
    result = session.effects(sites_of(model))
    assert result.n_halvings == len(failed) > 0
    assert relative_error(result.effects, expected.effects) < 1e-12
    assert session.effects(sites_of(model)).n_halvings < result.n_halvings  # later calls begin with smaller chunks


def test_prompts_that_do_not_fit_are_halved_for_later_calls_too(case, monkeypatch):
    model, prompts = case
    expected = patch_effects(model, prompts, sites_of(model), precision="fp64")
    calls = []
    for name in ("_run_clean", "enter"):
        with monkeypatch.context() as patched:
            n_prompts = lambda run, *_: len(run.chunk) if len(run.chunk) > 2 else 0  # noqa: E731
            failed = run_out(patched, name, n_prompts, ERRORS["cpu"])
            session = DeltaSession(model, prompts, precision="fp64")
            result = session.effects(sites_of(model), progress=lambda done, n: calls.append((done, n)))
            assert result.n_halvings == len(failed) > 0
            assert relative_error(result.effects, expected.effects) < 1e-12
            assert relative_error(result.clean_metric, expected.clean_metric) < 1e-12
            assert session.effects(sites_of(model)).n_halvings == 0
            assert calls[-1] == (15 * 8, 15 * 8)


@pytest.mark.parametrize("call", [EdgeSession.edge_effects, EdgeSession.path_effects])
def test_edges_and_paths_that_do_not_fit_are_halved(case, monkeypatch, call):
    model, prompts = case
    chosen = random.Random(SEED).sample(edges(model.config), 30)
    expected = call(EdgeSession(model, prompts, precision="fp64"), chosen)
    assert expected.n_halvings == 0
    rows = lambda run, changes, *_: changes.n_sets if changes.n_sets > 1 else 0  # noqa: E731
    of_prompts = lambda run, *_: len(run.chunk) if len(run.chunk) > 2 else 0  # noqa: E731
    for name, too_much in (("climb", rows), ("climb", of_prompts), ("_run_clean", of_prompts)):
        with monkeypatch.context() as patched:
            failed = run_out(patched, name, too_much, ERRORS["cpu"], EdgeRun)
            session, calls = EdgeSession(model, prompts, precision="fp64"), []
            result = call(session, chosen, progress=lambda *done, calls=calls: calls.append(done))
            assert result.n_halvings == len(failed) > 0
            assert relative_error(result.effects, expected.effects) < 1e-10
            assert relative_error(result.clean_metric, expected.clean_metric) < 1e-12
            assert calls[-1] == (30 * 8, 30 * 8)
            assert call(session, chosen).n_halvings == 0  # later calls begin with smaller chunks


@pytest.mark.parametrize("call", [EdgeSession.edge_effects, EdgeSession.path_effects])
def test_a_single_edge_that_does_not_fit_is_one_line(case, monkeypatch, call):
    model, prompts = case
    run_out(monkeypatch, "climb", lambda *_: 1, ERRORS["cpu"], EdgeRun)
    with pytest.raises(PatchError, match="no room for a single row of 9 tokens"):
        call(EdgeSession(model, prompts), [("a0.h0", "m1")])


def test_a_single_row_that_does_not_fit_is_one_line(case, monkeypatch):
    model, prompts = case
    run_out(monkeypatch, "enter", lambda *_: 1, ERRORS["cpu"])
    with pytest.raises(PatchError, match="no room for a single row of 9 tokens") as caught:
        patch_effects(model, prompts, sites_of(model))
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(case, monkeypatch):
    model, prompts = case
    run_out(monkeypatch, "enter", lambda *_: 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        patch_effects(model, prompts, sites_of(model))


def test_a_failed_allocation_is_known_by_what_torch_says():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def allocated_at_most(function) -> int:
    """The most bytes that torch had allocated on the CPU at any time, beside what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("source", ["corrupted", "mean"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torch_allocates_no_more_than_the_budget_and_a_fifth(source, precision):
    print(f"seed {SEED}")
    model = random_model(replace(CONFIGS["gpt2"], d_model=64, d_head=16, d_mlp=256, n_layers=6), SEED)
    prompts = random_prompts(SEED + 1, n_prompts=600)
    patch_sets = [as_patch_set(site) for site in [*sites_of(model)[:6], "m1", "m5"]]
    for budget in (8_000_000, 20_000_000):
        session = DeltaSession(model, prompts, source=source, precision=precision, budget_bytes=budget)
        assert len(session.layout(session._sources.wanted(patch_sets)).prompt_chunks) > 1
        used = 0
        for _ in range(5):  # torch's profiler now and then loses events of allocations
            used = max(used, allocated_at_most(lambda session=session: session.effects(patch_sets)))
            if used >= 0.4 * budget:
                break
        assert 0.4 * budget <= used <= 1.2 * budget
