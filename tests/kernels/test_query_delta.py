"""query_delta against attention_delta with every key and value projected."""

from __future__ import annotations

import random

import pytest
import torch

from patching_cases import relative_error
from subcircuit.kernels.attention_delta import attention_delta
from subcircuit.kernels.query_delta import is_query_delta_cheaper, query_delta

SEED = random.randrange(10**6)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("n_new", "n_query_sets", "n_sets"), [(7, 4, 4), (3, 4, 1), (1, 4, 4), (5, 1, 1)])
def test_one_query_equals_attention_over_projected_keys(dtype, rotary, group, n_new, n_query_sets, n_sets):
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    n_prompts, n_pos, n_kv, d_head, d_model = 2, 7, 2, 8, 24
    n_heads = n_kv * group

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    angles = draw(n_pos, 1, d_head // 2)
    rotation = (angles.cos(), angles.sin()) if rotary else None
    w_k, w_v = draw(n_kv * d_head, d_model), draw(n_kv * d_head, d_model)
    q, k, v = draw(n_prompts, 1, n_heads, d_head), *draw(2, n_prompts, n_pos, n_kv, d_head)
    delta_q, normed = draw(n_query_sets, n_prompts, 1, n_heads, d_head), draw(n_sets, n_prompts, n_new, d_model)
    delta_q, normed = delta_q.to(dtype), normed.to(dtype)
    delta_k, delta_v = ((normed.double() @ w.T).unflatten(-1, (n_kv, d_head)) for w in (w_k, w_v))
    none = torch.zeros_like(q), q.new_zeros(1, n_prompts, 1, n_heads, d_head)
    z = attention_delta(q, k, v, none[0], none[1], None, None, torch.float64)[0]
    expected = attention_delta(q, k, v, z, delta_q.double(), delta_k, delta_v, torch.float64, rotation=rotation)

    clean_dtype = torch.promote_types(dtype, torch.float32)
    clean = (x.to(clean_dtype) for x in (q, k, v, z))
    own_k = delta_k.to(dtype) if rotary else None
    tables = None if rotation is None else tuple(table.to(clean_dtype) for table in rotation)
    weights = w_k.to(clean_dtype), w_v.to(clean_dtype)
    out = query_delta(*clean, delta_q, own_k, normed, *weights, dtype, rotation=tables)
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    assert relative_error(out, expected) < TOLERANCE[dtype]


def test_it_is_cheaper_from_some_positions_on():
    gpt2, smollm2 = (12, 12, 64, 768), (9, 3, 64, 576)
    assert next(n for n in range(1, 30) if is_query_delta_cheaper(n, *gpt2)) == 6
    assert next(n for n in range(1, 30) if is_query_delta_cheaper(n, *smollm2)) == 14
    assert not any(is_query_delta_cheaper(n, 32, 1, 64, 2048) for n in range(1, 60))  # no gain with one key for all
