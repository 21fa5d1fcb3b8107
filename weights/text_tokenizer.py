"""The tokenizer object that every format ends in: special tokens, the BOS rule and decoding around one text encoder."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import regex  # type: ignore[import-untyped]

from subcircuit.engine.errors import TokenizerError

SpacePrefix = Literal["never", "always", "first"]
"""Which stretches of text between special tokens get a space in front: none, each one, or one that begins the text."""

EncodeText = Callable[[str, bool], list[int]]
"""Ids of a stretch of text without special tokens; the flag says whether it begins the whole text."""

# `\w` as the `regex` crate of Rust has it.
_WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"
_ENDS_IN_WORD = regex.compile(_WORD + r"\Z")
_BEGINS_WITH_WORD = regex.compile(_WORD)
_SPACES = regex.compile(r"\s*")
_SPACES_AT_END = regex.compile(r"\s*\Z")


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in the text before anything else, as in tokenizer.json's `added_tokens`.

    special: control tokens such as <|endoftext|>, in contrast to mere additions to the vocabulary.
    single_word: it counts only where no letter, digit or underscore touches it.
    lstrip, rstrip: it takes in the white space before or after it.
    normalized: it is looked for after normalising the text, in its own normalised form.
    """

    text: str
    id: int
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class TokenFinder:
    """Finds tokens in a text, the leftmost first and of those at one place the longest."""

    def __init__(self, tokens: Iterable[AddedToken], normalize: Callable[[str], str] = str) -> None:
        self._tokens = {normalize(token.text): token for token in tokens if token.text}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """The text's parts in order: tokens, and the non-empty stretches between them."""
        done = 0
        for match in self._pattern.finditer(text) if self._tokens else ():
            token, (start, end) = self._tokens[match.group()], match.span()
            if token.single_word and (_ENDS_IN_WORD.search(text[:start]) or _BEGINS_WITH_WORD.match(text[end:])):
                continue
            if token.lstrip:
                start = max(done, _SPACES_AT_END.search(text[:start]).start())
            if token.rstrip:
                end = _SPACES.match(text, end).end()
            if start > done:
                yield text[done:start]
            yield token
            done = end
        if done < len(text):
            yield text[done:]


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer built from a model's own files; see `subcircuit.weights.tokenizers` for the builders.

    name: what encodes, and for which vocabulary: "tiktoken/gpt2".
    tokens: the bytes of each token by id; None where no token has that id.
    encode_text: ids of text in which no special token is looked for.
    added: tokens that are looked for in the text first.
    adds_bos: whether `encode` puts `bos_id` first when it is not told.
    parse_special: whether the text "<|endoftext|>" is that token, as in Hugging Face's tokenizers, or ordinary text.
        (Added tokens that are not special are looked for in both cases.)
    normalize: applied to the text between special tokens.
    space_prefix: where `encode_text` puts a space in front, so that `decode` takes it away again.
    """

    name: str
    tokens: Sequence[bytes | None] = field(repr=False)
    encode_text: EncodeText = field(repr=False)
    added: tuple[AddedToken, ...] = field(default=(), repr=False)
    bos_id: int | None = None
    eos_id: int | None = None
    adds_bos: bool = False
    parse_special: bool = True
    normalize: Callable[[str], str] = field(default=str, repr=False)
    space_prefix: SpacePrefix = "never"
    _find_first: TokenFinder = field(init=False, repr=False, compare=False)
    _find_normalized: TokenFinder = field(init=False, repr=False, compare=False)
    _added_text: dict[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.adds_bos and self.bos_id is None:
            raise TokenizerError(f"tokenizer {self.name} has no beginning-of-sequence token to add")
        looked_for = [token for token in self.added if self.parse_special or not token.special]
        raw = TokenFinder(token for token in looked_for if not token.normalized)
        normalized = TokenFinder((token for token in looked_for if token.normalized), self.normalize)
        object.__setattr__(self, "_find_first", raw)
        object.__setattr__(self, "_find_normalized", normalized)
        object.__setattr__(self, "_added_text", {token.id: token.text for token in self.added})

    @property
    def n_vocab(self) -> int:
        """The number of ids, from 0 on. A model may have more rows in its embedding: padding that no text reaches."""
        return len(self.tokens)

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Token ids of a text; an empty text has none but a possible BOS.

        bos: put `bos_id` first; None follows the tokenizer's own rule, `adds_bos`. An end-of-sequence token is never
        added, whatever the file says: prompts are there to be continued.

        Raises TokenizerError for what is no text, and for bos=True where the tokenizer has no such token.
        """
        _check_text(text)
        with_bos = self.adds_bos if bos is None else bos
        if with_bos and self.bos_id is None:
            raise TokenizerError(
                f"tokenizer {self.name} has no beginning-of-sequence token; expected bos=False or None"
            )
        ids = [self.bos_id] if with_bos and self.bos_id is not None else []
        begins = True
        for part in self._find_first.split(text):
            for piece in (part,) if isinstance(part, AddedToken) else self._find_normalized.split(self.normalize(part)):
                ids += [piece.id] if isinstance(piece, AddedToken) else self.encode_text(piece, begins)
                begins = False
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, every one of them: special tokens, BOS too, appear as their own text.

        It undoes `encode(…, bos=False)`, up to the tokenizer's normalisation. A space that encoding puts in front of a
        text (sentencepiece does) is taken away, so the continuation of a text loses one there: decode it together with
        the text. Bytes that are no UTF-8 become U+FFFD.

        Raises TokenizerError for an id outside the vocabulary.
        """
        text, pending, begins = [], bytearray(), True
        for token_id in map(operator.index, ids):
            if token_id in self._added_text:
                text += [self._text_of(pending, begins), self._added_text[token_id]]
                pending, begins = bytearray(), False
            else:
                pending += self.token_bytes(token_id)
        return "".join([*text, self._text_of(pending, begins)])

    def _text_of(self, raw: bytearray, begins: bool) -> str:
        text = raw.decode("utf-8", errors="replace")
        prefixed = self.space_prefix == "always" or (self.space_prefix == "first" and begins)
        return text.removeprefix(" ") if prefixed else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for: for a special token its name, for sentencepiece's ▁ a space.

        Raises TokenizerError for an id outside the vocabulary.
        """
        token = self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None
        if token is None:
            raise TokenizerError(
                f"token id {token_id} is not in the vocabulary of {self.name}; expected 0 to {self.n_vocab - 1}"
            )
        return token

    def single_token(self, text: str) -> int | None:
        """The id of the one token that the text is, without BOS; None if it is more tokens or none."""
        ids = self.encode(text, bos=False)
        return ids[0] if len(ids) == 1 else None

    def with_bos(self, rule: bool | None) -> TextTokenizer:
        """A copy that adds BOS (True) or does not (False) when `encode` is not told; None leaves the rule as it is.

        Raises TokenizerError for True where the tokenizer has no such token.
        """
        return self if rule is None else replace(self, adds_bos=rule)

    def describe(self) -> str:
        """One line: kind, vocabulary, BOS rule, special tokens."""
        if self.bos_id is None:
            bos = "no BOS token"
        else:
            token = self.token_bytes(self.bos_id).decode("utf-8", errors="replace")
            bos = f"BOS {token} ({self.bos_id}) {'added' if self.adds_bos else 'not added'} unless asked otherwise"
        special = (
            "special tokens in a text are parsed" if self.parse_special else "special tokens in a text are plain text"
        )
        return f"{self.name}, {self.n_vocab} tokens, {bos}, {special}"


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"the text to encode is {type(text).__name__}; expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has half a surrogate pair at character {error.start}; expected Unicode text"
        ) from None
