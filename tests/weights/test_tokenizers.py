"""Token ids against the reference tokenizers on random text of many kinds, and what the tokenizers promise beyond ids.

Text is drawn from SEED; set SUBCIRCUIT_TEST_SEED to repeat a failure's or to try others.
"""

from __future__ import annotations

import base64
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers as hf
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from oracles import shared_models, smollm2_gguf
from subcircuit.engine.errors import TokenizerError
from subcircuit.weights.bpe import GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT, Splitter, apply_merges, ranks_say_the_same
from subcircuit.weights.gguf_file import open_gguf
from subcircuit.weights.text_tokenizer import AddedToken, TextTokenizer, TokenFinder
from subcircuit.weights.tokenizers import (
    from_gguf_metadata,
    from_tokenizer_json,
    gpt2_bpe,
    llama3_tiktoken,
    sentencepiece,
)

SEED = int(os.environ.get("SUBCIRCUIT_TEST_SEED", "0"))
N_TEXTS = 10_000

_WORDS = (
    "the a of January lost Ring Van digit twelve naïve Straße œuvre İstanbul ĳsselmeer fiancée "
    "Привет мир ёлка Ελληνικά ὕβρις עברית שָׁלוֹם العربية مرحبًا فارسی हिन्दी क्षेत्र বাংলা தமிழ் తెలుగు ไทย ภาษา ລາວ བོད་ "
    "မြန်မာ ქართული Հայերեն አማርኛ ខ្មែរ 한국어 안녕 日本語 こんにちは カタカナ 漢字 中文分词 𠮷野家 𝕳𝖊𝖑𝖑𝖔 ᚠᚢᚦ Ꭰ ᠮᠣᠩᠭᠣᠯ"
).split(" ")
_NUMBERS = (
    "0 7 42 1999 3.14159 1,000,000 0x1F 1e-9 ½ ⅓ ¼x Ⅷ ⅻ ² x² H₂O ٣ ١٢٣ ۴۵ १२३ ๑๒ 一二三 ㊿ ① 𝟘𝟙 〇 ௧௨ ᛮ 12½ 2nd".split(
        " "
    )
)
_SPACES = [
    " ",
    "  ",
    "   ",
    " " * 7,
    "\t",
    "\t\t ",
    "\n",
    "\n\n",
    "\r\n",
    " \n",
    "\n ",
    "\r",
    "\v",
    "\f",
    "\x1c",
    "\x85",
]
_SPACES += [
    "\xa0",
    " \xa0 ",
    "\u2003",
    "\u2009\u200a",
    "\u3000",
    "\u2028",
    "\u2029",
    "\u202f",
    "\u1680",
    "\u200b",
    "\ufeff",
]
_EMOJI = ["😀", "🦙.cpp", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "1️⃣", "❤️", "🧑🏿‍🚀🚀", "☃", "✅ ", "\u200d"]
_CODE = [
    "def f(x):\n    return x**2\n",
    "for (int i = 0; i < n; ++i) {\n\t\ta[i] += b;\n}",
    "<div class='a'>&nbsp;</div>",
]
_CODE += [
    "SELECT * FROM t WHERE x >= 10;--",
    "\\frac{1}{2}",
    "a_b->c::d",
    '{"k": [1, 2.5, null]}',
    "#!/bin/sh\n",
    "&&||!=",
]
_CODE += [
    "https://example.org/a?b=c&d=%20#e",
    "x@y.org",
    "/* ... */",
    "........",
    "==========",
    "'''''''",
    "$1.50",
    "C:\\n",
]
_SHORT = "'s 't 're 've 'm 'll 'd 'S 'LL 'Re 'ſ ’s don't I'LL we'd'nt 'sé o'clock 'tis '".split(" ")
_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|begin_of_text|> <|endoftext <filename> <s> </s> <unk> <0x0A>".split(
    " "
)
_SPECIAL += ["[INST]", "Ġ", "▁", "▁▁", ""]
_RANGES = [
    (0x00, 0x20),
    (0x20, 0x7F),
    (0x7F, 0x250),
    (0x300, 0x370),
    (0x370, 0x2000),
    (0x2000, 0x2C00),
    (0x2C00, 0xD800),
]
_RANGES += [
    (0xE000, 0x10000),
    (0x10000, 0x20000),
    (0x1F300, 0x1FB00),
    (0x20000, 0x32400),
    (0xE0000, 0xE0200),
    (0x0, 0x110000),
]


