"""Generation with the KV cache gives what running the whole prompt anew at every step gives."""

from __future__ import annotations

import pytest
import torch

from engine_models import CONFIGS, GPT2, ToyTokenizer, random_model, random_tokens
from subcircuit.engine.errors import HookError, PromptError
from subcircuit.engine.inputs import KVCache


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param], seed=31, tokenizer=ToyTokenizer())


@pytest.fixture
def tokens(model):
    return random_tokens(model.config, n_batch=3, n_pos=5)


def greedy_without_cache(model, tokens, n_new):
    """The likeliest token, appended, and everything run anew."""
    for _ in range(n_new):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens[:, -n_new:].tolist()


def test_greedy_continuations_equal_those_without_a_kv_cache(model, tokens):
    generated = model.generate(tokens, 12, stop_at_eos=False).tokens
    assert generated == greedy_without_cache(model, tokens, 12)
    assert len({tuple(row) for row in generated}) > 1


def test_logits_of_prompts_fed_in_pieces_equal_those_of_whole_prompts(model, tokens):
    kv_cache = KVCache()
    pieces = [model(piece, kv_cache=kv_cache) for piece in tokens.split((2, 1, 2), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens))
    assert kv_cache.n_pos == 5


def test_a_kv_cache_of_another_batch_size_is_an_error(model, tokens):
    kv_cache = KVCache()
    model(tokens, kv_cache=kv_cache)
    with pytest.raises(PromptError, match="1 prompts cannot continue a KV cache of 3"):
        model(tokens[:1], kv_cache=kv_cache)


def test_prompts_of_unequal_length_continue_as_each_does_alone(model):
    texts = ["abcdefg", "k", "xyzh"]
    together = model.generate(texts, 10)
    for text, ids, continuation in zip(texts, together.tokens, together.texts, strict=True):
        alone = model.generate(text, 10)
        assert alone.tokens == [ids]
        assert alone.texts == [continuation]


def test_padded_token_ids_continue_with_their_mask(model, tokens):
    padded = torch.cat((torch.full((3, 2), 7), tokens), dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :2] = False
    expected = model.generate(tokens, 6).tokens
    assert model.generate(padded, 6, attention_mask=mask).tokens == expected
    with pytest.raises(PromptError, match="padded on the left"):
        model.generate(padded, 6, attention_mask=mask.flip(1))


def test_text_without_a_tokenizer_is_an_error_and_ids_have_no_text(model, tokens):
    model.tokenizer = None
    assert model.generate(tokens, 2).texts is None
    with pytest.raises(PromptError, match="no tokenizer"):
        model.generate("abc", 2)


def test_a_text_is_what_the_tokenizer_makes_of_the_new_ids(model):
    generated = model.generate("abc", 5)
    assert generated.texts == [ToyTokenizer().decode(generated.tokens[0])]


def test_bos_follows_the_tokenizers_rule_unless_overridden(model):
    def prompt_of(**options):
        seen = []
        hook = ("hook_embed", lambda value, name: seen.append(value))
        model.generate("abc", 1, hooks=[hook], **options)
        return seen[0].shape[1]

    assert prompt_of() == 3
    assert prompt_of(bos=True) == 4
    model.tokenizer = ToyTokenizer(adds_bos=True)
    assert prompt_of() == 4
    assert prompt_of(bos=False) == 3


class TestHooks:
    def test_a_hook_sees_the_prompt_and_then_one_position_a_step(self, model, tokens):
        shapes = []
        hooks = [
            ("blocks.1.attn.hook_k", lambda value, name: shapes.append(value.shape[1])),
            ("blocks.1.attn.hook_pattern", lambda value, name: shapes.append(tuple(value.shape[2:]))),
        ]
        model.generate(tokens, 3, stop_at_eos=False, hooks=hooks)
        assert shapes == [5, (5, 5), 1, (1, 6), 1, (1, 7)]

    def test_hooks_act_at_every_step_as_they_do_without_a_cache(self, model, tokens):
        def ablate(value, name):
            value = value.clone()
            value[:, :, 0] = 0
            return value

        hooks = [("blocks.*.attn.hook_z", ablate), ("blocks.1.attn.hook_v", ablate)]
        with model.hooks(hooks):
            expected = greedy_without_cache(model, tokens, 8)
        assert model.generate(tokens, 8, stop_at_eos=False, hooks=hooks).tokens == expected
        assert model.generate(tokens, 8, stop_at_eos=False).tokens != expected

    def test_an_unknown_hook_is_an_error_and_none_stays_behind(self, model, tokens):
        with pytest.raises(HookError, match="no hook point"):
            model.generate(tokens, 2, hooks=[("blocks.9.hook_mlp_out", lambda value, name: None)])
        model.generate(tokens, 2, hooks=[("hook_embed", lambda value, name: None)])
        assert not model._hooks.wants(*model.hook_names())


