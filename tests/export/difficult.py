"""Strings on which tokenizers differ."""

import random

PARTS = [
    *("é", "e\u0301", "ß", "İ", "ﬁ", "½", "①", "٣", "中文", "日本語", "한국어", "שלום", "ไทย"),
    *(
        "🐱",
        "👩‍🚀",
        "🇪🇸",
        "\u200b",
        "\ufeff",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\x00",
        "\x7f",
        "\ufffd",
    ),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\n ", "\t\t", "a ", " b"),
    *("<|endoftext|>", "<|endof", "[PAD]", "<s>", "</s>", "<unk>", "[UNK]", "[PAD1]"),
    *("def f(x):\n    return x", "if (a&&b) {", "x->y::z", "#include <a.h>", "λ=∑_{i}", "0x1F"),
    *("don't", "I'LL", "we've", "'s", "''", "“q”", "1,234.5", "3e-10", "2026", "a1b2", "½a"),
    *("The", "word", "naïve", "ĠĊ", "Ø", "https://x.y/z?q=1", "snake_case", "camelCase"),
]


def difficult_strings():
    rng = random.Random(0)
    strings = ["", *PARTS]
    strings += ["".join(rng.choices(PARTS, k=rng.randint(2, 12))) for _ in range(1400)]
    strings += [
        "".join(chr(random_char(rng)) for _ in range(rng.randint(1, 20))) for _ in range(600)
    ]
    return strings


def random_char(rng):
    """Any code point but a surrogate, small ones more often."""
    code = rng.randrange(rng.choice([128, 0x250, 0x3000, 0x10000, 0x110000]))
    return code if not 0xD800 <= code < 0xE000 else 0x20
