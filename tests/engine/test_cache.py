"""What run_with_cache keeps, and that the decompositions of the residual stream add up."""

from __future__ import annotations

import pytest
import torch

from engine_models import CONFIGS, GPT2, LLAMA, random_model, random_tokens
from subcircuit.engine.errors import HookError, SubcircuitError

EXACT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param], seed=21)


@pytest.fixture
def tokens(model):
    return random_tokens(model.config)


class TestNames:
    def test_names_are_kept_in_forward_order(self, model, tokens):
        _, cache = model.run_with_cache(tokens, ["blocks.1.hook_mlp_out", "blocks.*.attn.hook_z"])
        assert list(cache) == [
            "blocks.0.attn.hook_z",
            "blocks.1.attn.hook_z",
            "blocks.1.hook_mlp_out",
            "blocks.2.attn.hook_z",
        ]
        assert len(cache) == 4
        assert repr(cache) == "ActivationCache(4 activations of a model)"

    def test_one_name_or_a_predicate_will_do(self, model, tokens):
        assert list(model.run_with_cache(tokens, "hook_embed")[1]) == ["hook_embed"]
        _, cache = model.run_with_cache(tokens, lambda name: name.endswith("hook_resid_mid"))
        assert list(cache) == [f"blocks.{layer}.hook_resid_mid" for layer in range(3)]

    def test_a_predicate_that_accepts_nothing_is_an_error(self, model, tokens):
        with pytest.raises(HookError, match="accepts none"):
            model.run_with_cache(tokens, lambda name: False)

    def test_an_unknown_name_is_an_error(self, model, tokens):
        with pytest.raises(HookError, match=r"no hook point 'blocks\.0\.hook_z' .*did you mean"):
            model.run_with_cache(tokens, "blocks.0.hook_z")

    def test_logits_are_those_of_a_plain_run(self, model, tokens):
        torch.testing.assert_close(model.run_with_cache(tokens)[0], model(tokens), **EXACT)

    def test_values_are_what_hooks_put_there(self, model, tokens):
        with model.hooks([("blocks.1.hook_mlp_out", lambda value, name: value * 0)]):
            _, cache = model.run_with_cache(tokens)
        assert cache["mlp_out", 1].abs().max() == 0
        torch.testing.assert_close(cache["resid_post", 1], cache["resid_mid", 1])


class TestStopAtLayer:
    def test_the_output_is_the_residual_stream_that_enters_the_layer(self, model, tokens):
        _, full = model.run_with_cache(tokens)
        for layer in range(3):
            resid, cache = model.run_with_cache(tokens, stop_at_layer=layer)
            torch.testing.assert_close(resid, full["resid_pre", layer], **EXACT)
            reached = [name for name in full if name < f"blocks.{layer}" or name.startswith("hook_")]
            assert list(cache) == reached
            torch.testing.assert_close(model(tokens, stop_at_layer=layer - 3), resid, **EXACT)
        torch.testing.assert_close(model(tokens, stop_at_layer=3), full["resid_post", 2], **EXACT)

    def test_patterns_mean_only_the_layers_that_run(self, model, tokens):
        _, cache = model.run_with_cache(tokens, "*.hook_mlp_out", stop_at_layer=2)
        assert list(cache) == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]

    @pytest.mark.parametrize("name", ["blocks.2.hook_mlp_out", "ln_final.hook_scale"])
    def test_a_name_above_the_layer_is_an_error_that_says_so(self, model, tokens, name):
        with pytest.raises(HookError, match=rf"no hook point '{name}' below layer 2"):
            model.run_with_cache(tokens, name, stop_at_layer=2)


class TestKeys:
    @pytest.mark.parametrize(
        ("key", "name"),
        [
            (("z", 1), "blocks.1.attn.hook_z"),
            (("pattern", 0), "blocks.0.attn.hook_pattern"),
            (("post", 2), "blocks.2.mlp.hook_post"),
            (("resid_pre", 0), "blocks.0.hook_resid_pre"),
            (("mlp_out", -1), "blocks.2.hook_mlp_out"),
            (("scale", 1, "ln2"), "blocks.1.ln2.hook_scale"),
            (("normalized", -3, "ln1"), "blocks.0.ln1.hook_normalized"),
            ("embed", "hook_embed"),
            ("ln_final.hook_scale", "ln_final.hook_scale"),
        ],
    )
    def test_a_short_key_means_its_hook_point(self, model, tokens, key, name):
        _, cache = model.run_with_cache(tokens)
        assert cache[key] is cache[name]
        assert key in cache

    def test_a_name_that_was_not_kept_is_an_error(self, model, tokens):
        _, cache = model.run_with_cache(tokens, "hook_embed")
        with pytest.raises(HookError, match=r"^'blocks\.1\.attn\.hook_z' is not among the 1 activations kept"):
            cache["z", 1]

    def test_it_is_a_mapping(self, model, tokens):
        _, cache = model.run_with_cache(tokens, "hook_embed")
        assert "blocks.0.hook_mlp_out" not in cache
        assert ("z", 0) not in cache
        assert cache.get("blocks.0.hook_mlp_out") is None
        assert cache.get("hook_embed") is cache["hook_embed"]

    def test_it_moves_to_a_device_as_a_whole(self, model, tokens):
        _, cache = model.run_with_cache(tokens)
        assert {value.device.type for value in cache.to("meta").values()} == {"meta"}


