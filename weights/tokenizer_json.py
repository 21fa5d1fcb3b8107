"""Reading Hugging Face's tokenizer.json: byte-pair encodings, byte-level or in sentencepiece's manner.

The file describes a pipeline: added tokens → normalizer → pre_tokenizer → model → post_processor. Each step is rebuilt
where we know it to the letter, and refused by name where we do not.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from subcircuit.engine.errors import TokenizerError
from subcircuit.weights.bpe import (
    DIGIT_SPLIT,
    GPT2_SPLIT,
    ByteLevelBPE,
    PairMerges,
    Splitter,
    apply_merges,
    pair_merges,
)
from subcircuit.weights.sentencepiece_model import SPACE
from subcircuit.weights.text_tokenizer import AddedToken, EncodeText, SpacePrefix, TextTokenizer

Json = dict[str, Any]

# What Oniguruma, which reads the patterns in `tokenizers`, and the `regex` package read differently, and lookbehind.
_PATTERN_REFUSED = re.compile(r"&&|\[\[|\\[hHRXKGOyYzZA]|(?<![\[\\])\^|(?<!\\)\$|\(\?<|\(\?[a-hj-z]|\{\d+(,\d*)?\}\+")
# `tokenizers` normalises by Unicode 9: these characters, which reorder or compose since then, do neither to it.
_LATER_THAN_UNICODE_9 = re.compile(
    "(["
    "\u05c8-\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa"
    "\ua82c\U000105c0-\U000105ff\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab-\U00010eac"
    "\U00010ecb-\U00010ecf\U00010ef0-\U00010efb\U00010efd-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85"
    "\U00011070\U0001133b\U00011380-\U000113ff\U0001145e\U00011839-\U0001183a\U00011930-\U0001193f\U00011943"
    "\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42\U00011d44-\U00011d45\U00011d97\U00011f41-\U00011f42"
    "\U00016100-\U0001613f\U00016d40-\U00016d7f\U00016ff0-\U00016ff1\U0001d127-\U0001d128\U0001d250-\U0001d252"
    "\U0001d25b-\U0001d25c\U0001d25f\U0001d280-\U0001d281\U0001e08f\U0001e130-\U0001e136\U0001e2ae"
    "\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef\U0001e5ee-\U0001e5ef\U0001e6e3\U0001e6e6\U0001e6ee-\U0001e6ef"
    "\U0001e6f5"
    "])"
)
_BYTE_NAMES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def read_json(path: Path) -> Json:
    """The object in a JSON file.  Raises TokenizerError if it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise TokenizerError(f"{path}: not valid JSON (nested too deeply)") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_tokenizer_json(path: Path, *, parse_special: bool) -> TextTokenizer:
    """The tokenizer of the file, with BOS and EOS as tokenizer_config.json beside it names them."""
    reader = _Reader(path, read_json(path))
    try:
        return reader.tokenizer(parse_special)
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise TokenizerError(f"{path}: not the form of a tokenizer.json ({type(error).__name__}: {error})") from None


class _Model(NamedTuple):
    """The part between normalizer and post_processor: bytes of each id, encoder, what merges, where a space is put."""

    tokens: dict[int, bytes]
    encode: EncodeText
    engine: str
    space_prefix: SpacePrefix


