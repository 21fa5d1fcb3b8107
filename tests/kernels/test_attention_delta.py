"""attention_delta against its definition: softmax attention of q + δq, k + δk, v + δv, minus that of q, k, v."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from subcircuit.kernels.attention_delta import attention_delta

SEED = random.randrange(10**6)
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Largest ‖error‖ relative to ‖δz‖: the rounding to the output's dtype."""
SUMMING = {torch.float64: 1e-13, torch.float32: 4e-7, torch.bfloat16: 4e-7, torch.float16: 4e-7}
"""Largest further ‖error‖ relative to ‖z‖ + ‖δz‖: δz is the difference of two float32 sums of that size."""


@dataclass(frozen=True)
class Shape:
    """What one case looks like; δk and δv cover the last n_new positions, δq the last n_q."""

    n_sets: int = 3
    n_prompts: int = 2
    n_kv: int = 2
    group: int = 2
    d_head: int = 8
    n_k: int = 7
    n_new: int = 7
    n_q: int = 7
    without: str = ""
    """Which of q, k, v have no δ."""
    shared: str = ""
    """Which of q, k, v have one δ for all sets."""
    rotation: bool = False
    first: tuple[int, ...] | None = None
    patch: str | None = None
    """"heads": the same at all positions, "positions": each its own, "all": one prompt's δ for all of them."""


@dataclass(frozen=True)
class Case:
    """Inputs of one case in float64, `heads` after `pos` as the kernel takes them."""

    shape: Shape
    clean: dict[str, Tensor]
    delta: dict[str, Tensor | None]
    rotation: tuple[Tensor, Tensor] | None
    patch: tuple[Tensor, Tensor] | None
    first: Tensor | None


def draw_case(shape: Shape, seed: int, delta_size: float = 1.0) -> Case:
    """Normal inputs; the values of q, k, v's δ are column slices of one product, as they are in the executor."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    n_heads, n_prompts, d_head = shape.n_kv * shape.group, shape.n_prompts, shape.d_head
    heads = {"q": n_heads, "k": shape.n_kv, "v": shape.n_kv}
    n_last = {"q": shape.n_q, "k": shape.n_new, "v": shape.n_new}
    fused = delta_size * draw(shape.n_sets, n_prompts, shape.n_k, sum(heads.values()) * d_head)
    columns = fused.split([n * d_head for n in heads.values()], dim=-1)
    delta: dict[str, Tensor | None] = {}
    for name, part in zip("qkv", columns, strict=True):
        part = part[: 1 if name in shape.shared else None, :, shape.n_k - n_last[name] :]
        delta[name] = None if name in shape.without else part.unflatten(-1, (heads[name], d_head))
    angles = draw(shape.n_k, 1, d_head // 2)
    patch = None
    if shape.patch is not None:
        size = {"heads": (shape.n_sets, 1, n_heads), "all": (1, 1, n_heads)}.get(
            shape.patch, (shape.n_sets, shape.n_q, n_heads)
        )
        patched_prompts = 1 if shape.patch == "all" else n_prompts
        patch = draw(*size) > 0, draw(patched_prompts, shape.n_q, n_heads, d_head)
    return Case(
        shape,
        {name: draw(n_prompts, shape.n_k, heads[name], d_head) for name in "qkv"},
        delta,
        (angles.cos(), angles.sin()) if shape.rotation else None,
        patch,
        None if shape.first is None else torch.tensor(shape.first),
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention at all positions; each KV head repeated for its group of queries."""
    group, n_pos, d_head = q.shape[-2] // k.shape[-2], q.shape[-3], q.shape[-1]
    k, v = (x.repeat_interleave(group, dim=-2) for x in (k, v))
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) / d_head**0.5
    scores = scores.masked_fill(torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x[i], x[i + d_head/2]) as a complex number, times that of its angle."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag), -1)


def expected_delta_z(case: Case) -> Tensor:
    """δz by the definition, row by row position by position: no sharing, no shortcut."""
    shape, moved = case.shape, {}
    for name, clean in case.clean.items():
        whole = torch.zeros(shape.n_sets, *clean.shape, dtype=torch.float64)
        delta = case.delta[name]
        if delta is not None:
            whole[:, :, -delta.shape[2] :] = delta
        if case.first is not None:
            for prompt, first in enumerate(case.first.tolist()):
                whole[:, prompt, : shape.n_k - shape.n_new + first] = 0
        if case.rotation is not None and name in "qk":
            whole = turn(whole, *case.rotation)
        moved[name] = clean + whole
    out = (attend(**moved) - attend(**case.clean))[:, :, -shape.n_q :]
    if case.first is not None:
        for prompt, first in enumerate(case.first.tolist()):
            out[:, prompt, : max(0, first - (shape.n_new - shape.n_q))] = 0
    if case.patch is not None:
        mask, source = case.patch
        mask = mask[:, None, :, :, None].expand(out.shape)
        out[mask] = source.expand(out.shape)[mask]
    return out