class TestSampling:
    def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(self, model, tokens):
        first, again, other = (
            model.generate(tokens, 15, temperature=1.0, seed=seed, stop_at_eos=False).tokens for seed in (1, 1, 2)
        )
        assert first == again
        assert first != other

    def test_the_global_random_state_is_neither_read_nor_changed(self, model, tokens):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first = model.generate(tokens, 6, temperature=1.0).tokens
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(6)
        assert model.generate(tokens, 6, temperature=1.0).tokens == first

    @pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}])
    def test_sampling_among_one_token_is_greedy(self, model, tokens, options):
        expected = model.generate(tokens, 8).tokens
        assert model.generate(tokens, 8, **{"temperature": 0.8, "seed": 3, **options}).tokens == expected

    def test_frequencies_are_the_probabilities_at_that_temperature(self):
        model, tokens = random_model(GPT2, seed=2), random_tokens(GPT2, n_batch=1)
        logits = model(tokens)[0, -1]
        drawn = model.generate(tokens.expand(20_000, -1), 1, temperature=2.0).tokens
        frequencies = torch.bincount(torch.tensor(drawn).flatten(), minlength=40) / 20_000
        # Three standard deviations of a frequency that is 1/2 are 0.011.
        assert (frequencies - (logits / 2).softmax(-1)).abs().max() < 0.011

    @pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.3}])
    def test_only_the_likeliest_tokens_are_drawn(self, options):
        model, tokens = random_model(GPT2, seed=2), random_tokens(GPT2, n_batch=1)
        probabilities, order = model(tokens)[0, -1].softmax(-1).sort(descending=True)
        n_kept = 3 if "top_k" in options else int((probabilities.cumsum(0) < 0.3).sum()) + 1
        drawn = model.generate(tokens.expand(5000, -1), 1, temperature=1.0, **options).tokens
        assert {row[0] for row in drawn} == set(order[:n_kept].tolist())


class TestStopping:
    def test_a_prompt_ends_before_its_stop_token_and_the_others_go_on(self, model, tokens):
        free = model.generate(tokens, 12, stop_at_eos=False).tokens
        stop = free[0][4]
        stopped = model.generate(tokens, 12, stop_at_eos=False, stop_tokens=(stop,)).tokens
        for before, after in zip(free, stopped, strict=True):
            assert after == (before[: before.index(stop)] if stop in before else before)

    def test_the_tokenizers_end_of_sequence_stops_unless_told_not_to(self, model, tokens):
        free = model.generate(tokens, 12, stop_at_eos=False).tokens
        model.tokenizer = ToyTokenizer()
        model.tokenizer.eos_id = free[1][3]
        assert model.generate(tokens, 12).tokens[1] == free[1][: free[1].index(free[1][3])]
        assert model.generate(tokens, 12, stop_at_eos=False).tokens == free

    def test_no_step_is_run_once_every_prompt_has_ended(self, model, tokens):
        steps = []
        hooks = [("hook_embed", lambda value, name: steps.append(1))]
        first = model.generate(tokens, 1, stop_at_eos=False).tokens
        generated = model.generate(tokens, 9, stop_tokens=tuple(row[0] for row in first), hooks=hooks)
        assert generated.tokens == [[], [], []]
        assert len(steps) == 1


class TestLimits:
    def test_generation_may_fill_the_context_and_read_one_token_off_its_end(self, model, tokens):
        assert [len(row) for row in model.generate(tokens, 28, stop_at_eos=False).tokens] == [28, 28, 28]
        with pytest.raises(
            PromptError, match="max_new_tokens 29 does not fit: the prompt has 5 tokens and the context 32"
        ):
            model.generate(tokens, 29)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
            ({"temperature": -1.0}, "temperature must be 0"),
            ({"temperature": float("nan")}, "temperature must be 0"),
            ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
            ({"temperature": 1.0, "top_p": 0.0}, "top_p must lie in"),
            ({"temprature": 1.0}, "option 'temprature' is not known; did you mean 'temperature'"),
        ],
    )
    def test_an_option_out_of_range_is_one_clear_line(self, model, tokens, options, message):
        with pytest.raises(PromptError, match=message):
            model.generate(tokens, **options)

    def test_a_prompt_longer_than_the_context_is_an_error(self, model):
        with pytest.raises(PromptError, match="prompt of 33 tokens is longer than the model's context of 32"):
            model(random_tokens(model.config, n_pos=33))
