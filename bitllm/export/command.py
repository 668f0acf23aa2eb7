"""The command line of the exports: flags and `bitllm export` for every registered format."""

from __future__ import annotations

import argparse
from typing import Any

from bitllm.export.common import CREDITS, FORMATS
from bitllm.export.hub import require_name
from bitllm.export.repository import publish
from bitllm_core import require


def add_export_flags(command: argparse.ArgumentParser) -> None:
    """All flags of `export` but --model and --checkpoint, which other commands have as well."""
    command.add_argument("--to", choices=tuple(FORMATS), help="the format")
    command.add_argument("--out", metavar="PATH", help="file, or folder with hf")
    for form in FORMATS.values():
        for flag in form.flags.values():
            options: dict[str, Any] = {"action": "store_true"}
            if not flag.switch:
                options = {"choices": flag.choices, "metavar": flag.metavar}
            command.add_argument(flag.name, help=f"for {form.name}: {flag.help}", **options)
    command.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    for name in CREDITS:
        command.add_argument("--" + name.replace("_", "-"), help="noted in what is written")
    command.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload all forms, with HF_TOKEN"
    )


def run_export(flags: argparse.Namespace, checkpoint: str | int) -> int:
    """Export and upload as the flags ask for, print what was written; returns the exit status.

    Raises:
        What the export and the upload raise; and ValueError for a flag of another format.
    """
    asked = "a format and --out PATH, or --push-to-hub OWNER/NAME without both"
    whole = bool(flags.to and flags.out) if flags.to or flags.out else bool(flags.push_to_hub)
    require(whole, "to", flags.to, asked)
    more: dict[str, Any] = {name: getattr(flags, name) for name in CREDITS}
    more["checkpoint"], options = checkpoint, _options(flags)
    if flags.push_to_hub:
        require_name(flags.push_to_hub)
    if flags.to:
        given = {"overwrite": flags.overwrite, **options.get(flags.to, {}), **more}
        exported = FORMATS[flags.to].export(flags.model, flags.out, **given)
        print(
            f"{exported.path}: {exported.size:,} bytes, "
            f"{exported.bits_per_weight:.3f} bits per ternary weight"
        )
        print(exported.usage)
    if flags.push_to_hub:
        print(f"uploaded: {publish(flags.model, flags.push_to_hub, options=options, **more)}")
    return 0


def _options(flags: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Format -> its own options, as far as their flags are given. An upload has all formats."""
    options: dict[str, dict[str, Any]] = {}
    for form in FORMATS.values():
        for parameter, flag in form.flags.items():
            value = getattr(flags, flag.name.lstrip("-").replace("-", "_"))
            if value:
                mine = form.name == flags.to or flags.push_to_hub
                require(mine, "to", flags.to, f"{form.name}, the format that {flag.name} is for")
                options.setdefault(form.name, {})[parameter] = value
    return options
