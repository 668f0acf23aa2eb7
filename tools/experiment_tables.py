"""The tables of docs/results.md: which variants each compares, and on what budget."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from bitllm_core import ModelConfig

SEED_SCRIPT = "the seed guide's script"  # not a patch but another program


@dataclass(frozen=True)
class Variant:
    """One line of a table: the settings it changes, and a patch (see experiment_patches.py)."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    """fields of ModelConfig, DataConfig and TrainConfig"""
    patch: str = ""


@dataclass(frozen=True)
class Table:
    """Variants of the same base. The budget of each run is `tokens`, or else `minutes`."""

    about: str
    base: dict[str, Any]
    variants: list[Variant]
    tokens: int = 0
    minutes: float = 0.0
    """from the start of the run's process"""
    seeds: int = 1
    threads: int = 1
    valid_bytes: int = 240_000
    """how much of the validation text the final evaluation reads; 0: all of it"""
    train_bytes: int = 0
    """how much of the training text is used; 0: all of it"""
    pydocs: bool = False
    """use the documentation that comes with Python instead of --train and --valid"""


SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": None,
    "max_position_embeddings": 128,
    "batch_tokens": 2048,
    "micro_batch_size": 16,  # all batches have one shape: it compiles once
    "warmup_steps": 20,
    "compile": "on",
}
"""2.56M parameters; the core's defaults for the rest"""

SHORT: dict[str, Any] = {
    "vocab_size": 16_384,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "batch_tokens": 2048,
    "micro_batch_size": 16,
    "compile": "on",
    "adamw_learning_rate": 0.015,  # see the table "longer"; for the AdamW twin, see "rates"
}
"""5.4M parameters: learns something in ten minutes on a slow core, and every client loads it"""

FIRST: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "batch_tokens": 8192,
    "learning_rate": 0.02,
    "adamw_learning_rate": 0.005,
    "warmup_steps": 20,
    "cooldown_fraction": 0.4,
}
"""13.8M parameters: the model of the first WikiText-2 figure in docs/log.md"""

FOURTEEN: dict[str, Any] = {
    **FIRST,
    "learning_rate": None,
    "adamw_learning_rate": None,
    "batch_tokens": 2048,
    "compile": "on",
}
"""the same with each form's own rates"""


def settings(**changes: Any) -> Variant:
    """A variant that is named after the settings it changes."""
    return Variant(
        ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in changes.items()),
        changes,
    )


def patched(*names: str) -> list[Variant]:
    """For each patch a variant of that name."""
    return [Variant(name, {}, name) for name in names]


def rates(linear: str, optimizer: str, *values: float) -> list[Variant]:
    return [
        Variant(
            f"{linear}, {optimizer} {value:g}",
            {"linear": linear, "optimizer": optimizer, "learning_rate": value},
        )
        for value in values
    ]


TWINS = [
    Variant(f"{linear}{more}", {"linear": linear, **changes}, patch)
    for more, changes, patch in (
        ("", {}, ""),
        (", 5 Newton-Schulz steps", {}, "5 Newton-Schulz steps"),
        (", the rest 0.015", {"adamw_learning_rate": 0.015}, ""),
    )
    for linear in ("ternary", "dense")
]


