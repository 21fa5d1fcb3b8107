"""Byte-pair encoding of a text without special tokens: how it is cut into pieces, and how a piece's symbols are merged.

Both follow Hugging Face's `tokenizers`, whose ids are the reference. `tiktoken` merges the pieces wherever that gives
the same ids. It knows one rank per token, while a list of merges has one rank per pair of tokens; the two agree when
every token has one pair and is what merging makes of its own bytes (`ranks_say_the_same`). Vocabularies that were
learned and never edited are of that kind. For the others (Llama 3's tokenizer.json lists every pair that joins to a
token) the list is followed as it stands.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import regex  # type: ignore[import-untyped]
import tiktoken

from subcircuit.weights.bpe_training import byte_alphabet

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
DIGIT_SPLIT = r"\p{N}"

PairMerges = Mapping[tuple[int, int], tuple[int, int]]
"""Two neighbouring symbols → the rank of their merge (lowest first) and the symbol they become."""

_TO_BYTE = {ord(character): byte for byte, character in byte_alphabet().items()}
_CACHED_PIECES = 2**16
_CACHED_LENGTH = 64


def bytes_of(token: str) -> bytes | None:
    """The bytes that a token of a byte-level vocabulary spells; None if it is not written in GPT-2's alphabet."""
    try:
        return bytes([_TO_BYTE[ord(character)] for character in token])
    except KeyError:
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Cutting text into pieces


class _KnownCharacters(dict[int, int]):
    """A table for `str.translate`: characters that tiktoken's Unicode does not have yet become a noncharacter.

    tiktoken and `tokenizers` read Unicode 16; `regex` is ahead of them and would take newer letters for letters.
    """

    def __init__(self) -> None:
        super().__init__()
        each_byte = {bytes([byte]): byte for byte in range(256)}
        self._assigned = tiktoken.Encoding("assigned", pat_str=r"\P{Cn}", mergeable_ranks=each_byte, special_tokens={})

    def __missing__(self, code: int) -> int:
        self[code] = code if self._assigned.encode_ordinary(chr(code)) else 0xFFFF
        return self[code]


@lru_cache(maxsize=1)
def _known_characters() -> _KnownCharacters:
    return _KnownCharacters()


class Splitter:
    """Cuts text by one pattern after the other: matches become pieces, and so does what lies between them.

    A later pattern sees each piece of the earlier ones as a text of its own.
    """

    def __init__(self, *patterns: str) -> None:
        self._patterns = [regex.compile(pattern) for pattern in patterns]

    def __call__(self, text: str) -> list[str]:
        known = text if text.isascii() else text.translate(_known_characters())
        spans = [(0, len(text))]
        for pattern in self._patterns:
            spans = [span for start, end in spans for span in _cut(pattern, known, start, end)]
        return [text[start:end] for start, end in spans]