def run(case: Case, dtype: torch.dtype, clean_dtype: torch.dtype | None = None) -> Tensor:
    clean_dtype = clean_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    clean_z = attend(**case.clean)
    clean = [x.to(clean_dtype) for x in (*case.clean.values(), clean_z)]
    clean = [x[:, -case.shape.n_q :] if i in (0, 3) else x for i, x in enumerate(clean)]
    return attention_delta(
        *clean,
        *(None if x is None else x.to(dtype) for x in case.delta.values()),
        dtype,
        rotation=None if case.rotation is None else tuple(table.to(clean_dtype) for table in case.rotation),
        patch=None if case.patch is None else (case.patch[0], case.patch[1].to(clean_dtype)),
        first=case.first,
    )


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The case with δ as the dtype holds it, so that only the computation's own error is left to measure."""
    delta = {name: None if x is None else x.to(dtype).double() for name, x in case.delta.items()}
    return replace(case, delta=delta)


def check(case: Case, dtype: torch.dtype) -> None:
    case = rounded(case, dtype)
    expected, out = expected_delta_z(case), run(case, dtype)
    assert out.dtype == dtype
    assert out.shape[1:] == expected.shape[1:]
    assert out.shape[0] in (1, expected.shape[0])
    clean_z = attend(**case.clean)[:, -case.shape.n_q :].expand(expected.shape)
    error = (out.double() - expected).norm()
    bound = ROUNDING[dtype] * expected.norm() + SUMMING[dtype] * (clean_z.norm() + expected.norm())
    assert error <= bound, f"{error / bound:.1f} times the bound for {case.shape}"


def draw_shape(seed: int) -> Shape:
    """A random shape with every keyword in it now and then."""
    pick = random.Random(seed)
    n_k = pick.choice([1, 2, 5, 16, 17, 33, 50])
    n_new = pick.randint(1, n_k)
    n_prompts = pick.randint(1, 3)
    rotation = pick.random() < 0.4
    without = pick.choice(["", "", "", "q", "k", "v", "qk", "kv", "qv"])
    n_q = n_new if "k" in without and "v" in without else pick.choice([1, n_new, pick.randint(1, n_new)])
    return Shape(
        n_sets=pick.randint(1, 4),
        n_prompts=n_prompts,
        n_kv=pick.randint(1, 3),
        group=pick.choice([1, 1, 2, 3, 4, 8]),
        d_head=2 * pick.choice([4, 5, 8, 16, 32, 64]) if rotation else pick.choice([1, 7, 8, 16, 33, 64, 80, 128]),
        n_k=n_k,
        n_new=n_new,
        n_q=n_q,
        without=without,
        shared="".join(name for name in "qkv" if pick.random() < 0.2),
        rotation=rotation,
        first=tuple(pick.randint(0, n_new) for _ in range(n_prompts)) if pick.random() < 0.5 else None,
        patch=pick.choice([None, None, "heads", "positions", "all"]),
    )


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("seed", range(SEED, SEED + 25))
def test_random_shapes_equal_the_definition(seed, dtype):
    check(draw_case(draw_shape(seed), seed), dtype)


def test_differences_before_the_first_position_are_never_read():
    case = draw_case(Shape(first=(2, 5), rotation=True), SEED)
    whole = run(case, torch.float32)
    for x in case.delta.values():
        x[:, 0, :2], x[:, 1, :5] = float("nan"), float("nan")
    assert torch.equal(run(case, torch.float32), whole)
    assert not whole[:, 0, :2].any()
    assert not whole[:, 1, :5].any()
    assert whole[:, 0, 2:].all()
    assert whole[:, 1, 5:].all()


def test_a_patch_holds_where_no_position_can_differ():
    case = draw_case(Shape(first=(7, 7), patch="positions"), SEED)
    out = run(case, torch.float32)
    mask = case.patch[0][:, None, :, :, None].expand(out.shape)
    assert torch.equal(out[mask], case.patch[1].float().expand(out.shape)[mask])
    assert not out[~mask].any()


def test_patched_sets_share_a_difference_that_is_the_same_for_all():
    check(draw_case(Shape(shared="qkv", patch="heads"), SEED), torch.float32)


@pytest.mark.parametrize("clean_dtype", [torch.bfloat16, torch.float16])
def test_a_clean_side_in_half_precision_is_summed_in_float32(clean_dtype):
    case = draw_case(Shape(n_k=9, n_new=6, n_q=4), SEED)
    case = replace(case, clean={name: x.to(clean_dtype).double() for name, x in case.clean.items()})
    z = attend(**case.clean)[:, -4:]
    rounding_of_z = z.to(clean_dtype).double() - z
    out = run(rounded(case, torch.bfloat16), torch.bfloat16, clean_dtype).double()
    expected = expected_delta_z(rounded(case, torch.bfloat16)) - rounding_of_z
    assert (out - expected).norm() <= ROUNDING[torch.bfloat16] * expected.norm()