def random_character(rng: random.Random) -> str:
    code = rng.randrange(*rng.choice(_RANGES))
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)


def random_text(rng: random.Random) -> str:
    """A few fragments of different kinds, joined with or without space."""

    def fragment() -> str:
        kind = rng.randrange(11)
        if kind <= 2:
            return rng.choice(_WORDS)
        if kind == 3:
            return rng.choice(_NUMBERS)
        if kind == 4:
            return "".join(rng.choices(_SPACES, k=rng.randint(1, 4)))
        if kind == 5:
            return rng.choice(rng.choice((_EMOJI, _CODE)))
        if kind == 6:
            return rng.choice(rng.choice((_SHORT, _SPECIAL)))
        if kind == 7:
            return "".join(random_character(rng) for _ in range(rng.randint(1, 6)))
        if kind == 8:
            return "".join(rng.choices("abcdefghij ABC 0123456789 '.,-\n", k=rng.randint(1, 12)))
        if kind == 9:
            return rng.choice(_WORDS)[: rng.randint(1, 3)] + rng.choice(
                "\u0301\u0327\u20dd\u0f7f\u0651\ufe0f"
            ) * rng.randint(1, 2)
        return rng.choice("a é=-.\n0ÿ\t▁'") * rng.randint(2, 40)

    joint = rng.choice(("", "", " ", " "))
    return joint.join(fragment() for _ in range(rng.randint(1, 9)))


@lru_cache(maxsize=1)
def texts() -> list[str]:
    rng = random.Random(SEED)
    return ["", " ", "  ", "a", *(random_text(rng) for _ in range(N_TEXTS - 4))]


def ids_in_reference(backend: hf.Tokenizer, some_texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch(some_texts, add_special_tokens=False)]


def assert_same_ids(ours: Callable[[str], list[int]], some_texts: list[str], expected: list[list[int]]) -> None:
    assert len(some_texts) == len(expected) > 0
    found = [ours(text) for text in some_texts]
    wrong = [i for i, (ids, reference) in enumerate(zip(found, expected, strict=True)) if ids != reference]
    shown = [(some_texts[i], found[i], expected[i]) for i in wrong[:3]]
    assert not wrong, f"seed {SEED}: {len(wrong)} of {len(expected)} texts differ (text, ours, reference): {shown}"


def without_bos(tokenizer: TextTokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, bos=False)


def gguf_tokenizer(path: Path) -> TextTokenizer:
    return from_gguf_metadata(open_gguf(path).metadata, path)