TABLES: dict[str, Table] = {
    "rates": Table(
        "peak learning rate of the matrices, 2.56M parameters, equal tokens",
        SMALL,
        [
            *rates("ternary", "muon", 0.01, 0.02, 0.04, 0.08),
            *rates("dense", "muon", 0.01, 0.02, 0.04),
            *rates("dense", "adamw", 0.00075, 0.0015, 0.003, 0.006),
            *rates("ternary", "adamw", 0.0015, 0.003),
            *(
                Variant(
                    f"dense, adamw 0.0015, the rest {rate:g}",
                    {
                        "linear": "dense",
                        "optimizer": "adamw",
                        "learning_rate": 0.0015,
                        "adamw_learning_rate": rate,
                    },
                )
                for rate in (0.005, 0.015)
            ),
            *(
                Variant(
                    f"dense, muon 0.02, the rest {rate:g}",
                    {"linear": "dense", "learning_rate": 0.02, "adamw_learning_rate": rate},
                )
                for rate in (0.015, 0.03)
            ),
        ],
        tokens=262_144,
    ),
    "longer": Table(
        "four times the tokens: the learning rate of embedding and norms, and the cooldown",
        {**SHORT, "vocab_size": 4096},
        [
            *(settings(adamw_learning_rate=rate) for rate in (0.005, 0.015, 0.03)),
            Variant(
                "0.015, cooldown 0.2", {"adamw_learning_rate": 0.015, "cooldown_fraction": 0.2}
            ),
        ],
        tokens=1_048_576,
    ),
    "gap": Table(
        "ternary and its dense twin at equal steps, each at its own peak rate, 2.56M parameters",
        SMALL,
        TWINS,
        tokens=262_144,
        seeds=3,
    ),
    "gap-14M": Table(
        "the same with 13.8M parameters",
        FOURTEEN,
        TWINS[:2],
        tokens=262_144,
        seeds=3,
    ),
    "gap-14M-4M": Table(
        "the same with 16 times the tokens, in steps of 4,096",
        {**FOURTEEN, "batch_tokens": 4096},
        TWINS[:2],
        tokens=4_194_304,
        seeds=2,
    ),
    "gap-14M-16M": Table(
        "the same with 64 times the tokens, in steps of 4,096",
        {**FOURTEEN, "batch_tokens": 4096},
        TWINS[:2],
        tokens=16_777_216,
        seeds=2,
    ),
    "ten-minutes": Table(
        "ten minutes, including start, tokenizer and compiling",
        {"compile": "on"},
        [
            Variant("ternary, 5.4M", {**SHORT, "learning_rate": 0.02}),
            Variant("first defaults, ternary, 13.8M", FIRST, "the first defaults"),
            Variant(
                "dense twin of 5.4M, AdamW",
                {**SHORT, "linear": "dense", "optimizer": "adamw"},
            ),
            Variant(SEED_SCRIPT, {}, SEED_SCRIPT),
            Variant("dense twin of 5.4M, Muon", {**SHORT, "linear": "dense"}),
            Variant("ternary, 5.4M, 0.04", SHORT),
            Variant("ternary, 5.4M, momentum 0.98", {**SHORT, "momentum": 0.98}),
            Variant(
                "dense twin of 5.4M, AdamW 0.00075",
                {**SHORT, "linear": "dense", "optimizer": "adamw", "learning_rate": 0.00075},
            ),
        ],
        minutes=10,
        seeds=3,
        threads=2,
    ),
    "recipe": Table(
        "one change at a time, 2.56M parameters, equal tokens",
        SMALL,
        [
            Variant("defaults"),
            *patched("projections x 10", "zero-init projections", "embedding std 0.005"),
            *patched("momentum 0.85 to 0.95", "5 Newton-Schulz steps", "2 Newton-Schulz steps"),
            Variant("dense", {"linear": "dense"}),
            Variant("dense, 5 Newton-Schulz steps", {"linear": "dense"}, "5 Newton-Schulz steps"),
            *(settings(adamw_learning_rate=rate) for rate in (0.0017, 0.01, 0.015, 0.03)),
            *(settings(learning_rate=rate) for rate in (0.03, 0.06)),
            Variant("batch_tokens 1024", {"batch_tokens": 1024, "micro_batch_size": 8}),
            settings(batch_tokens=4096),
            *(settings(cooldown_fraction=share) for share in (0.2, 0.7)),
            *patched("z-loss 1e-4", "median scale", "no sub-norms", "dense for the first 20%"),
            settings(linear="weight_only"),
            settings(weight_decay=0.1),
            *patched("dropout 0.1", "embedding std 0.1"),
            Variant("weight decay 0.1 to 0", {"weight_decay": 0.1}, "weight decay to 0"),
        ],
        tokens=262_144,
    ),
    "candidates": Table(
        "one change at a time, what the dial chooses for three minutes, equal tokens",
        {**SHORT, "vocab_size": 8192},
        [
            Variant("defaults"),
            *patched("NorMuon", "Polar Express", "1.5 x mean as scale", "learned scales"),
            *patched("AdamW every other step", "two tokens ahead", "momentum 0.85 to 0.95"),
            *(settings(momentum=value) for value in (0.9, 0.85)),
            *patched("cooldown 1 - sqrt", "cooldown squared"),
            settings(weight_decay=0.1),
            Variant("cautious decay 0.1", {"weight_decay": 0.1}, "cautious decay"),
            Variant(
                "batch ramp from 1024", {"batch_tokens": 1024, "micro_batch_size": 8}, "batch ramp"
            ),
            Variant("batch_tokens 1024", {"batch_tokens": 1024, "micro_batch_size": 8}),
            Variant("dense", {"linear": "dense"}),
            *patched("NorMuon, learned scales", "0.75 x mean as scale"),
            Variant("dense, learned scales", {"linear": "dense"}, "learned scales"),
            Variant("dense, NorMuon", {"linear": "dense"}, "NorMuon"),
            settings(linear="dense", momentum=0.9),
            Variant("momentum 0.9, learned scales", {"momentum": 0.9}, "learned scales"),
            Variant("momentum 0.9, gains alone", {"momentum": 0.9}, "gains alone"),
            Variant("momentum 0.9, gains scaled", {"momentum": 0.9}, "unit gain"),
            Variant(
                "dense, momentum 0.9, gains scaled",
                {"momentum": 0.9, "linear": "dense"},
                "unit gain",
            ),
            Variant("momentum 0.9, from half the weights", {"momentum": 0.9}),
            Variant("dense, the same, from half", {"momentum": 0.9, "linear": "dense"}),
        ],
        tokens=1_048_576,
        seeds=3,
    ),
    "shape": Table(
        "vocabulary, context and head of the same model, equal tokens (compare bits per byte)",
        SMALL,
        [
            *(settings(vocab_size=size) for size in (2048, 4096, 8192, 16_384)),
            *(
                Variant(
                    f"context {n}", {"max_position_embeddings": n, "micro_batch_size": 2048 // n}
                )
                for n in (64, 256, 512)
            ),
            Variant("ternary head", {"tie_word_embeddings": False}),
        ],
        tokens=262_144,
    ),
    "epochs": Table(
        "nine epochs of a small text (200 kB)",
        SMALL,
        [
            Variant("defaults"),
            *patched("dropout 0.1", "dropout 0.2"),
            settings(weight_decay=0.1),
            settings(weight_decay=0.5),
            Variant("dense", {"linear": "dense"}),
        ],
        tokens=524_288,
        train_bytes=200_000,
    ),
    "laptop": Table(
        "18.4M parameters, a fifth of the tokens of an hour: size of a step and of the vocabulary",
        {
            **dataclasses.asdict(ModelConfig(8192, 512, 1024, 6, 8, 4, 256)),
            "batch_tokens": 4096,
            "micro_batch_size": 8,
            "warmup_steps": 20,
            "compile": "on",
        },
        [
            *(settings(batch_tokens=size) for size in (8192, 4096, 2048)),
            settings(vocab_size=16_384),
            settings(adamw_learning_rate=0.01),
        ],
        tokens=1_228_800,
    ),
    "pydocs": Table(
        "the recipe on another text: equal tokens, about two epochs",
        SMALL,
        [
            Variant("defaults"),
            *patched("projections x 10", "5 Newton-Schulz steps"),
            Variant("dense", {"linear": "dense"}),
            *rates("dense", "adamw", 0.0015),
            *rates("ternary", "adamw", 0.0015),
            settings(adamw_learning_rate=0.015),
            *(settings(learning_rate=rate) for rate in (0.02, 0.03, 0.06)),
            Variant("batch_tokens 1024", {"batch_tokens": 1024, "micro_batch_size": 8}),
            settings(weight_decay=0.1),
            *patched("z-loss 1e-4", "no sub-norms", "dropout 0.1"),
            *(settings(vocab_size=size) for size in (2048, 8192)),
        ],
        tokens=262_144,
        seeds=2,
        pydocs=True,
    ),
}
