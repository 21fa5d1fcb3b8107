"""Tokenizers from a model's own files; nothing is downloaded.

One builder per format. Token ids are those of the format's reference: Hugging Face's `tokenizers` for vocab.json with
merges.txt, tokenizer.json and byte-level GGUF files, the `sentencepiece` library for its own models and for GGUF files
made from them, `tiktoken` for Llama 3's tokenizer.model. Where text spells a special token ("<|endoftext|>"), Hugging
Face's tokenizers and llama.cpp parse it as that token, while sentencepiece and Meta's Llama 3 code read it as ordinary
text; each builder does as its reference, and `parse_special` chooses otherwise.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from sentencepiece import SentencePieceProcessor

from subcircuit.engine.errors import TokenizerError
from subcircuit.weights.bpe import (
    DIGIT_SPLIT,
    GPT2_SPLIT,
    LLAMA3_SPLIT,
    QWEN2_SPLIT,
    ByteLevelBPE,
    Splitter,
    rank_encoder,
)
from subcircuit.weights.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    bpe_model,
    piece_bytes,
    processor_from,
    puts_space_first,
)
from subcircuit.weights.text_tokenizer import AddedToken, EncodeText, SpacePrefix, TextTokenizer
from subcircuit.weights.tokenizer_json import read_json, read_tokenizer_json

END_OF_TEXT = "<|endoftext|>"

# `tokenizer.ggml.pre` → the patterns by which llama.cpp cuts text, in turn (llm_tokenizer_bpe in its llama-vocab.cpp).
_LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
GGUF_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), (GPT2_SPLIT,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (DIGIT_SPLIT, GPT2_SPLIT)),
    **dict.fromkeys(_LLAMA3_PRE, (LLAMA3_SPLIT,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), (QWEN2_SPLIT,)),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"),
}

_LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)


def gpt2_bpe(vocab_json: str | Path, merges_txt: str | Path, *, parse_special: bool = True) -> TextTokenizer:
    """GPT-2's byte-level BPE from its two files. <|endoftext|> is both BOS and EOS, and BOS is not added.

    Raises TokenizerError for files that are missing or corrupted.
    """
    vocab_json, merges_txt = Path(vocab_json), Path(merges_txt)
    vocab = read_json(vocab_json)
    for token, token_id in vocab.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < len(vocab):
            raise TokenizerError(f"{vocab_json}: token {token!r} has id {token_id!r}; expected 0 to {len(vocab) - 1}")
    tokens = sorted(vocab, key=vocab.__getitem__)
    if len(set(vocab.values())) < len(vocab) or not vocab:
        raise TokenizerError(
            f"{vocab_json}: {len(vocab)} tokens with {len(set(vocab.values()))} ids; expected one each"
        )
    merges = [line for line in _read_lines(merges_txt) if not line.startswith("#version")]
    table, encode = _byte_level(tokens, merges, (GPT2_SPLIT,), merges_txt)
    end = vocab.get(END_OF_TEXT)
    return TextTokenizer(
        name=f"{encode.engine}/gpt2",
        tokens=table,
        encode_text=encode,
        added=() if end is None else (AddedToken(END_OF_TEXT, end),),
        bos_id=end,
        eos_id=end,
        adds_bos=False,
        parse_special=parse_special,
    )


def from_tokenizer_json(path: str | Path, *, parse_special: bool = True) -> TextTokenizer:
    """A tokenizer.json of `tokenizers` that holds a BPE model.

    It is byte-level, as for GPT-2, SmolLM2, Qwen2 and Llama 3, or one with ▁ and byte fallback, as for Llama 2,
    TinyLlama and Mistral. BOS is added if `add_bos_token` of the tokenizer_config.json beside it says so, or, where
    that is silent, the post_processor.

    Raises TokenizerError for a file that is missing, corrupted, or of another kind (it names what was found).
    """
    return read_tokenizer_json(Path(path), parse_special=parse_special)


def from_gguf_metadata(
    metadata: Mapping[str, object], where: str | Path = "GGUF metadata", *, parse_special: bool = True
) -> TextTokenizer:
    """The tokenizer in a GGUF file's metadata, given as plain Python values by key; `where` names the file in errors.

    `tokenizer.ggml.model` is "gpt2" (byte-level BPE, cut up as `tokenizer.ggml.pre` says) or "llama" (sentencepiece).
    BOS is added if `tokenizer.ggml.add_bos_token` says so; where it is silent, llama.cpp's rule holds: yes for
    sentencepiece and Llama 3, otherwise no.

    Raises TokenizerError for metadata that is missing, contradictory or of another kind (it names what was found).
    """
    fields = _Fields(metadata, where)
    model, pre = fields.text("model"), fields.text("pre", "default")
    tokens = fields.strings("tokens")
    kinds = fields.kinds(len(tokens))
    encode_text: EncodeText
    prefix: SpacePrefix = "never"
    if model == "gpt2":
        if pre not in GGUF_SPLITS:
            fields.fail(f"tokenizer.ggml.pre {pre!r} is not supported; expected one of {', '.join(GGUF_SPLITS)}")
        whole_pieces = pre in _LLAMA3_PRE
        table, bpe = _byte_level(tokens, fields.strings("merges"), GGUF_SPLITS[pre], where, whole_pieces)
        name, encode_text, looked_for = f"{bpe.engine}/{pre}", bpe, (CONTROL, USER_DEFINED)
    elif model == "llama":
        serialized = bpe_model(
            zip(tokens, fields.scores(len(tokens)), kinds, strict=True),
            space_prefix=fields.flag("add_space_prefix", True),
            collapse_spaces=fields.flag("remove_extra_whitespaces", False),
        )
        table, encode_text, prefix = _sentencepiece(_processor(serialized, where))
        # User-defined pieces are sentencepiece's own business.
        name, looked_for = "sentencepiece/llama", (CONTROL, UNKNOWN)
    else:
        fields.fail(f"tokenizer.ggml.model {model!r} is not supported; expected 'gpt2' or 'llama'")
    bos_id = fields.token_id("bos_token_id", len(tokens))
    return TextTokenizer(
        name=name,
        tokens=table,
        encode_text=encode_text,
        added=tuple(
            AddedToken(tokens[i], i, special=kind != USER_DEFINED) for i, kind in enumerate(kinds) if kind in looked_for
        ),
        bos_id=bos_id,
        eos_id=fields.token_id("eos_token_id", len(tokens)),
        adds_bos=fields.flag("add_bos_token", bos_id is not None and (model == "llama" or pre in _LLAMA3_PRE)),
        parse_special=parse_special,
        space_prefix=prefix,
    )


def llama3_tiktoken(path: str | Path, *, parse_special: bool = False) -> TextTokenizer:
    """Llama 3's tokenizer.model: a line per token, its bytes in base64 and its rank; 256 special tokens follow them.

    BOS (<|begin_of_text|>) is added; EOS is <|end_of_text|>.

    Raises TokenizerError for a file that is missing or corrupted.
    """
    path = Path(path)
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except ValueError:
            raise TokenizerError(f"{path}: line {number} is {line[:40]!r}; expected base64 and a rank") from None
    n_base = len(ranks)
    if sorted(ranks.values()) != list(range(n_base)) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"{path}: {n_base} tokens; expected ranks 0, 1, 2, … and a token for every byte")
    split, merge = Splitter(LLAMA3_SPLIT), rank_encoder(ranks)
    return TextTokenizer(
        name="tiktoken/llama3",
        tokens=[*sorted(ranks, key=ranks.__getitem__), *(text.encode() for text in _LLAMA3_SPECIAL)],
        encode_text=lambda text, _: [token_id for piece in split(text) for token_id in merge(piece)],
        added=tuple(AddedToken(text, n_base + i) for i, text in enumerate(_LLAMA3_SPECIAL)),
        bos_id=n_base,
        eos_id=n_base + 1,
        adds_bos=True,
        parse_special=parse_special,
    )


def sentencepiece(path: str | Path, *, parse_special: bool = False) -> TextTokenizer:
    """A sentencepiece model file (Llama 1 and 2, Mistral, llama2.c). BOS is added where the model has one.

    Raises TokenizerError for a file that is missing or corrupted.
    """
    path = Path(path)
    try:
        serialized = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from None
    processor = _processor(serialized, path)
    table, encode_text, prefix = _sentencepiece(processor)
    special = (i for i in range(len(table)) if processor.is_control(i) or processor.is_unknown(i))
    bos_id, eos_id = (i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id()))
    return TextTokenizer(
        name=f"sentencepiece/{path.stem}",
        tokens=table,
        encode_text=encode_text,
        added=tuple(AddedToken(processor.id_to_piece(i), i) for i in special),
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=bos_id is not None,
        parse_special=parse_special,
        space_prefix=prefix,
    )


def _byte_level(
    tokens: Sequence[str],
    merges: Sequence[str],
    patterns: Sequence[str],
    where: str | Path,
    whole_pieces: bool = False,
) -> tuple[list[bytes], ByteLevelBPE]:
    """The bytes of each token and the encoder of a byte-level BPE, from merges in the form "left right"."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [merge.split(" ") for merge in merges]
    try:
        encode = ByteLevelBPE(Splitter(*patterns), vocab, pairs, whole_pieces=whole_pieces)
    except ValueError as error:
        raise TokenizerError(f"{where}: {error}") from None
    table = [token.encode() for token in tokens]
    for raw, i in encode.tokens.items():
        table[i] = raw
    return table, encode


def _processor(serialized: bytes, where: str | Path) -> SentencePieceProcessor:
    try:
        return processor_from(serialized)
    except ValueError as error:
        raise TokenizerError(f"{where}: not a sentencepiece model ({error})") from None


def _sentencepiece(processor: SentencePieceProcessor) -> tuple[list[bytes], EncodeText, SpacePrefix]:
    def encode(text: str, _: bool) -> list[int]:
        ids: list[int] = processor.encode(text)
        return ids

    return piece_bytes(processor), encode, "always" if puts_space_first(processor) else "never"


def _read_lines(path: Path) -> list[str]:
    """A file's lines, which end in a newline only (a vocabulary may hold other characters that separate lines)."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: byte {error.start} is not UTF-8") from None
    return [line.rstrip("\r") for line in lines if line.strip()]


class _Fields:
    """The `tokenizer.ggml.…` part of a GGUF file's metadata, read with types checked."""

    def __init__(self, metadata: Mapping[str, object], where: str | Path) -> None:
        self.metadata = metadata
        self.where = where

    def fail(self, message: str) -> NoReturn:
        raise TokenizerError(f"{self.where}: {message}")

    def get(self, key: str) -> object:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str, default: str | None = None) -> str:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, str):
            self.fail(f"tokenizer.ggml.{key} is {value!r}; expected a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, bool):
            self.fail(f"tokenizer.ggml.{key} is {value!r}; expected true or false")
        return value

    def token_id(self, key: str, n_tokens: int) -> int | None:
        value = self.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n_tokens):
            self.fail(f"tokenizer.ggml.{key} is {value!r}; expected 0 to {n_tokens - 1}")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.get(key)
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            self.fail(f"tokenizer.ggml.{key} is missing or no list of strings")
        return values

    def scores(self, n_tokens: int) -> list[float]:
        values = self.get("scores")
        if not isinstance(values, list) or not all(isinstance(value, float) for value in values):
            self.fail("tokenizer.ggml.scores is missing or no list of numbers")
        if len(values) != n_tokens:
            self.fail(f"tokenizer.ggml.scores has {len(values)} entries for {n_tokens} tokens")
        return values

    def kinds(self, n_tokens: int) -> list[int]:
        """Each token's type; without the key every token is an ordinary one."""
        values = self.get("token_type")
        if values is None:
            return [NORMAL] * n_tokens
        if not isinstance(values, list) or len(values) != n_tokens or any(value not in range(1, 7) for value in values):
            self.fail(f"tokenizer.ggml.token_type is no list of {n_tokens} numbers from 1 to 6")
        return values
