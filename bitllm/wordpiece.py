"""What tokenizers are trained on, and the seed guide's kind, the same for the same text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from bitllm_core import END_OF_TEXT

# characters after which a word is cut for training, and of such text: in DNA, each word is new
LONG_WORD, LONG_WORDS_CHARS = 64, 2_000_000
SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", END_OF_TEXT]


def bounded_words(texts: Iterable[str]) -> Iterator[str]:
    """`texts`, cut inside long words; beyond LONG_WORDS_CHARS of them, without those."""
    long, left = re.compile(rf"(\S{{{LONG_WORD}}})(?=\S)"), LONG_WORDS_CHARS
    size = 1 << 17  # the library collects 256 texts
    for text in (part[at : at + size] for part in texts for at in range(0, len(part), size)):
        parts = long.sub("\\1\0", text).split("\0")
        left -= LONG_WORD * (len(parts) - 1)
        yield from parts if left > 0 else [re.sub(rf"\S{{{LONG_WORD},}}", " ", text)]


def train_word_pieces(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a WordPiece tokenizers.Tokenizer of at most `vocab_size` tokens; keeps all the texts.

    The library numbers the pieces that continue a word (##a) in the order of a random hash, and
    numbers decide between pairs that are equally frequent. Here they are numbered before, as if
    they were special; and no more characters are learned, alone and in a word, than there is room
    for: the most frequent ones.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts, counts = list(texts), Counter()
    for text in texts:
        counts.update(text)
    by_count = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(by_count[: (vocab_size - len(SPECIAL)) // 2])
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[*SPECIAL, *alphabet, *(f"##{character}" for character in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    trained.train_from_iterator(texts, trainer=trainer)
    vocab = trained.get_vocab(with_added_tokens=False)
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer
