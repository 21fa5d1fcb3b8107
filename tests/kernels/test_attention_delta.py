"""attention_delta against its definition: softmax attention of q + δq, k + δk, v + δv, minus that of q, k, v."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from subcircuit.kernels import attention_delta_triton
from subcircuit.kernels.attention_delta import attention_delta
from subcircuit.kernels.backend import triton_runs_on

SEED = random.randrange(10**6)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not triton_runs_on(DEVICE), reason="Triton is not installed, or has neither a GPU nor its interpreter"
)
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
"""Largest ‖error‖ relative to ‖δz‖: the rounding to the output's dtype. Triton's interpreter truncates to bfloat16."""
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
    """Inputs of one case in float64. q, k and v are column slices of one product, as they are in the executor."""

    shape: Shape
    clean_qkv: Tensor
    delta_qkv: Tensor
    rotation: tuple[Tensor, Tensor] | None
    patch: tuple[Tensor, Tensor] | None
    first: Tensor | None

    def clean(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return columns(self.clean_qkv.to(DEVICE, dtype), self.shape)

    def delta(self, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        shape, deltas = self.shape, []
        n_last = (shape.n_q, shape.n_new, shape.n_new)
        for name, n, x in zip("qkv", n_last, columns(self.delta_qkv.to(DEVICE, dtype), shape), strict=True):
            x = x[: 1 if name in shape.shared else None, :, shape.n_k - n :]
            deltas.append(None if name in shape.without else x)
        return deltas


def columns(product: Tensor, shape: Shape) -> list[Tensor]:
    """q, k and v, `[..., pos, head, d_head]`, out of one product; none of them copied."""
    heads = [shape.n_kv * shape.group, shape.n_kv, shape.n_kv]
    parts = product.split([n * shape.d_head for n in heads], dim=-1)
    return [part.unflatten(-1, (n, shape.d_head)) for n, part in zip(heads, parts, strict=True)]


def draw_case(shape: Shape, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    n_heads = shape.n_kv * shape.group
    width = (n_heads + 2 * shape.n_kv) * shape.d_head
    angles, patch = draw(shape.n_k, 1, shape.d_head // 2).to(DEVICE), None
    if shape.patch is not None:
        n_sets, n_prompts = (1, 1) if shape.patch == "all" else (shape.n_sets, shape.n_prompts)
        mask = draw(n_sets, shape.n_q if shape.patch == "positions" else 1, n_heads) > 0
        patch = mask.to(DEVICE), draw(n_prompts, shape.n_q, n_heads, shape.d_head).to(DEVICE)
    return Case(
        shape,
        draw(shape.n_prompts, shape.n_k, width),
        draw(shape.n_sets, shape.n_prompts, shape.n_k, width),
        (angles.cos(), angles.sin()) if shape.rotation else None,
        patch,
        None if shape.first is None else torch.tensor(shape.first, device=DEVICE),
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention at all positions; each KV head repeated for its group of queries."""
    group, n_pos, d_head = q.shape[-2] // k.shape[-2], q.shape[-3], q.shape[-1]
    k, v = (x.repeat_interleave(group, dim=-2) for x in (k, v))
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) / d_head**0.5
    scores = scores.masked_fill(torch.ones(n_pos, n_pos, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x[i], x[i + d_head/2]) as a complex number, times that of its angle."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag), -1)


def expected_delta_z(case: Case) -> Tensor:
    """δz by the definition: every row's q, k and v at all positions, no sharing and no shortcut."""
    shape, moved = case.shape, []
    for name, clean, delta in zip("qkv", case.clean(), case.delta(), strict=True):
        whole = clean.new_zeros(shape.n_sets, *clean.shape)
        if delta is not None:
            whole[:, :, -delta.shape[2] :] = delta
        for prompt, first in enumerate(shape.first or ()):
            whole[:, prompt, : shape.n_k - shape.n_new + first] = 0
        if case.rotation is not None and name in "qk":
            whole = turn(whole, *case.rotation)
        moved.append(clean + whole)
    out = (attend(*moved) - attend(*case.clean()))[:, :, -shape.n_q :]
    for prompt, first in enumerate(shape.first or ()):
        out[:, prompt, : max(0, first - (shape.n_new - shape.n_q))] = 0
    if case.patch is not None:
        mask, source = case.patch
        mask = mask[:, None, :, :, None].expand(out.shape)
        out[mask] = source.expand(out.shape)[mask]
    return out


def run(case: Case, dtype: torch.dtype, backend: str, clean_dtype: torch.dtype | None = None) -> Tensor:
    clean_dtype = clean_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    q, k, v = case.clean(clean_dtype)
    z = attend(*case.clean()).to(clean_dtype)
    last = slice(case.shape.n_k - case.shape.n_q, None)
    return attention_delta(
        *(q[:, last], k, v, z[:, last]),
        *case.delta(dtype),
        dtype,
        rotation=None if case.rotation is None else tuple(table.to(clean_dtype) for table in case.rotation),
        patch=None if case.patch is None else (case.patch[0], case.patch[1].to(clean_dtype)),
        first=case.first,
        backend=backend,
    )


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    """That δz is right, given δ as the dtype holds it: what is left to measure is the computation's own error."""
    case = replace(case, delta_qkv=case.delta_qkv.to(dtype).double())
    expected, out = expected_delta_z(case), run(case, dtype, backend)
    assert out.dtype == dtype
    assert out.shape[1:] == expected.shape[1:]
    assert out.shape[0] in (1, expected.shape[0])
    clean_z = attend(*case.clean())[:, -case.shape.n_q :].expand(expected.shape)
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
def test_torch_equals_the_definition_on_random_shapes(seed, dtype):
    check(draw_case(draw_shape(seed), seed), dtype, "torch")


@needs_triton
@pytest.mark.parametrize("seed", range(SEED, SEED + 30))
def test_triton_equals_the_definition_on_random_shapes(seed):
    shape = draw_shape(seed)
    small = {name: min(2, getattr(shape, name)) for name in ("n_sets", "n_prompts", "n_kv")}
    shape = replace(shape, **small, first=shape.first and shape.first[:2])
    check(draw_case(shape, seed), random.Random(seed).choice(list(ROUNDING)), "triton")


@needs_triton
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 1, group=2, d_head=16, n_k=300, n_new=170, n_q=100, rotation=True, first=(41,), patch="positions"),
        Shape(1, 1, 1, group=1, d_head=32, n_k=200, n_new=200, n_q=200),
        Shape(2, 1, 1, group=2, d_head=256, n_k=35, n_new=20, n_q=9, rotation=True, first=(3,)),
        Shape(2, 1, 1, group=1, d_head=150, n_k=40, n_new=33, n_q=3, rotation=True, patch="heads"),
        Shape(1, 1, 1, group=3, d_head=131, n_k=20, n_new=17, n_q=7),
    ],
    ids=["long", "long, no prefix", "256 wide", "150 wide", "131 wide"],
)
def test_triton_equals_the_definition_over_many_blocks_and_columns(shape):
    check(draw_case(shape, SEED), torch.float32, "triton")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_head", [32, 48, 96, 128, 160, 192, 256])
