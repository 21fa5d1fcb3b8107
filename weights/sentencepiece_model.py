"""sentencepiece models: encoding with one, and writing one from the vocabulary of a GGUF file.

The format is `ModelProto` of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. The few
fields that encoding needs are written here in protocol-buffer form, so that the `protobuf` package is not needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from sentencepiece import SentencePieceProcessor

SPACE = "▁"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces. GGUF's `tokenizer.ggml.token_type` has the same numbers."""

_VARINT, _LENGTH_DELIMITED, _FLOAT32 = 0, 2, 5
_BPE = 2


def processor_from(model: bytes) -> SentencePieceProcessor:
    """A processor for a serialised model.  Raises ValueError if it is not one."""
    processor = SentencePieceProcessor()
    try:
        loaded = processor.LoadFromSerializedProto(model)
    except (RuntimeError, OSError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not loaded or processor.vocab_size() == 0:
        raise ValueError("it holds no pieces")
    return processor


def bpe_model(
    pieces: Iterable[tuple[str, float, int]], *, space_prefix: bool = True, collapse_spaces: bool = False
) -> bytes:
    """A serialised BPE model with byte fallback and without normalisation of characters.

    pieces: text, score (higher merges first) and type, by id. One of them must be UNKNOWN.
    space_prefix, collapse_spaces: `add_dummy_prefix` and `remove_extra_whitespaces` of the format.
    """
    pieces = list(pieces)
    model = bytearray()
    for text, score, kind in pieces:
        model += _message(1, _text(1, text) + _tag(2, _FLOAT32) + struct.pack("<f", score) + _integer(3, kind))
    has_bytes = any(kind == BYTE for _, _, kind in pieces)
    unknown_id = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), 0)
    trainer = _integer(3, _BPE) + _integer(4, len(pieces)) + _integer(35, has_bytes) + _integer(40, unknown_id)
    # Ids of BOS, EOS and padding: none, they are the caller's.
    trainer += b"".join(_integer(number, -1) for number in (41, 42, 43))
    normalizer = _text(1, "identity") + _integer(3, space_prefix) + _integer(4, collapse_spaces) + _integer(5, True)
    return bytes(model + _message(2, trainer) + _message(3, normalizer))


def piece_bytes(processor: SentencePieceProcessor) -> list[bytes]:
    """What each piece stands for: a byte, a name in angle brackets, or text with spaces for ▁."""
    return [_bytes_of(processor, i) for i in range(processor.vocab_size())]


def _bytes_of(processor: SentencePieceProcessor, token_id: int) -> bytes:
    text: str = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
        return bytes([int(text[1:-1], 16)])
    if processor.is_control(token_id) or processor.is_unknown(token_id):
        return text.encode()
    return text.replace(SPACE, " ").encode()


def puts_space_first(processor: SentencePieceProcessor) -> bool:
    """Whether the model puts a space in front of a text."""
    text: str = processor.normalize("a")
    return text.startswith(SPACE)


def _varint(value: int) -> bytes:
    value %= 2**64
    encoded = bytearray()
    while value >= 128:
        encoded.append(value % 128 + 128)
        value //= 128
    return bytes([*encoded, value])


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _integer(number: int, value: int) -> bytes:
    return _tag(number, _VARINT) + _varint(value)


def _message(number: int, content: bytes) -> bytes:
    return _tag(number, _LENGTH_DELIMITED) + _varint(len(content)) + content


def _text(number: int, text: str) -> bytes:
    return _message(number, text.encode())
