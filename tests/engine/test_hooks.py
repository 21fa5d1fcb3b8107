"""Hooks read, replace and see gradients; a wrong one is an error; one that nobody set costs nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine_models import CONFIGS, GPT2, LLAMA, random_model, random_tokens, recording
from subcircuit.engine.errors import HookError
from subcircuit.engine.hooks import ON_REQUEST


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param], seed=11)


@pytest.fixture
def tokens(model):
    return random_tokens(model.config)


def run_and_keep(model, tokens, names):
    """Logits, and the value at every named hook point with its graph."""
    values = {}
    logits = model.run_with_hooks(tokens, [(name, lambda value, at: values.__setitem__(at, value)) for name in names])
    return logits, values


class TestReading:
    def test_reading_every_hook_point_leaves_the_logits_alone(self, model, tokens):
        logits, values = run_and_keep(model, tokens, model.hook_names())
        assert set(values) == set(model.hook_names())
        torch.testing.assert_close(logits, model(tokens), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("point", ["attn.hook_pattern", "attn.hook_result", "hook_q_input", "ln2.hook_scale"])
    def test_reading_one_hook_point_leaves_the_logits_alone(self, model, tokens, point):
        logits, _ = run_and_keep(model, tokens, [f"blocks.1.{point}"])
        torch.testing.assert_close(logits, model(tokens), rtol=1e-12, atol=1e-12)

    def test_a_norm_hook_leaves_bfloat16_logits_within_rounding(self, tokens, model):
        low = random_model(model.config, seed=11, dtype=torch.bfloat16)
        plain, exact = low(tokens).double(), model(tokens)
        logits, _ = run_and_keep(low, tokens, ["*.ln?.hook_*", "ln_final.hook_*"])
        assert (logits.double() - exact).norm() < 1.5 * (plain - exact).norm()

    def test_the_pattern_is_causal_and_its_rows_sum_to_one(self, model, tokens):
        _, values = run_and_keep(model, tokens, ["blocks.0.attn.hook_pattern"])
        pattern = values["blocks.0.attn.hook_pattern"]
        assert pattern.shape == (2, model.config.n_heads, 7, 7)
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
        assert torch.equal(pattern, pattern.tril())

    def test_a_pattern_of_shell_wildcards_means_every_match(self, model, tokens):
        _, values = run_and_keep(model, tokens, ["blocks.[02].attn.hook_?"])
        assert list(values) == [f"blocks.{layer}.attn.hook_{x}" for layer in (0, 2) for x in "qkvz"]

    def test_several_functions_on_one_hook_point_run_in_the_order_they_were_set(self, model, tokens):
        name, seen = "blocks.1.hook_mlp_out", []
        double = (name, lambda value, _: value * 2)
        look = (name, lambda value, _: seen.append(value))
        model.run_with_hooks(tokens, [look, double, look])
        torch.testing.assert_close(seen[1], seen[0] * 2)


class TestReplacing:
    def test_replacing_every_value_by_another_runs_gives_that_runs_logits(self, model, tokens):
        """Whatever crosses a cut of the graph decides everything after it."""
        other = random_tokens(model.config, seed=5)
        cuts = [
            ["blocks.0.hook_resid_post"],
            ["blocks.2.hook_resid_mid"],
            ["ln_final.hook_normalized"],
            ["blocks.1.attn.hook_result", "blocks.1.hook_resid_pre"],
            ["blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"],
            [f"blocks.1.hook_{x}" for x in ("q_input", "k_input", "v_input", "resid_pre")],
            ["blocks.2.hook_mlp_in", "blocks.2.hook_resid_mid"],
            ["hook_embed", *(["hook_pos_embed"] if model.config.positions == "learned" else [])],
        ]
        for names in cuts:
            expected, values = run_and_keep(model, other, names)
            logits = model.run_with_hooks(tokens, [(name, lambda _, at, v=values: v[at]) for name in names])
            torch.testing.assert_close(logits, expected, msg=str(names))

    def test_noise_at_any_hook_point_reaches_the_logits(self, model, tokens):
        plain, generator = model(tokens), torch.Generator().manual_seed(7)

        def add_noise(value, name):
            # Heads that share a key cannot be given different inputs.
            shape = (*value.shape[:2], 1, value.shape[3]) if name.endswith("attn_in") else value.shape
            return value + 0.3 * torch.randn(shape, generator=generator, dtype=value.dtype)

        for name in model.hook_names():
            logits = model.run_with_hooks(tokens, [(name, add_noise)])
            assert (logits - plain).abs().max() > 1e-3, name

    def test_ablating_a_head_at_z_equals_ablating_its_result(self, model, tokens):
        def without_head(value, name):
            value = value.clone()
            value[:, :, 1] = 0
            return value

        at_z = model.run_with_hooks(tokens, [("blocks.1.attn.hook_z", without_head)])
        at_result = model.run_with_hooks(tokens, [("blocks.1.attn.hook_result", without_head)])
        torch.testing.assert_close(at_z, at_result)
        assert not torch.allclose(at_z, model(tokens))

    @pytest.mark.parametrize(
        "name",
        [
            "hook_embed",
            "blocks.1.hook_mlp_in",
            "blocks.1.hook_attn_in",
            "blocks.1.hook_k_input",
            "blocks.1.attn.hook_k",
        ],
    )
    def test_changing_a_value_in_place_equals_returning_the_changed_one(self, model, tokens, name):
        def in_place(value, at):
            value[:, 2] = 0

        def returned(value, at):
            return torch.cat((value[:, :2], torch.zeros_like(value[:, 2:3]), value[:, 3:]), dim=1)

        changed = model.run_with_hooks(tokens, [(name, in_place)])
        torch.testing.assert_close(changed, model.run_with_hooks(tokens, [(name, returned)]))

    def test_changing_a_position_embedding_in_place_leaves_the_weights_alone(self):
        model, tokens = random_model(GPT2), random_tokens(GPT2)
        before = model(tokens)

        def forget_positions(value, name):
            value[0] = 0

        changed = model.run_with_hooks(tokens, [("hook_pos_embed", forget_positions)])
        assert not torch.allclose(changed[0], before[0])
        torch.testing.assert_close(changed[1], before[1])
        torch.testing.assert_close(model(tokens), before)

    def test_the_input_of_one_kv_head_reaches_only_the_query_heads_that_read_it(self):
        model, tokens = random_model(LLAMA), random_tokens(LLAMA)
        reads: dict = {}

        def zero_second(value, name):
            value[:, :, 1] = 0

        def z_with(hooks):
            model.run_with_hooks(tokens, [*hooks, ("blocks.0.attn.hook_z", recording(reads))])
            return reads.pop("blocks.0.attn.hook_z")

        plain, changed = z_with([]), z_with([("blocks.0.hook_v_input", zero_second)])
        torch.testing.assert_close(changed[:, :, :2], plain[:, :, :2])
        assert not torch.allclose(changed[:, :, 2], plain[:, :, 2])
        assert not torch.allclose(changed[:, :, 3], plain[:, :, 3])


class TestSplitInputs:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_a_layer_with_another_input_for_every_head_equals_a_manual_computation(self, config):
        """Every query head and every KV head reads a residual stream of its own, written out head by head."""
        model, tokens = random_model(config, seed=4), random_tokens(config)
        names = {x: f"blocks.0.hook_{x}_input" for x in "qkv"}
        _, clean = run_and_keep(model, tokens, names.values())
        generator = torch.Generator().manual_seed(9)
        inputs = {
            x: torch.randn(clean[name].shape, generator=generator, dtype=torch.float64) for x, name in names.items()
        }
        assert inputs["q"].shape == (2, 7, config.n_heads, 24)
        assert inputs["k"].shape == inputs["v"].shape == (2, 7, config.kv_heads, 24)
        z: dict = {}
        hooks = [(name, lambda _, at: inputs[at.split("hook_")[1][0]]) for name in names.values()]
        model.run_with_hooks(tokens, [*hooks, ("blocks.0.attn.hook_z", recording(z))])

        block = model.blocks[0]
        for head in range(config.n_heads):
            kv = head // config.group_size
            q, k, v = (
                self.one_head(model, inputs[x][:, :, i], getattr(block.attn, f"w_{x}"), i, rotated=x != "v")
                for x, i in (("q", head), ("k", kv), ("v", kv))
            )
            scores = q @ k.transpose(1, 2) / config.d_head**0.5
            scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
            expected = scores.softmax(-1) @ v
            torch.testing.assert_close(z["blocks.0.attn.hook_z"][:, :, head], expected)

    def one_head(self, model, resid, linear, head, rotated):
        """Queries, keys or values of one head, rotated by complex multiplication."""
        config = model.config
        rows = slice(head * config.d_head, (head + 1) * config.d_head)
        out = model.blocks[0].ln1(resid) @ linear.weight[rows].T
        out = out if linear.bias is None else out + linear.bias[rows]
        if config.positions == "learned" or not rotated:
            return out
        half = config.d_head // 2
        angles = torch.arange(7, dtype=torch.float64)[:, None] * model._frequencies
        turned = torch.complex(out[..., :half], out[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def test_heads_that_share_a_key_cannot_be_given_different_inputs(self):
        model, tokens = random_model(LLAMA), random_tokens(LLAMA)

        def only_first_head(value, name):
            value[:, :, 0] = 0

        with pytest.raises(HookError, match="tells heads that share a key apart; set q_input, k_input and v_input"):
            model.run_with_hooks(tokens, [("blocks.1.hook_attn_in", only_first_head)])

    def test_the_input_of_all_heads_comes_before_those_of_q_k_and_v(self, model, tokens):
        seen: dict = {}
        names = ["blocks.1.hook_q_input", "blocks.1.hook_k_input", "blocks.1.hook_v_input"]
        hooks = [("blocks.1.hook_attn_in", lambda value, _: value * 3), *((name, recording(seen)) for name in names)]
        model.run_with_hooks(tokens, [*hooks, ("blocks.1.hook_resid_pre", recording(seen))])
        for name in names:
            expected = seen["blocks.1.hook_resid_pre"][:, :, None] * 3
            torch.testing.assert_close(seen[name], expected.expand_as(seen[name]))

    def test_the_shared_norm_can_be_read_but_not_replaced(self, model, tokens):
        ask = ("blocks.1.hook_q_input", lambda value, _: None)
        seen: dict = {}
        model.run_with_hooks(tokens, [ask, ("blocks.1.ln1.hook_normalized", recording(seen))])
        assert seen["blocks.1.ln1.hook_normalized"].shape == (2, 7, 24)
        with pytest.raises(
            HookError, match=r"'blocks\.1\.ln1\.hook_scale' can only read while split inputs are hooked"
        ):
            model.run_with_hooks(tokens, [ask, ("blocks.1.ln1.hook_scale", lambda value, _: value * 2)])

    def test_a_gradient_at_the_shared_norm_is_an_error(self, model, tokens):
        ask = ("blocks.1.hook_q_input", lambda value, _: None)
        with pytest.raises(HookError, match="can only read while split inputs are hooked"):
            model.run_with_hooks(tokens, [ask], [("blocks.1.ln1.hook_scale", lambda grad, _: None)])


class TestGradients:
    def test_backward_hooks_see_what_autograd_gives_at_every_hook_point(self, model, tokens):
        """Autograd's own answer: the derivative along a random direction added to the value there."""
        generator = torch.Generator().manual_seed(6)
        weights = torch.randn(2, 7, 40, generator=generator, dtype=torch.float64)
        for name in model.hook_names():
            gradients: dict = {}
            logits = model.run_with_hooks(tokens, [], [(name, recording(gradients))])
            (logits * weights).sum().backward()

            def derivative(name=name):
                amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
                direction = {}

                def add(value, at):
                    direction[at] = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                    return value + amount * direction[at].where(value > -torch.inf, 0)

                (model.run_with_hooks(tokens, [(name, add)]) * weights).sum().backward()
                return amount.grad, direction[name]

            slope, direction = derivative()
            torch.testing.assert_close((gradients[name] * direction).sum(), slope, rtol=1e-8, atol=1e-8, msg=name)
            assert slope.abs() > 1e-6, name

    def test_a_backward_hook_may_replace_the_gradient(self, model, tokens):
        name, below = "blocks.1.hook_resid_post", {}
        hooks = [(name, lambda grad, _: grad * 0), ("blocks.0.hook_mlp_out", recording(below))]
        model.run_with_hooks(tokens, [], hooks).sum().backward()
        assert below["blocks.0.hook_mlp_out"].abs().max() == 0

    def test_gradients_pass_hook_points_of_one_value_from_the_last_to_the_first(self, model, tokens):
        """A layer's output and the next one's input are one value; the input comes first on the way back."""
        seen: dict = {}
        above, below = "blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"
        hooks = [(above, recording(seen)), (below, lambda grad, _: grad * 0)]
        model.run_with_hooks(tokens, [], hooks).square().sum().backward()
        assert seen[above].abs().max() > 0
        hooks = [(below, recording(seen)), (above, lambda grad, _: grad * 0)]
        model.run_with_hooks(tokens, [], hooks).square().sum().backward()
        assert seen[below].abs().max() == 0

    def test_a_backward_hook_sees_the_gradient_of_the_replaced_value(self, model, tokens):
        name, gradients = "blocks.1.hook_attn_out", {}
        double = (name, lambda value, _: value * 2)
        logits = model.run_with_hooks(tokens, [double], [(name, recording(gradients))])
        logits.square().sum().backward()

        held = {}

        def replaced_leaf(value, at):
            held[at] = (value * 2).detach().requires_grad_()
            return held[at]

        model.run_with_hooks(tokens, [(name, replaced_leaf)]).square().sum().backward()
        torch.testing.assert_close(gradients[name], held[name].grad)

    def test_a_backward_hook_without_gradients_is_an_error(self, model, tokens):
        hook = ("blocks.0.attn.hook_z", lambda grad, name: None)
        with torch.no_grad(), pytest.raises(HookError, match=r"backward hook on 'blocks\.0\.attn\.hook_z' .*no_grad"):
            model.run_with_hooks(tokens, [], [hook])
        with torch.inference_mode(), pytest.raises(HookError, match="no_grad"):
            model.run_with_hooks(tokens, [], [hook])

    def test_a_backward_hook_leaves_the_values_of_other_hooks_alone(self, model, tokens):
        name, other = "blocks.1.hook_resid_mid", {}
        model.run_with_hooks(tokens, [("*hook_resid_mid", recording(other))], [(name, lambda grad, _: None)])
        _, values = run_and_keep(model, tokens, ["*hook_resid_mid"])
        assert all(torch.equal(other[at], value) for at, value in values.items())

    def test_autograd_reaches_a_value_that_a_hook_kept(self, model, tokens):
        model.requires_grad_()
        logits, values = run_and_keep(model, tokens, ["blocks.1.attn.hook_z"])
        gradient = torch.autograd.grad(logits.sum(), values["blocks.1.attn.hook_z"])[0]
        assert gradient.abs().max() > 0


class TestErrors:
    def test_an_unknown_name_is_an_error_with_the_closest_one(self, model, tokens):
        message = r"no hook point 'blocks\.1\.attn\.hook_zz' in this model; did you mean 'blocks\.1\.attn\.hook_z'\?"
        with pytest.raises(HookError, match=message):
            model.run_with_hooks(tokens, [("blocks.1.attn.hook_zz", lambda value, name: None)])

    def test_a_layer_that_does_not_exist_is_an_error(self, model, tokens):
        with pytest.raises(HookError, match=r"no hook point 'blocks\.3\.hook_mlp_out'"):
            model.run_with_hooks(tokens, [("blocks.3.hook_mlp_out", lambda value, name: None)])

    def test_a_pattern_that_matches_nothing_is_an_error(self, model, tokens):
        with pytest.raises(HookError, match=r"no hook point '\*\.hook_nothing'"):
            model.run_with_hooks(tokens, [("*.hook_nothing", lambda value, name: None)])

    def test_hook_points_of_other_families_do_not_exist(self):
        assert "hook_pos_embed" not in random_model(LLAMA).hook_names()
        with pytest.raises(HookError, match="hook_rot_q"):
            random_model(GPT2).run_with_hooks(random_tokens(GPT2), [("blocks.0.attn.hook_rot_q", lambda v, n: None)])

    def test_a_hook_that_never_fired_is_an_error(self, model, tokens):
        hooks = [("blocks.2.hook_mlp_out", lambda value, name: None)]
        with pytest.raises(HookError, match=r"hook on 'blocks\.2\.hook_mlp_out' never fired"):
            model.run_with_hooks(tokens, hooks, stop_at_layer=2)
        with pytest.raises(HookError, match="never fired"), model.hooks(hooks):
            pass
        with pytest.raises(HookError, match="never fired"), model.hooks([], hooks):
            pass

    def test_an_outer_block_is_content_with_what_fired_inside_an_inner_one(self, model, tokens):
        outer, inner = [("blocks.0.hook_mlp_out", recording({}))], [("blocks.1.hook_mlp_out", recording({}))]
        with model.hooks(outer), model.hooks(inner):
            model(tokens)
        with model.hooks(outer):
            model(tokens)
            with pytest.raises(HookError, match=r"blocks\.1\.hook_mlp_out' never fired"), model.hooks(inner):
                pass

    def test_a_wrong_shape_is_an_error_with_the_right_one(self, model, tokens):
        with pytest.raises(HookError, match=r"hook on 'hook_embed' returned shape \(2, 24\); expected \(2, 7, 24\)"):
            model.run_with_hooks(tokens, [("hook_embed", lambda value, name: value[:, 0])])

    def test_a_value_that_is_no_tensor_is_an_error(self, model, tokens):
        with pytest.raises(HookError, match="returned float; expected a tensor or None"):
            model.run_with_hooks(tokens, [("hook_embed", lambda value, name: 0.0)])

    def test_the_error_of_a_hook_arrives_as_it_is_and_leaves_no_hook_behind(self, model, tokens):
        plain = model(tokens)

        def fail(value, name):
            raise ZeroDivisionError("mine")

        zero = ("blocks.0.hook_attn_out", lambda value, name: value * 0)
        for hooks, backward in (
            ([zero, ("blocks.1.hook_resid_pre", fail)], []),
            ([zero], [zero, ("hook_embed", fail)]),
        ):
            with pytest.raises(ZeroDivisionError, match="mine"), model.hooks(hooks, backward):
                model(tokens).sum().backward()
            assert torch.equal(model(tokens), plain)
            assert not model._hooks.wants(*model.hook_names())

    def test_leaving_a_block_removes_its_own_hooks_only(self, model, tokens):
        calls = []
        hook = ("blocks.0.hook_attn_out", lambda value, name: calls.append(name))
        with model.hooks([hook]):
            with model.hooks([hook]):
                model(tokens)
            assert len(calls) == 2
            model(tokens)
            assert len(calls) == 3
        model(tokens)
        assert len(calls) == 3


class TestCost:
    @pytest.fixture
    def calls(self, monkeypatch):
        """How often attention ran fused, and how often something was formed per head."""
        calls = {"fused": 0, "per_head": 0}
        fused, einsum = F.scaled_dot_product_attention, torch.einsum

        def count(key, function):
            def counting(*args, **kwargs):
                calls[key] += 1
                return function(*args, **kwargs)

            return counting

        monkeypatch.setattr(F, "scaled_dot_product_attention", count("fused", fused))
        monkeypatch.setattr(torch, "einsum", count("per_head", einsum))
        return calls

    def test_without_hooks_attention_is_fused_and_nothing_is_formed_per_head(self, model, tokens, calls):
        model(tokens)
        assert calls == {"fused": 3, "per_head": 0}

    def test_a_hook_costs_only_where_it_is_set(self, model, tokens, calls):
        model.run_with_hooks(tokens, [("blocks.1.attn.hook_pattern", lambda value, name: None)])
        assert calls == {"fused": 2, "per_head": 0}
        model.run_with_hooks(tokens, [("blocks.1.attn.hook_result", lambda value, name: None)])
        assert calls == {"fused": 5, "per_head": 1}
        model.run_with_hooks(tokens, [("blocks.1.hook_q_input", lambda value, name: None)])
        assert calls == {"fused": 8, "per_head": 4}

    def test_a_hook_on_z_keeps_attention_fused(self, model, tokens, calls):
        model.run_with_hooks(tokens, [("*.attn.hook_z", lambda value, name: value * 0)])
        assert calls == {"fused": 3, "per_head": 0}

    def test_the_standard_cache_holds_no_value_that_costs_a_residual_stream_per_head(self, model, tokens, calls):
        _, cache = model.run_with_cache(tokens)
        assert calls["per_head"] == 0
        assert set(model.hook_names()) - set(cache) == {n for n in model.hook_names() if n.endswith(ON_REQUEST)}

    def test_a_value_that_nobody_hooked_is_not_copied(self, model):
        value = torch.ones(3)
        assert model._hooks("hook_embed", value) is value


def test_fused_and_explicit_attention_agree_with_padding_and_without(model, tokens):
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    for attention_mask in (None, mask):
        plain = model(tokens, attention_mask=attention_mask)
        explicit = model.run_with_hooks(
            tokens, [("*.attn.hook_attn_scores", lambda value, name: None)], attention_mask=attention_mask
        )
        torch.testing.assert_close(explicit, plain, rtol=1e-12, atol=1e-12)