def test_heads_of_every_width_in_every_precision(d_head, dtype):
    shape = Shape(1, 1, 1, group=2, d_head=d_head, n_k=19, n_new=9, n_q=5, rotation=True, first=(2,), patch="positions")
    check(draw_case(shape, SEED), dtype, "triton")


@BACKENDS
def test_four_thousand_positions_are_streamed(backend):
    """Against float64 at the last position only: the definition over all of them takes half a minute."""
    q, k, v = (torch.randn(4096, 32, generator=torch.Generator().manual_seed(SEED + i)).double() for i in range(3))
    delta_k, delta_v = torch.randn(2, 1, 1, 3000, 1, 32, generator=torch.Generator().manual_seed(SEED + 3))

    def last_z(k: Tensor, v: Tensor) -> Tensor:
        return (q[-1] @ k.T / 32**0.5).softmax(-1) @ v

    clean = [x.float().to(DEVICE)[None, :, None] for x in (q[-1:], k, v, last_z(k, v)[None])]
    out = attention_delta(*clean, None, delta_k.to(DEVICE), delta_v.to(DEVICE), torch.float32, backend=backend)
    k_row, v_row = k.clone(), v.clone()
    k_row[-3000:] += delta_k[0, 0, :, 0]
    v_row[-3000:] += delta_v[0, 0, :, 0]
    expected = last_z(k_row, v_row) - last_z(k, v)
    torch.testing.assert_close(out.cpu().flatten().double(), expected, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("d_head", [1, 32, 64, 80, 128, 256, 512])
@pytest.mark.parametrize("n_rows", [1, 4096])
@pytest.mark.parametrize("recent", [True, False])
def test_every_shape_has_a_configuration(d_head, n_rows, recent):
    half = attention_delta_triton.block_half(d_head)
    rows = attention_delta_triton.block_rows(n_rows, half)
    assert any(attention_delta_triton.fits(c, rows, half, recent) for c in attention_delta_triton.CONFIGS)


@BACKENDS
def test_differences_before_the_first_position_are_never_read(backend):
    case = draw_case(Shape(2, first=(2, 5), rotation=True), SEED)
    whole = run(case, torch.float32, backend)
    case.delta_qkv[:, 0, :2] = case.delta_qkv[:, 1, :5] = float("nan")
    assert torch.equal(run(case, torch.float32, backend), whole)
    assert not whole[:, 0, :2].any()
    assert not whole[:, 1, :5].any()
    assert whole[:, 0, 2:].all()
    assert whole[:, 1, 5:].all()


@BACKENDS
def test_a_patch_holds_where_no_position_can_differ(backend):
    case = draw_case(Shape(2, first=(7, 7), patch="positions"), SEED)
    out = run(case, torch.float32, backend)
    mask = case.patch[0][:, None, :, :, None].expand(out.shape)
    assert torch.equal(out[mask], case.patch[1].float().expand(out.shape)[mask])
    assert not out[~mask].any()


@BACKENDS
def test_patched_sets_share_a_difference_that_is_the_same_for_all(backend):
    check(draw_case(Shape(shared="qkv", patch="heads"), SEED), torch.float32, backend)


@BACKENDS
def test_columns_need_not_stand_side_by_side(backend):
    shape = Shape(n_sets=1, n_prompts=1, n_kv=1)
    case = draw_case(shape, SEED)
    turned = replace(case, delta_qkv=case.delta_qkv.mT.contiguous().mT, clean_qkv=case.clean_qkv.mT.contiguous().mT)
    assert turned.clean()[0].stride(-1) != 1
    check(turned, torch.float32, backend)


@BACKENDS
@pytest.mark.parametrize("clean_dtype", [torch.bfloat16, torch.float16])
def test_a_clean_side_in_half_precision_is_summed_in_float32(clean_dtype, backend):
    case = draw_case(Shape(2, n_k=9, n_new=6, n_q=4), SEED)
    case = replace(
        case,
        clean_qkv=case.clean_qkv.to(clean_dtype).double(),
        delta_qkv=case.delta_qkv.float().double(),
    )
    z = attend(*case.clean())[:, -4:]
    rounding_of_z = z.to(clean_dtype).double() - z
    out = run(case, torch.float32, backend, clean_dtype).double()
    expected = expected_delta_z(case) - rounding_of_z
    assert (out - expected).norm() <= ROUNDING[torch.float32] * expected.norm() + SUMMING[torch.float32] * z.norm()