def transformers_backend(path: Path) -> hf.Tokenizer:
    """The tokenizer that `transformers` builds from a GGUF file."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    backend: hf.Tokenizer = TokenizersBackend.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    return backend


@pytest.fixture(scope="module")
def files() -> Path:
    return shared_models() / "tokenizers"


@pytest.fixture(scope="module")
def gpt2(files: Path) -> TextTokenizer:
    return gpt2_bpe(files / "vocab.json", files / "merges.txt")


@pytest.fixture(scope="module")
def gpt2_ids(files: Path) -> list[list[int]]:
    from transformers import GPT2Tokenizer

    return ids_in_reference(GPT2Tokenizer.from_pretrained(files).backend_tokenizer, texts())


@pytest.fixture(scope="module")
def smollm2() -> TextTokenizer:
    return gguf_tokenizer(smollm2_gguf())


@pytest.fixture(scope="module")
def llama_spm(files: Path) -> TextTokenizer:
    return gguf_tokenizer(files / "ggml-vocab-llama-spm.gguf")


# ----------------------------------------------------------------------------------------------------------------------
# Real vocabularies


def test_gpt2_gives_the_ids_of_transformers(gpt2: TextTokenizer, gpt2_ids: list[list[int]]) -> None:
    assert_same_ids(gpt2.encode, texts(), gpt2_ids)


def test_gpt2_from_gguf_gives_the_ids_of_transformers(files: Path, gpt2_ids: list[list[int]]) -> None:
    assert_same_ids(gguf_tokenizer(files / "ggml-vocab-gpt-2.gguf").encode, texts(), gpt2_ids)


def test_smollm2_gives_the_ids_of_its_published_pipeline(smollm2: TextTokenizer) -> None:
    backend = transformers_backend(smollm2_gguf())
    # transformers does not know the pre-tokenizer "smollm" and takes GPT-2's.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert_same_ids(smollm2.encode, texts(), ids_in_reference(backend, texts()))


def test_llama2_gives_the_ids_of_transformers_from_gguf_and_json(
    files: Path, llama_spm: TextTokenizer, tmp_path: Path
) -> None:
    backend = transformers_backend(files / "ggml-vocab-llama-spm.gguf")
    # sentencepiece puts a space before every text. What transformers takes by default leaves it out before a space
    # (as its own comment on Phi-3 says); this is the normalizer of Llama 2's tokenizer.json.
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    expected = ids_in_reference(backend, texts())
    assert_same_ids(without_bos(llama_spm), texts(), expected)
    backend.save(str(tmp_path / "tokenizer.json"))
    from_json = from_tokenizer_json(tmp_path / "tokenizer.json")
    assert_same_ids(without_bos(from_json), texts(), expected)
    assert from_json.encode("hi") == backend.encode("hi").ids == llama_spm.encode("hi")


def test_stories260k_gives_the_ids_of_sentencepiece() -> None:
    path = shared_models() / "stories260K/tok512.model"
    processor = SentencePieceProcessor(model_file=str(path))
    expected = [[processor.bos_id(), *processor.encode(text)] for text in texts()]
    assert_same_ids(sentencepiece(path).encode, texts(), expected)


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_vectors_of_llama_cpp(files: Path, name: str) -> None:
    stem = files / f"ggml-vocab-{name}.gguf"
    inputs = stem.with_name(f"{stem.name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = stem.with_name(f"{stem.name}.out").read_text().split("\n")
    expected = [[int(token_id) for token_id in line.split()] for line in outputs]
    assert len(inputs) == 47
    assert_same_ids(without_bos(gguf_tokenizer(stem)), inputs, expected)


def test_a_sentencepiece_model_survives_gguf_metadata() -> None:
    path = shared_models() / "stories260K/tok512.model"
    original = SentencePieceProcessor(model_file=str(path))
    n_pieces = original.vocab_size()

    def kind(i: int) -> int:
        return 2 if original.is_unknown(i) else 3 if original.is_control(i) else 6 if original.is_byte(i) else 1

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in range(n_pieces)],
        "tokenizer.ggml.scores": [original.get_score(i) for i in range(n_pieces)],
        "tokenizer.ggml.token_type": [kind(i) for i in range(n_pieces)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }
    expected = [[1, *original.encode(text)] for text in texts()]
    assert_same_ids(from_gguf_metadata(metadata, parse_special=False).encode, texts(), expected)


def test_bytes_without_a_token_are_left_out_as_in_the_reference(smollm2: TextTokenizer) -> None:
    assert smollm2.encode("!\x04!") == smollm2.encode("!!")
    assert smollm2.decode(smollm2.encode("!\x04!")) == "!!"


def test_byte_level_decoding_gives_the_text_back(gpt2: TextTokenizer, smollm2: TextTokenizer) -> None:
    with_token = set(smollm2.tokens)
    for text in texts():
        assert gpt2.decode(gpt2.encode(text)) == text
        spelled = "".join(c for c in text if all(bytes([byte]) in with_token for byte in c.encode()))
        assert smollm2.decode(smollm2.encode(spelled)) == spelled


def test_sentencepiece_decoding_gives_the_text_back(llama_spm: TextTokenizer) -> None:
    for text in texts():
        expected = text.replace("▁", " ")
        assert llama_spm.decode(llama_spm.encode(text, bos=False)) == expected
        assert llama_spm.decode(llama_spm.encode(text)) == f"<s>{expected}"


# ----------------------------------------------------------------------------------------------------------------------
# Vocabularies of the tests' own


@lru_cache(maxsize=1)
def trained_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """600 merges that `tokenizers` learns from the texts, cut by Llama 3's pattern."""
    backend = hf.Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level(LLAMA3_SPLIT)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=856, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts()[:3000], trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def byte_level(pattern: str) -> pre_tokenizers.Sequence:
    split = pre_tokenizers.Split(hf.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def shuffled(vocab: dict[str, int]) -> dict[str, int]:
    """The vocabulary with ids that say nothing about the order of merges."""
    ids = list(range(len(vocab)))
    random.Random(SEED).shuffle(ids)
    return dict(zip(vocab, ids, strict=True))


def every_pair(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair that joins to a token, by the token's rank, as the converter from tiktoken's format lists them."""
    found = [
        (token[:i], token[i:]) for token in vocab for i in range(1, len(token)) if {token[:i], token[i:]} <= set(vocab)
    ]
    return sorted(found, key=lambda pair: (vocab[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))


def llama3_style() -> hf.Tokenizer:
    vocab, _ = trained_vocabulary()
    backend = hf.Tokenizer(models.BPE(vocab, every_pair(vocab), ignore_merges=True))
    backend.pre_tokenizer = byte_level(LLAMA3_SPLIT)
    backend.add_special_tokens(["<|begin_of_text|>", "<|im_start|>"])
    bos = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[bos])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    backend.decoder = decoders.ByteLevel()
    return backend


def qwen2_style() -> hf.Tokenizer:
    vocab, merges = trained_vocabulary()
    backend = hf.Tokenizer(models.BPE(shuffled(vocab), merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = byte_level(QWEN2_SPLIT)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([hf.AddedToken("clock", single_word=True), hf.AddedToken("12", lstrip=True, rstrip=True)])
    backend.decoder = decoders.ByteLevel()
    return backend


def smollm_style() -> hf.Tokenizer:
    vocab, merges = trained_vocabulary()
    merged_away = set("".join(left + right for left, right in merges))
    letters = [token for token in vocab if len(token) > 1 or token in merged_away]
    backend = hf.Tokenizer(models.BPE({"<unk>": 0} | {token: i + 1 for i, token in enumerate(letters)}, merges))
    backend.model.unk_token = "<unk>"
    backend.model.fuse_unk = True
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def sentencepiece_style(prefix: str) -> hf.Tokenizer:
    """Characters with byte fallback; merges learned where sentencepiece puts its spaces."""
    learner = hf.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(vocab_size=1000, limit_alphabet=300, show_progress=False)
    learner.train_from_iterator(texts()[:3000], trainer)
    learned = json.loads(learner.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = hf.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if prefix == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=prefix == "always")
    # In old files the special tokens are normalised too, and then found only in their normal form.
    backend.add_special_tokens([hf.AddedToken(name, normalized=prefix == "normalizer") for name in names[:3]])
    return backend


STYLES: dict[str, Callable[[], hf.Tokenizer]] = {
    "llama3": llama3_style,
    "qwen2": qwen2_style,
    "smollm": smollm_style,
    "llama2-normalizer": lambda: sentencepiece_style("normalizer"),
    "llama2-metaspace-first": lambda: sentencepiece_style("first"),
    "llama2-metaspace-always": lambda: sentencepiece_style("always"),
    "llama2-metaspace-never": lambda: sentencepiece_style("never"),
}


def saved(backend: hf.Tokenizer, directory: Path, **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "tokenizer.json"
    backend.save(str(path))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("style", STYLES)
def test_tokenizer_json_gives_the_ids_of_tokenizers(style: str, tmp_path: Path) -> None:
    some_texts = texts() if style in ("llama3", "qwen2") else texts()[:3000]
    backend = STYLES[style]()
    ours = from_tokenizer_json(saved(backend, tmp_path))
    assert_same_ids(ours.encode, some_texts, [encoding.ids for encoding in backend.encode_batch(some_texts)])
    assert ours.n_vocab == backend.get_vocab_size()
    backend.encode_special_tokens = True
    plain = from_tokenizer_json(tmp_path / "tokenizer.json", parse_special=False)
    assert_same_ids(without_bos(plain), some_texts[:1000], ids_in_reference(backend, some_texts[:1000]))


def test_added_tokens_are_found_as_in_the_reference() -> None:
    rng = random.Random(SEED)
    for _ in range(150):
        backend = hf.Tokenizer(models.BPE({c: i for i, c in enumerate("abc ")}, []))
        names = {"".join(rng.choices("abc ", k=rng.randint(1, 4))).strip() or "a" for _ in range(4)} - set("abc")
        flags = {
            name: {key: rng.random() < 0.3 for key in ("single_word", "lstrip", "rstrip", "special")} for name in names
        }
        backend.add_tokens([hf.AddedToken(name, normalized=False, **flags[name]) for name in names])
        finder = TokenFinder(AddedToken(name, backend.token_to_id(name), **flags[name]) for name in names)
        for _ in range(40):
            text = "".join(rng.choices("aabbc ", k=rng.randint(0, 12)))
            ours: list[int] = []
            for part in finder.split(text):
                ours += [part.id] if isinstance(part, AddedToken) else ["abc ".index(c) for c in part]
            assert ours == backend.encode(text).ids, f"seed {SEED}: {flags} in {text!r}"


def small_metadata(pre: str) -> dict[str, object]:
    """What a GGUF file says about a byte-level vocabulary, with <|endoftext|> at its end."""
    vocab, merges = trained_vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*vocab, "<|endoftext|>", "[INST]"],
        "tokenizer.ggml.token_type": [1] * len(vocab) + [3, 4],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": len(vocab),
        "tokenizer.ggml.eos_token_id": len(vocab),
    }


@pytest.mark.parametrize(
    ("pre", "patterns"),
    [
        ("gpt-2", [GPT2_SPLIT]),
        ("llama-bpe", [LLAMA3_SPLIT]),
        ("qwen2", [QWEN2_SPLIT]),
        ("starcoder", [r"\p{N}", GPT2_SPLIT]),
        ("default", [r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"]),
    ],
)
def test_gguf_cuts_text_as_its_pre_tokenizer_says(pre: str, patterns: list[str]) -> None:
    vocab, merges = trained_vocabulary()
    backend = hf.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    splits = [pre_tokenizers.Split(hf.Regex(pattern), "isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens(["[INST]"])
    expected = ids_in_reference(backend, texts()[:3000])
    assert_same_ids(without_bos(from_gguf_metadata(small_metadata(pre))), texts()[:3000], expected)


def test_tiktoken_merges_where_it_can_and_the_list_where_it_must(tmp_path: Path) -> None:
    assert from_tokenizer_json(saved(qwen2_style(), tmp_path / "qwen2")).name == "tiktoken/qwen2"
    assert from_tokenizer_json(saved(llama3_style(), tmp_path / "llama3")).name == "merges/llama3"


def test_llama3_model_gives_the_ids_of_tiktoken(tmp_path: Path) -> None:
    vocab, _ = trained_vocabulary()
    to_byte = {c: i for i, c in enumerate(bytes_to_unicode())}
    ranks = {bytes(to_byte[c] for c in token): rank for token, rank in vocab.items()}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path = tmp_path / "tokenizer.model"
    path.write_text("".join(lines))
    special = {"<|begin_of_text|>": len(ranks), "<|end_of_text|>": len(ranks) + 1, "<|eot_id|>": len(ranks) + 9}
    reference = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)
    ours = llama3_tiktoken(path)
    assert (ours.n_vocab, ours.bos_id, ours.adds_bos) == (len(ranks) + 256, len(ranks), True)
    assert_same_ids(ours.encode, texts(), [[len(ranks), *reference.encode_ordinary(text)] for text in texts()])
    parsing = llama3_tiktoken(path, parse_special=True)
    expected = [reference.encode(text, allowed_special="all") for text in texts()]
    assert_same_ids(without_bos(parsing), texts(), expected)
    assert parsing.encode("a<|eot_id|>", bos=False)[-1] == special["<|eot_id|>"]


def bytes_to_unicode() -> list[str]:
    """GPT-2's character for each byte, read off the reference."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_code = {code: split.pre_tokenize_str(chr(code))[0][0] for code in (*range(0x80), *range(0x80, 0x800))}
    # Bytes that no code point below U+0800 uses follow the alphabet's order.
    table: dict[int, str] = {}
    for code, text in of_code.items():
        table |= dict(zip(chr(code).encode(), text, strict=True))
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(table.values()), key=ord)
    return [table.get(byte) or rest.pop(0) for byte in range(256)]


# ----------------------------------------------------------------------------------------------------------------------
# Merges


def random_merges(rng: random.Random, n_merges: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges over two letters: mostly of tokens that exist, in an order that learning may or may not give."""
    vocab = {"a": 0, "b": 1}
    merges: list[tuple[str, str]] = []
    for _ in range(n_merges):
        left, right = rng.choice(list(vocab)), rng.choice(list(vocab))
        vocab.setdefault(left + right, len(vocab))
        if (left, right) not in merges:
            merges.insert(len(merges) if rng.random() < 0.9 else rng.randint(0, len(merges)), (left, right))
    return vocab, merges


def merge_cases() -> Iterator[tuple[dict[str, int], list[tuple[str, str]], list[str]]]:
    rng = random.Random(SEED)
    for _ in range(400):
        vocab, merges = random_merges(rng, rng.randint(1, 6))
        yield vocab, merges, ["".join(rng.choices("ab", k=rng.randint(1, 14))) for _ in range(60)]


def as_pairs(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[tuple[int, int], tuple[int, int]]:
    return {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(merges)}


def test_merging_by_the_list_equals_the_reference_on_any_list() -> None:
    for vocab, merges, words in merge_cases():
        backend = hf.Tokenizer(models.BPE(vocab, merges))
        for word in words:
            ours = apply_merges([vocab[c] for c in word], as_pairs(vocab, merges))
            assert ours == backend.encode(word).ids, f"seed {SEED}: {merges} on {word}"


def test_tiktoken_is_trusted_exactly_where_it_agrees_with_the_list() -> None:
    """Where ranks are said to do, they do; where they are not, the list was tangled: they fail on some short word."""
    trusted = distrusted_rightly = distrusted = 0
    for vocab, merges, words in merge_cases():
        pairs = as_pairs(vocab, merges)
        tokens = list(dict.fromkeys(["a", "b", *(a + b for a, b in merges)]))
        ranks = {token.encode(): rank for rank, token in enumerate(tokens)}
        encoding = tiktoken.Encoding("ranks", pat_str=".+", mergeable_ranks=ranks, special_tokens={})
        by_rank = [[vocab[tokens[rank]] for rank in encoding.encode_ordinary(word)] for word in [*words, *tokens]]
        by_list = [apply_merges([vocab[c] for c in word], pairs) for word in [*words, *tokens]]
        if ranks_say_the_same(pairs):
            trusted += 1
            assert by_rank == by_list, f"seed {SEED}: {merges}"
        else:
            distrusted += 1
            distrusted_rightly += by_rank != by_list
    assert trusted > 50
    assert distrusted_rightly > 50
    assert distrusted_rightly > distrusted / 2


def test_a_long_run_without_a_split_is_merged_quickly(gpt2: TextTokenizer, tmp_path: Path) -> None:
    by_list = from_tokenizer_json(saved(llama3_style(), tmp_path))
    for tokenizer in (gpt2, by_list):
        text = "ab" * 20_000
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


NEWER = "a\U00011de0 \u088f1 \U000323b0x"
"""Letters and digits of Unicode 17, which the reference's tables do not have."""


def test_characters_newer_than_the_references_unicode_are_cut_as_it_cuts_them() -> None:
    reference = pre_tokenizers.Split(hf.Regex(GPT2_SPLIT), "isolated")
    assert Splitter(GPT2_SPLIT)(NEWER) == [piece for piece, _ in reference.pre_tokenize_str(NEWER)]


def test_characters_newer_than_the_references_unicode_are_normalised_as_it_does(tmp_path: Path) -> None:
    ours, reference = from_tokenizer_json(saved(qwen2_style(), tmp_path)).normalize, normalizers.NFC()
    rng = random.Random(SEED)
    marks = "\u0334\u0315\u0301\u0345\u05c8\u0898\u0c3c\u1df6\U00011935\U00011930\U000105d2\u0307\U0001e08f"
    for _ in range(3000):
        text = "".join(rng.choices(marks + "ae", k=rng.randint(1, 6)))
        assert ours(text) == reference.normalize_str(text), f"seed {SEED}: {text!r}"


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer object


def test_bos_follows_the_rule_and_can_be_overridden(gpt2: TextTokenizer, llama_spm: TextTokenizer) -> None:
    assert not gpt2.adds_bos
    assert gpt2.encode("hi") == gpt2.encode("hi", bos=False) == [5303]
    assert gpt2.encode("hi", bos=True) == [50256, 5303]
    assert gpt2.with_bos(True).encode("hi") == [50256, 5303]
    assert gpt2.with_bos(None) is gpt2
    assert llama_spm.adds_bos
    assert llama_spm.encode("hi") == [1, 7251]
    assert llama_spm.with_bos(False).encode("hi") == llama_spm.encode("hi", bos=False) == [7251]
    assert "(50256) not added unless asked otherwise" in gpt2.describe()
    assert "<s> (1) added unless asked otherwise" in llama_spm.describe()


@pytest.mark.parametrize(
    ("config", "template", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"add_bos_token": False, "bos_token": "<|begin_of_text|>"}, True, False),
        ({"add_bos_token": True, "bos_token": {"content": "<|begin_of_text|>"}}, False, True),
        ({"bos_token": "<|begin_of_text|>"}, False, False),
    ],
)
def test_tokenizer_config_decides_about_bos_before_the_template(
    config: dict[str, object], template: bool, expected: bool, tmp_path: Path
) -> None:
    backend = llama3_style()
    if not template:
        backend.post_processor = processors.ByteLevel()
    ours = from_tokenizer_json(saved(backend, tmp_path, eos_token="<|im_start|>", **config))
    assert ours.adds_bos == expected
    assert ours.bos_id == (backend.token_to_id("<|begin_of_text|>") if template or config else None)
    assert ours.eos_id == backend.token_to_id("<|im_start|>")


def test_gguf_says_whether_bos_is_added() -> None:
    metadata = small_metadata("gpt-2")
    assert not from_gguf_metadata(metadata).adds_bos
    assert from_gguf_metadata({**metadata, "tokenizer.ggml.add_bos_token": True}).adds_bos
    assert from_gguf_metadata({**metadata, "tokenizer.ggml.pre": "llama-bpe"}).adds_bos


def test_special_tokens_in_a_text_are_parsed_or_not(files: Path, gpt2: TextTokenizer) -> None:
    plain = gpt2_bpe(files / "vocab.json", files / "merges.txt", parse_special=False)
    text = "a<|endoftext|>b"
    assert gpt2.encode(text) == [64, 50256, 65]
    assert 50256 not in plain.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == plain.decode(plain.encode(text)) == text


def test_a_single_token_is_found_and_spelled(gpt2: TextTokenizer, llama_spm: TextTokenizer) -> None:
    assert gpt2.single_token(" January") == 3269
    assert gpt2.token_bytes(3269) == b" January"
    assert gpt2.single_token("<|endoftext|>") == 50256
    assert gpt2.single_token("Januaryish") is None
    assert gpt2.single_token("") is None
    january = llama_spm.single_token("January")
    assert january is not None
    assert llama_spm.token_bytes(january) == b" January"
    assert llama_spm.token_bytes(3 + 0x41) == b"A"
    assert llama_spm.token_bytes(1) == b"<s>"