class _Reader:
    def __init__(self, path: Path, content: Json) -> None:
        self.path = path
        self.content = content
        self.model: Json = (
            content["model"] if isinstance(content.get("model"), dict) else self.fail("'model' is missing")
        )

    def fail(self, message: str) -> NoReturn:
        raise TokenizerError(f"{self.path}: {message}")

    def tokenizer(self, parse_special: bool) -> TextTokenizer:
        self.check_model()
        vocab: dict[str, int] = self.model["vocab"]
        added = tuple(_added_token(entry) for entry in self.content.get("added_tokens") or ())
        names = vocab | {token.text: token.id for token in added}
        bos_id, eos_id, adds_bos = self.bos_rule(names)
        steps = _flat(self.content.get("pre_tokenizer"), "pretokenizers")
        build = self.byte_level if any(step["type"] == "ByteLevel" for step in steps) else self.sentencepiece_like
        model = build(steps, vocab)
        return TextTokenizer(
            name=f"{model.engine}/{self.path.resolve().parent.name}",
            tokens=self.table(model.tokens, added),
            encode_text=model.encode,
            added=added,
            bos_id=bos_id,
            eos_id=eos_id,
            adds_bos=adds_bos,
            parse_special=parse_special,
            normalize=self.normalizer(),
            space_prefix=model.space_prefix,
        )

    def check_model(self) -> None:
        model = self.model
        kind = model.get("type", "BPE" if "merges" in model else "unknown")
        if kind != "BPE":
            self.fail(f"model type {kind!r} is not supported; expected 'BPE'")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                self.fail(f"{key} {model[key]!r} of the BPE model is not supported")
        if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
            self.fail("the BPE model has no 'vocab' or no 'merges'")
        for token, token_id in model["vocab"].items():
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
                self.fail(f"token {token!r} has id {token_id!r}; expected a non-negative integer")

    def merges(self) -> list[Sequence[str]]:
        return [merge.split(" ") if isinstance(merge, str) else merge for merge in self.model["merges"]]

    def table(self, tokens: Mapping[int, bytes], added: tuple[AddedToken, ...]) -> list[bytes | None]:
        named = {**tokens, **{token.id: token.text.encode() for token in added}}
        if not named or max(named) >= 4 * len(named) + 2**16:
            self.fail(f"{len(named)} tokens with ids up to {max(named, default=0)}; expected ids without large gaps")
        return [named.get(token_id) for token_id in range(max(named) + 1)]

    # ------------------------------------------------------------------------------------------------------------------
    # The two kinds of models

    def byte_level(self, steps: list[Json], vocab: dict[str, int]) -> _Model:
        *splits, last = steps
        kinds = [step["type"] for step in steps]
        if kinds.index("ByteLevel") != len(splits):
            self.fail(f"pre_tokenizer {kinds} is not supported; expected one ByteLevel, at the end")
        if last.get("add_prefix_space", True):
            self.fail("pre_tokenizer ByteLevel with add_prefix_space is not supported")
        if self.model.get("byte_fallback"):
            self.fail("byte_fallback in a byte-level model is not supported")
        patterns = [self.pattern(step) for step in splits] + [GPT2_SPLIT] * last.get("use_regex", True)
        unknown = self.model.get("unk_token")
        encode = ByteLevelBPE(
            Splitter(*patterns),
            vocab,
            self.merges(),
            whole_pieces=bool(self.model.get("ignore_merges")),
            unknown_id=None if unknown is None else vocab[unknown],
            fuse_unknown=bool(self.model.get("fuse_unk")),
        )
        tokens = {token_id: token.encode() for token, token_id in vocab.items()}
        tokens |= {token_id: raw for raw, token_id in encode.tokens.items()}
        return _Model(tokens, encode, encode.engine, "never")

    def pattern(self, step: Json) -> str:
        if step["type"] == "Digits":
            return DIGIT_SPLIT if step["individual_digits"] else DIGIT_SPLIT + "+"
        if step["type"] != "Split":
            self.fail(f"pre_tokenizer {step['type']!r} before ByteLevel is not supported; expected Split or Digits")
        if step["behavior"] != "Isolated":
            self.fail(f"pre_tokenizer Split with behavior {step['behavior']!r} is not supported; expected 'Isolated'")
        literal = step["pattern"].get("String")
        pattern = str(step["pattern"]["Regex"]) if literal is None else re.escape(str(literal))
        try:
            Splitter(pattern)
        except Exception:  # `regex` has its own error and raises others too
            self.fail(f"pre_tokenizer pattern {pattern!r} is not a regular expression")
        if literal is None and _PATTERN_REFUSED.search(pattern):
            self.fail(f"pre_tokenizer pattern {pattern!r} uses syntax that is not supported")
        return pattern

    def sentencepiece_like(self, steps: list[Json], vocab: dict[str, int]) -> _Model:
        kinds = [step["type"] for step in steps]
        if kinds not in ([], ["Metaspace"]):
            self.fail(f"pre_tokenizer {kinds} is not supported; expected ByteLevel or Metaspace")
        if not self.model.get("byte_fallback") or any(name not in vocab for name in _BYTE_NAMES):
            self.fail("a BPE model without ByteLevel pre_tokenizer and without byte_fallback tokens is not supported")
        if self.model.get("ignore_merges"):
            self.fail("ignore_merges in a sentencepiece-style model is not supported")
        step = steps[0] if steps else None
        scheme: SpacePrefix = _prefix_scheme(step) if step else "never"
        merges = pair_merges(vocab, self.merges())
        encode = partial(_encode_characters, vocab=vocab, merges=merges, step=step, scheme=scheme)
        tokens = {token_id: token.replace(SPACE, " ").encode() for token, token_id in vocab.items()}
        tokens |= {vocab[name]: bytes([byte]) for byte, name in enumerate(_BYTE_NAMES)}
        prepends = any(each["type"] == "Prepend" for each in self.normalizer_steps())
        return _Model(tokens, encode, "merges", "always" if prepends else scheme)

    # ------------------------------------------------------------------------------------------------------------------
    # Around the model

    def normalizer_steps(self) -> list[Json]:
        return _flat(self.content.get("normalizer"), "normalizers")

    def normalizer(self) -> Callable[[str], str]:
        steps = [self.normalizer_step(step) for step in self.normalizer_steps()]
        return partial(reduce, lambda text, step: step(text), steps) if steps else str

    def normalizer_step(self, step: Json) -> Callable[[str], str]:
        kind = step["type"]
        if kind == "NFC":
            return _nfc
        if kind == "Prepend":
            return lambda text: step["prepend"] + text if text else text
        if kind != "Replace" or "String" not in step["pattern"]:
            self.fail(f"normalizer {kind!r} is not supported; expected NFC, Prepend, or Replace of a string")
        return lambda text: text.replace(step["pattern"]["String"], step["content"])

    def bos_rule(self, names: Mapping[str, int]) -> tuple[int | None, int | None, bool]:
        """Ids of BOS and EOS, and whether BOS is added: as `add_bos_token` says or else the post_processor."""
        config = self.beside("tokenizer_config.json")
        named = {**self.beside("special_tokens_map.json"), **config}
        bos_id, eos_id = (_named_id(named.get(key), names) for key in ("bos_token", "eos_token"))
        first = self.template_bos()
        adds_bos = config.get("add_bos_token")
        if isinstance(adds_bos, bool):
            bos_id = first if bos_id is None else bos_id
            return bos_id, eos_id, adds_bos and bos_id is not None
        return (bos_id if first is None else first), eos_id, first is not None

    def beside(self, name: str) -> Json:
        path = self.path.with_name(name)
        return read_json(path) if path.is_file() else {}

    def template_bos(self) -> int | None:
        """The id that the post_processor puts before a text."""
        first: list[int] = []
        for step in _flat(self.content.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing":
                for part in step["single"]:
                    if "Sequence" in part:
                        break
                    first += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            elif step["type"] != "ByteLevel":
                self.fail(f"post_processor {step['type']!r} is not supported; expected TemplateProcessing")
        if len(first) > 1:
            self.fail(f"post_processor puts the tokens {first} before a text; expected at most one")
        return first[0] if first else None


def _flat(step: Json | None, inner: str) -> list[Json]:
    """A step of the pipeline as a list: none, itself, or a sequence's members."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [each for part in step[inner] for each in _flat(part, inner)]


def _nfc(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", part) for part in _LATER_THAN_UNICODE_9.split(text))


def _added_token(entry: Json) -> AddedToken:
    flags = {key: bool(entry.get(key, False)) for key in ("special", "single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(entry["content"], int(entry["id"]), **flags)


def _named_id(token: str | Json | None, names: Mapping[str, int]) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return names.get(text) if isinstance(text, str) else None


def _prefix_scheme(step: Json) -> SpacePrefix:
    scheme: SpacePrefix = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    return scheme


def _encode_characters(
    text: str, begins: bool, *, vocab: Mapping[str, int], merges: PairMerges, step: Json | None, scheme: SpacePrefix
) -> list[int]:
    """Ids of a normalised text whose characters are merged; a character without a token falls back to its bytes."""
    pieces = [text]
    if step is not None:
        space = step["replacement"]
        text = text.replace(" ", space)
        if (scheme == "always" or (scheme == "first" and begins)) and not text.startswith(space):
            text = space + text
        pieces = re.split(f"(?={re.escape(space)})", text) if step.get("split", True) else [text]
    ids = []
    for piece in pieces:
        symbols: list[int] = []
        for character in piece:
            token_id = vocab.get(character)
            symbols += [token_id] if token_id is not None else [vocab[_BYTE_NAMES[byte]] for byte in character.encode()]
        ids += apply_merges(symbols, merges)
    return ids
