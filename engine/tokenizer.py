"""What the engine asks of a tokenizer. The tokenizers themselves are built in `subcircuit.weights`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to ids and back, with a stated rule about the beginning-of-sequence token."""

    @property
    def name(self) -> str: ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` puts `bos_id` first when it is not told."""
        ...

    def encode(self, text: str, bos: bool | None = None) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...