def test_half_a_character_decodes_to_the_replacement_character(gpt2: TextTokenizer) -> None:
    ids = gpt2.encode("🦙")
    assert len(ids) > 1
    assert gpt2.decode(ids[:1]) == "\ufffd"
    assert b"".join(map(gpt2.token_bytes, ids)) == "🦙".encode()


def assert_one_line(error: pytest.ExceptionInfo[TokenizerError], *parts: str) -> None:
    message = str(error.value)
    assert message.isprintable()
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"), [(7, "int"), (None, "NoneType"), (["a"], "list"), ("a\ud800", "character 1")]
)
def test_what_is_no_text_is_one_line(gpt2: TextTokenizer, text: Any, part: str) -> None:
    with pytest.raises(TokenizerError) as error:
        gpt2.encode(text)
    assert_one_line(error, part)


def test_ids_out_of_range_are_one_line(gpt2: TextTokenizer) -> None:
    for bad in (-1, 50257):
        with pytest.raises(TokenizerError) as error:
            gpt2.decode([1, bad])
        assert_one_line(error, str(bad), "50256")
        with pytest.raises(TokenizerError):
            gpt2.token_bytes(bad)


def test_bos_without_such_a_token_is_one_line(tmp_path: Path) -> None:
    ours = from_tokenizer_json(saved(qwen2_style(), tmp_path))
    assert ours.bos_id is None
    with pytest.raises(TokenizerError) as error:
        ours.encode("a", bos=True)
    assert_one_line(error, "beginning-of-sequence")
    with pytest.raises(TokenizerError):
        ours.with_bos(True)


