"""The seed guide's kind of tokenizer, but the same one for the same text each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


def train_word_pieces(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> Any:
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
    alphabet = sorted(by_count[: (vocab_size - len(special)) // 2])
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[*special, *alphabet, *(f"##{character}" for character in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    trained.train_from_iterator(texts, trainer=trainer)
    vocab = trained.get_vocab(with_added_tokens=False)
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(special))
    return tokenizer
