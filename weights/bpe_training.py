"""Learning a byte-level BPE vocabulary in GPT-2's form from a small text.

The rule is Sennrich et al.'s (2016, arXiv 1508.07909) over GPT-2's byte alphabet: count adjacent pairs within words,
merge the most frequent one, repeat. Words are what GPT-2's pattern splits off; for ASCII text the standard library's
`re` says it exactly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

_PATTERN = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", flags=re.ASCII)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order of its vocabulary's first 256 ids."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@dataclass
class LearnedBPE:
    """Merges in the order they were learned, and the ids they give: 256 bytes, one id per merge, the special token."""

    merges: list[tuple[str, str]]
    special: str
    vocab: dict[str, int] = field(init=False)
    _words: dict[str, list[int]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        tokens = [*byte_alphabet().values(), *(left + right for left, right in self.merges), self.special]
        self.vocab = {token: token_id for token_id, token in enumerate(tokens)}

    def encode(self, text: str) -> list[int]:
        """Ids of ASCII text; the special token is not looked for in it."""
        ids: list[int] = []
        for word in _PATTERN.findall(text):
            if word not in self._words:
                self._words[word] = self._encode_word(word)
            ids += self._words[word]
        return ids

    def _encode_word(self, word: str) -> list[int]:
        parts = _characters(word)
        for pair in self.merges:
            parts = _merge(parts, pair)
        return [self.vocab[part] for part in parts]


def learn_bpe(texts: Iterable[str], special: str) -> LearnedBPE:
    """Merge until every word of the ASCII texts is one token; equal counts are taken in alphabetical order."""
    counts = Counter(word for text in texts for word in _PATTERN.findall(text))
    words = [(_characters(word), count) for word, count in sorted(counts.items())]
    merges: list[tuple[str, str]] = []
    while pairs := _count_pairs(words):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [(_merge(parts, best), count) for parts, count in words]
    return LearnedBPE(merges, special)


def _count_pairs(words: list[tuple[list[str], int]]) -> Counter[tuple[str, str]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for parts, count in words:
        for pair in pairwise(parts):
            pairs[pair] += count
    return pairs


def _characters(word: str) -> list[str]:
    alphabet = byte_alphabet()
    return [alphabet[byte] for byte in word.encode()]


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