# ----------------------------------------------------------------------------------------------------------------------
# Broken files and files of other kinds


def edited(content: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with the value at a dotted path replaced."""
    copy: Any = json.loads(json.dumps(content))
    *parents, last = path.split(".")
    inner = copy
    for key in parents:
        inner = inner[key]
    inner[last] = value
    result: dict[str, Any] = copy
    return result


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("model", None, "'model' is missing"),
        ("model.type", "Unigram", "'Unigram'"),
        ("model.dropout", 0.1, "dropout"),
        ("model.continuing_subword_prefix", "##", "continuing_subword_prefix"),
        ("model.vocab", [1], "'vocab'"),
        ("model.vocab.a", "x", "'x'"),
        ("model.vocab.a", 10**9, "gaps"),
        ("model.merges", ["a b c"], "expected two tokens"),
        ("model.merges", [["never", "seen"]], "merge 0"),
        ("model.merges", [7], "form of a tokenizer.json"),
        ("normalizer", {"type": "Lowercase"}, "'Lowercase'"),
        ("pre_tokenizer", {"type": "Whitespace"}, "['Whitespace']"),
        ("pre_tokenizer", None, "byte_fallback"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "add_prefix_space"),
        ("pre_tokenizer.pretokenizers", [{"type": "Punctuation"}, {"type": "ByteLevel"}], "add_prefix_space"),
        ("post_processor", {"type": "RobertaProcessing"}, "'RobertaProcessing'"),
        ("added_tokens", [{"id": 3}], "content"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_one_line(path: str, value: object, part: str, tmp_path: Path) -> None:
    file = saved(qwen2_style(), tmp_path)
    file.write_text(json.dumps(edited(json.loads(file.read_text()), path, value)))
    with pytest.raises(TokenizerError) as error:
        from_tokenizer_json(file)
    assert_one_line(error, str(file), part)


@pytest.mark.parametrize("pattern", [r"[a&&b]", r"^a", r"a$", r"(?<=a)b", r"\h+", r"a{1,2}+", r"(a"])
def test_a_pattern_that_would_be_read_differently_is_refused(pattern: str, tmp_path: Path) -> None:
    file = saved(qwen2_style(), tmp_path)
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    file.write_text(json.dumps(content))
    with pytest.raises(TokenizerError) as error:
        from_tokenizer_json(file)
    assert_one_line(error, "pattern")


BUILDERS: dict[str, Callable[[Path], object]] = {
    "tokenizer.json": from_tokenizer_json,
    "tokenizer.model": sentencepiece,
    "llama3.model": llama3_tiktoken,
    "vocab.json": lambda path: gpt2_bpe(path, path),
}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'{"a": 1', b"\xff\xfe\x00", b"\n\x05abc", b"aGk= x\n"])
def test_a_broken_file_is_one_line_with_its_name(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError) as error:
        BUILDERS[name](path)
    assert_one_line(error, str(path))


def test_broken_merges_are_one_line_with_the_files_name(files: Path, tmp_path: Path) -> None:
    for broken in ("Ġ t\nonly\n", "Ġ t\nzz qq\n"):
        (tmp_path / "merges.txt").write_text(broken)
        with pytest.raises(TokenizerError) as error:
            gpt2_bpe(files / "vocab.json", tmp_path / "merges.txt")
        assert_one_line(error, "merges.txt", "merge 1")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("model", "bert", "'bert'"),
        ("model", None, "model"),
        ("pre", "falcon", "'falcon'"),
        ("tokens", None, "tokens"),
        ("merges", ["a"], "merge 0"),
        ("token_type", [1, 2], "token_type"),
        ("bos_token_id", 50257, "bos_token_id"),
        ("add_bos_token", "yes", "add_bos_token"),
    ],
)
def test_gguf_metadata_of_another_kind_is_one_line(key: str, value: object, part: str) -> None:
    metadata = {**small_metadata("gpt-2"), f"tokenizer.ggml.{key}": value}
    with pytest.raises(TokenizerError) as error:
        from_gguf_metadata(metadata, "model.gguf")
    assert_one_line(error, "model.gguf", part)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [("scores", None, "scores"), ("scores", [0.5], "scores"), ("token_type", [1] * 32000, "unk")],
)
def test_a_gguf_vocabulary_that_makes_no_sentencepiece_model_is_one_line(
    files: Path, key: str, value: object, part: str
) -> None:
    metadata = {**open_gguf(files / "ggml-vocab-llama-spm.gguf").metadata, f"tokenizer.ggml.{key}": value}
    with pytest.raises(TokenizerError) as error:
        from_gguf_metadata(metadata, "model.gguf")
    assert_one_line(error, "model.gguf", part)