def _cut(pattern: regex.Pattern[str], text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    # Lookahead stops at `end`. Lookbehind would see beyond `start`: patterns with it are refused by their reader.
    done = start
    for match in pattern.finditer(text, start, end):
        if match.start() > done:
            yield done, match.start()
        if match.end() > match.start():
            yield match.span()
        done = match.end()
    if done < end:
        yield done, end


# ----------------------------------------------------------------------------------------------------------------------
# Merging


def apply_merges(symbols: Sequence[int], merges: PairMerges) -> list[int]:
    """Merge the pair of lowest rank, the leftmost of equals, until no pair has a merge.

    In O(n log n) for n symbols, as `Word::merge_all` of `tokenizers`: a queued pair counts as long as its place still
    merges to the same symbol.
    """
    merged, n, gone = list(symbols), len(symbols), -1
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    queue: list[tuple[int, int, int]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < n and (found := merges.get((merged[left], merged[right]))) is not None:
            rank, symbol = found
            heapq.heappush(queue, (rank, left, symbol))

    for left in range(n - 1):
        offer(left, left + 1)
    while queue:
        _, left, symbol = heapq.heappop(queue)
        right = after[left]
        if merged[left] == gone or right == n or merges.get((merged[left], merged[right]), (0, gone))[1] != symbol:
            continue
        merged[left], merged[right], after[left] = symbol, gone, after[right]
        if after[left] < n:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [symbol for symbol in merged if symbol != gone]


def ranks_say_the_same(merges: PairMerges) -> bool:
    """Whether ranks of tokens alone reproduce these merges on any text.

    They do when (1) each symbol has one pair, (2) both of its parts are made before it, so that ranks never fall along
    the way, and (3) merging the symbol's own text leads to the symbol: then, wherever its text stands between
    boundaries that no earlier merge has crossed, it has been merged to exactly its two parts when its turn comes. For
    (3) it is enough that no earlier merge crosses the seam between the parts; the loop undoes the merges on both sides
    of the seam, the latest first, and looks at each pair of neighbours that was there.
    """
    parts = {symbol: pair for pair, (_, symbol) in merges.items()}
    rank_of = {symbol: rank for rank, symbol in merges.values()}
    if len(parts) != len(merges):
        return False
    for (left, right), (rank, _) in merges.items():
        rank_left, rank_right = rank_of.get(left, -1), rank_of.get(right, -1)
        if rank_left >= rank or rank_right >= rank:
            return False
        left_until = right_until = rank
        while rank_left >= 0 or rank_right >= 0:
            # Of two equal merges the left one is made first.
            if rank_right >= rank_left:
                right, right_until = parts[right][0], rank_right
                rank_right = rank_of.get(right, -1)
            else:
                left, left_until = parts[left][1], rank_left
                rank_left = rank_of.get(left, -1)
            crossing = merges.get((left, right))
            if crossing is not None and crossing[0] < left_until and crossing[0] <= right_until:
                return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Byte-level BPE


class ByteLevelBPE:
    """Encodes text by merging the bytes of its pieces.

    vocab: id of each token, written in GPT-2's alphabet; tokens written otherwise are never the result of merging.
    merges: pairs of tokens, the most urgent first; their join must be a token too.
    whole_pieces: a piece that is a token is not merged (`ignore_merges` of tokenizer.json).
    unknown_id, fuse_unknown: what a byte without a token becomes, and whether several in a row become one; by default
        such a byte is left out, as the reference does.

    Raises ValueError for a merge that is no pair of tokens or gives none.
    """

    def __init__(
        self,
        splitter: Splitter,
        vocab: Mapping[str, int],
        merges: Iterable[Sequence[str]],
        *,
        whole_pieces: bool = False,
        unknown_id: int | None = None,
        fuse_unknown: bool = False,
    ) -> None:
        spelled = {token: raw for token in vocab if (raw := bytes_of(token)) is not None}
        self.tokens = {raw: vocab[token] for token, raw in spelled.items()}
        self._splitter = splitter
        self._whole_pieces = whole_pieces
        self._unknown_id, self._fuse_unknown = unknown_id, fuse_unknown
        self._merges = pair_merges({token: vocab[token] for token in spelled}, merges)
        self._rank_bpe = _rank_bpe(self.tokens, self._merges) if ranks_say_the_same(self._merges) else None
        self._cached: Callable[[str], list[int]] = lru_cache(_CACHED_PIECES)(self._encode_piece)

    @property
    def engine(self) -> str:
        """What merges: "tiktoken", or "merges" where tiktoken's ranks cannot say what the list of merges says."""
        return "merges" if self._rank_bpe is None else "tiktoken"

    def __call__(self, text: str, _begins: bool = True) -> list[int]:
        """Ids of a text; where in a longer text it stands makes no difference."""
        ids: list[int] = []
        for piece in self._splitter(text):
            ids += self._cached(piece) if len(piece) <= _CACHED_LENGTH else self._encode_piece(piece)
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        raw = piece.encode()
        if self._whole_pieces and raw in self.tokens:
            return [self.tokens[raw]]
        symbols = [self.tokens.get(raw[i : i + 1]) for i in range(len(raw))]
        if self._rank_bpe is not None and None not in symbols:
            return self._rank_bpe(piece)
        return apply_merges(list(self._known(symbols)), self._merges)

    def _known(self, symbols: Iterable[int | None]) -> Iterator[int]:
        was_unknown = False
        for symbol in symbols:
            if symbol is not None:
                yield symbol
            elif self._unknown_id is not None and not (was_unknown and self._fuse_unknown):
                yield self._unknown_id
            was_unknown = symbol is None


def pair_merges(vocab: Mapping[str, int], merges: Iterable[Sequence[str]]) -> dict[tuple[int, int], tuple[int, int]]:
    """Merges of tokens as merges of ids, ranked by their order; a pair that is listed twice has its last rank.

    Raises ValueError for a merge that is no pair of tokens or gives none.
    """
    pairs = {}
    for rank, merge in enumerate(merges):
        if len(merge) != 2:
            raise ValueError(f"merge {rank} is {' '.join(merge)[:40]!r}; expected two tokens")
        left, right = merge
        try:
            pairs[vocab[left], vocab[right]] = rank, vocab[left + right]
        except KeyError as error:
            raise ValueError(f"merge {rank} ({left!r} {right!r}): {error} is no token of the vocabulary") from None
    return pairs


def _rank_bpe(tokens: Mapping[bytes, int], merges: PairMerges) -> Callable[[str], list[int]]:
    """tiktoken over these merges. It takes a token's rank for its id, so ids are looked up afterwards."""
    bytes_by_id = {token_id: token for token, token_id in tokens.items()}
    ranked = [bytes([byte]) for byte in range(256)]
    ranked += [bytes_by_id[symbol] for _, symbol in sorted(merges.values())]
    ids = [tokens.get(token, -1) for token in ranked]
    encode = rank_encoder({token: rank for rank, token in enumerate(ranked)})
    return lambda piece: [ids[rank] for rank in encode(piece)]


def rank_encoder(ranks: Mapping[bytes, int]) -> Callable[[str], list[int]]:
    """tiktoken's merging of one piece by ranks, which must hold every single byte."""
    encoding = tiktoken.Encoding("piece", pat_str=r"[\s\S]+", mergeable_ranks=dict(ranks), special_tokens={})
    return encoding.encode_ordinary
