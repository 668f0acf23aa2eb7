"""Small tokenizers of the kinds that published models have, made here: none is shipped."""

import itertools
import json
import string
from pydoc_data.topics import topics

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tests.export.difficult import PARTS

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def texts():
    """English with code, and every difficult part often enough to be learned in places."""
    return [topics[name] for name in sorted(topics)[:20]] + [" ".join(PARTS).replace("\0", "")] * 3


def byte_level(vocab_size, special, steps, ignore_merges=False, normalizer=None, texts=texts):
    """Byte-level BPE whose words the pre-tokenizers `steps` make."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return tokenizer


def split(pattern):
    """Words by a regular expression, then bytes, as the tokenizers after GPT-2 do."""
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def gpt_2(vocab_size=600):
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return byte_level(vocab_size, ["<|endoftext|>"], steps)


def llama_3(vocab_size=600):
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    return byte_level(vocab_size, special, split(LLAMA_3), ignore_merges=True)


def dbrx(vocab_size=600):
    return byte_level(vocab_size, ["<|endoftext|>"], split(LLAMA_3))


def qwen_2(vocab_size=600):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(vocab_size, special, split(QWEN_2), normalizer=normalizers.NFC())


def smollm(vocab_size=600):
    digits = pre_tokenizers.Digits(individual_digits=True)
    steps = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return byte_level(vocab_size, ["<|endoftext|>"], steps)


def byte_fallback(vocab_size=900, prepend=False, complete=True):
    """BPE whose unknown characters are bytes, as Llama 2's and Gemma's.

    complete: with every merge that makes a token, as the converters of SentencePiece write them;
        otherwise with those that `tokenizers` has learned, one for each token.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", *BYTES],
        limit_alphabet=200,
        show_progress=False,
    )
    words = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.pre_tokenizer = words  # to learn words, not lines; it is not in what they publish
    tokenizer.train_from_iterator([t.replace("\n", " ") for t in texts()], trainer)
    model = state_of(tokenizer)["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    if complete:
        merges = [
            (token[:at], token[at:])
            for token in ("".join(pair) for pair in merges)
            for at in range(1, len(token))
            if token[:at] in vocab and token[at:] in vocab
        ]
    options = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    found = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    found.normalizer = tokenizer.normalizer
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    found.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    found.add_special_tokens(["<unk>", "<s>", "</s>"])
    return found


def llama_2(vocab_size=900):
    return byte_fallback(vocab_size, prepend=True)


def unigram(vocab_size=500, scheme="always", collapse=True):
    """Unigram as T5's, but for the table of Unicode's compatible characters."""
    tokenizer = Tokenizer(models.Unigram())
    if collapse:
        steps = [normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<pad>", "</s>", "<unk>"]
    options = {"special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, **options)
    tokenizer.train_from_iterator([t.replace("\n", " ") for t in texts()], trainer)
    return tokenizer


def bert(vocab_size=600, lowercase=True):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    options = {"special_tokens": special, "show_progress": False, "limit_alphabet": 200}
    tokenizer.train_from_iterator(
        texts(), trainers.WordPieceTrainer(vocab_size=vocab_size, **options)
    )
    return tokenizer


def with_added(tokenizer, *contents):
    """The tokenizer with tokens that are text, not marks."""
    options = {"special": False, "normalized": False}
    plain = [x if isinstance(x, AddedToken) else AddedToken(x, **options) for x in contents]
    tokenizer.add_tokens(plain)
    return tokenizer


def many_words(vocab_size):
    """Byte-level BPE with a token for every two letters, and for four, up to `vocab_size`."""
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = list(itertools.product(string.ascii_lowercase, repeat=2))
    fours = itertools.product(map("".join, pairs), repeat=2)
    merges = [*pairs, *itertools.islice(fours, vocab_size - len(alphabet) - len(pairs))]
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def state_of(tokenizer):
    return json.loads(tokenizer.to_str())


KINDS = {
    "gpt-2": gpt_2,
    "llama-3": llama_3,
    "qwen-2": qwen_2,
    "smollm": smollm,
    "llama-2": llama_2,
    "gemma": byte_fallback,
    "unigram": unigram,
    "bert": bert,
}
