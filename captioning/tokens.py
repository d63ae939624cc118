"""How many tokens a text encoder reads of a caption, by its real tokenizer.

Text in, a count out. CLIP's tokenizer is shipped; any other comes by path or hub id.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from captioning.errors import UserError

CLIP = "clip"
CLIP_TOKENIZER = Path(__file__).parent / "tokenizers" / "clip"
TOKENIZER_FILE = "tokenizer.json"
COUNTED_TEXTS = 100_000  # kept in memory per encoder: words for CLIP, whole captions for others


class Encoder:
    """A tokenizer, counting. `limit` is how many tokens fit, start and end tokens left out."""

    def __init__(self, source: str, tokenizer: Any, limit: int, by_word: bool) -> None:
        """`by_word`: its tokens never cross a space, so that words can be counted alone."""
        self.source, self.limit, self._by_word = source, limit, by_word
        self._tokenizer = tokenizer
        self._counted = lru_cache(COUNTED_TEXTS)(self._tokens)

    def count(self, text: str) -> int:
        """Tokens of `text`, start and end tokens left out."""
        if not self._by_word:
            return self._counted(text)
        return sum(map(self._counted, text.split(" ")))

    def fits(self, text: str) -> bool:
        """Whether the whole text is read."""
        return self.count(text) <= self.limit

    def _tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=8)
def load_encoder(source: str = CLIP, limit: int | None = None) -> Encoder:
    """The tokenizer `clip`, or of a folder or hub id, with its limit unless one is given.

    A folder's or a hub model's own limit is its `model_max_length`. Raises UserError when there is
    no tokenizer, or none of both says how long a text may be.
    """
    if source == CLIP:
        return Encoder(source, _read_file(CLIP_TOKENIZER), limit or CLIP_LIMIT, by_word=True)
    tokenizer, own_limit = _of_transformers(source)
    if limit is None and own_limit is None:
        raise UserError(
            f"encoder {source}",
            "its tokenizer does not say how long a text may be",
            "set rules.max_tokens to what your trainer reads, such as 512 for T5",
        )
    return Encoder(source, tokenizer, limit or own_limit or 0, by_word=False)


# 77 places, less one for the start and one for the end token.
CLIP_LIMIT = 75
# transformers writes 1e30 for "no limit".
_UNLIMITED = 1_000_000


def _read_file(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / TOKENIZER_FILE))


def _of_transformers(source: str) -> tuple[Any, int | None]:
    """(the Rust tokenizer, its own limit) of a folder or hub id."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(source)
        tokenizer = loaded.backend_tokenizer
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"encoder {source}",
            f"no tokenizer ({first_line})",
            "set rules.encoder to `clip`, or to a folder or hub id with a tokenizer.json",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    longest = int(loaded.model_max_length)
    added = tokenizer.num_special_tokens_to_add(False)
    return tokenizer, None if longest >= _UNLIMITED else longest - added
