"""The command line of the exports: flags and `bitllm export` for every registered format."""

from __future__ import annotations

import argparse
from typing import Any

from bitllm.export.common import CREDITS, FORMATS
from bitllm.export.hub import push_to_hub
from bitllm_core import require


def add_export_flags(command: argparse.ArgumentParser) -> None:
    """All flags of `export` but --model and --checkpoint, which other commands have as well."""
    command.add_argument("--to", required=True, choices=tuple(FORMATS), help="the format")
    command.add_argument("--out", required=True, metavar="PATH", help="file, or folder with hf")
    for form in FORMATS.values():
        for flag in form.flags.values():
            options: dict[str, Any] = {"action": "store_true"}
            if not flag.switch:
                options = {"choices": flag.choices, "metavar": flag.metavar}
            command.add_argument(flag.name, help=f"for {form.name}: {flag.help}", **options)
    command.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    for name in CREDITS:
        command.add_argument("--" + name.replace("_", "-"), help="noted in what is written")
    command.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it, with HF_TOKEN")


def run_export(flags: argparse.Namespace, checkpoint: str | int) -> int:
    """Export as the flags ask for and print what was written; returns the exit status.

    Raises:
        What the export raises; and ValueError for a flag of another format.
    """
    exported = FORMATS[flags.to].export(
        flags.model,
        flags.out,
        checkpoint=checkpoint,
        overwrite=flags.overwrite,
        **_options(flags),
        **{name: getattr(flags, name) for name in CREDITS},
    )
    print(
        f"{exported.path}: {exported.size:,} bytes, "
        f"{exported.bits_per_weight:.3f} bits per ternary weight"
    )
    print(exported.usage)
    if flags.push_to_hub:
        print(f"uploaded: {push_to_hub(exported.path, flags.push_to_hub)}")
    return 0


def _options(flags: argparse.Namespace) -> dict[str, Any]:
    """The chosen format's own options, as far as their flags are given."""
    options = {}
    for form in FORMATS.values():
        for parameter, flag in form.flags.items():
            value = getattr(flags, flag.name.lstrip("-").replace("-", "_"))
            if value:
                mine = form.name == flags.to
                require(mine, "to", flags.to, f"{form.name}, the format that {flag.name} is for")
                options[parameter] = value
    return options