class TestDecompositions:
    @pytest.mark.parametrize("by_head", [False, True])
    def test_the_parts_add_up_to_the_final_residual_stream(self, model, tokens, by_head):
        _, cache = model.run_with_cache(tokens)
        parts, labels = cache.decompose_residual(by_head)
        torch.testing.assert_close(parts.sum(0), cache["resid_post", 2], **EXACT)
        n_heads, learned = model.config.n_heads, model.config.positions == "learned"
        per_layer = (n_heads + learned if by_head else 1) + 1
        assert len(parts) == len(labels) == len(set(labels)) == 1 + learned + 3 * per_layer

    def test_each_part_is_what_its_label_says(self, model, tokens):
        _, cache = model.run_with_cache(tokens, ["*", "*.hook_result"])
        parts = dict(zip(*reversed(cache.decompose_residual(by_head=True)), strict=True))
        torch.testing.assert_close(parts["a1.h2"], cache["result", 1][:, :, 2], **EXACT)
        torch.testing.assert_close(parts["m2"], cache["mlp_out", 2], **EXACT)
        torch.testing.assert_close(parts["embed"], cache["embed"], **EXACT)
        assert ("a0.bias" in parts) == model.config.attn_out_bias

    def test_head_results_and_bias_add_up_to_the_attention_output(self, model, tokens):
        _, cache = model.run_with_cache(tokens)
        bias = model.blocks[1].attn.w_o.bias
        total = cache.head_results(1).sum(2) + (0 if bias is None else bias)
        torch.testing.assert_close(total, cache["attn_out", 1], **EXACT)

    def test_the_residual_stack_starts_at_the_embeddings_and_ends_at_the_output(self, model, tokens):
        _, cache = model.run_with_cache(tokens)
        stack, labels = cache.residual_stack()
        assert labels == ["0_pre", "1_pre", "2_pre", "final"]
        torch.testing.assert_close(stack[0], cache["resid_pre", 0], **EXACT)
        torch.testing.assert_close(stack[2] - stack[1], cache["attn_out", 1] + cache["mlp_out", 1], **EXACT)
        torch.testing.assert_close(stack[-1], cache["resid_post", 2], **EXACT)

    @pytest.mark.parametrize("position", [-1, 3])
    def test_the_logit_lens_ends_in_the_logits(self, model, tokens, position):
        logits, cache = model.run_with_cache(tokens)
        lens = cache.logit_lens(position)
        assert lens.shape == (4, 2, 40)
        torch.testing.assert_close(lens[-1], logits[:, position], **EXACT)

    @pytest.mark.parametrize("by_head", [False, True])
    @pytest.mark.parametrize("position", [-1, 2])
    def test_logit_attribution_adds_up_to_the_logit_and_to_its_lead(self, model, tokens, by_head, position):
        logits, cache = model.run_with_cache(tokens)
        answer, wrong, rows = torch.tensor([3, 17]), torch.tensor([4, 39]), torch.arange(2)
        shares, labels = cache.logit_attribution(answer, by_head=by_head, position=position)
        assert len(shares) == len(labels)
        torch.testing.assert_close(shares.sum(0), logits[rows, position, answer], **EXACT)
        shares, _ = cache.logit_attribution(answer, wrong, by_head=by_head, position=position)
        lead = logits[rows, position, answer] - logits[rows, position, wrong]
        torch.testing.assert_close(shares.sum(0), lead, **EXACT)

    def test_the_share_of_a_head_is_what_the_logits_lose_without_it_at_a_fixed_norm(self, model, tokens):
        """The last layer's MLP would answer to the change, so it is held; the norm's scale is held too."""
        logits, cache = model.run_with_cache(tokens)
        answer, layer, head = torch.tensor([3, 17]), 2, 1

        def without_head(value, name):
            value = value.clone()
            value[:, :, head] = 0
            return value

        def held(value, name):
            return cache[name]

        names = [f"blocks.{layer}.hook_mlp_out", "ln_final.hook_scale"]
        hooks = [(f"blocks.{layer}.attn.hook_z", without_head), *((name, held) for name in names)]
        change = (logits - model.run_with_hooks(tokens, hooks))[torch.arange(2), -1, answer]
        shares, labels = cache.logit_attribution(answer, by_head=True)
        torch.testing.assert_close(shares[labels.index(f"a{layer}.h{head}")], change, **EXACT)

    def test_a_decomposition_that_lacks_a_value_says_which(self, model, tokens):
        _, cache = model.run_with_cache(tokens, "*.hook_z")
        with pytest.raises(SubcircuitError, match="'hook_embed' is not among the 3 activations kept"):
            cache.decompose_residual()


def test_caches_of_both_families_have_the_names_of_their_variant():
    names = set(random_model(GPT2).hook_names()) ^ set(random_model(LLAMA).hook_names())
    per_layer = {"attn.hook_rot_q", "attn.hook_rot_k", "mlp.hook_pre_linear"}
    assert names == {"hook_pos_embed"} | {f"blocks.{layer}.{name}" for layer in range(3) for name in per_layer}
