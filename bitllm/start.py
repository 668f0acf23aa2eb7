"""Training that starts from weights: those of a run, of an export, or of a model on the hub.

Shape and tokenizer come with them; optimizer, schedule and data are new. `bitllm_core.train` calls
the functions here in their order, and saves a checkpoint before the first step: a resume does not
read the source again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitllm.conversations import SPECIAL, can_chat
from bitllm.export.common import Source, open_source
from bitllm.vocabulary import num_rows, same_tokenizer, saved_settings
from bitllm_core import (
    PRESETS,
    BitLM,
    ModelConfig,
    Session,
    load_tokenizer,
    log,
    num_ids,
    require,
    weight_quant,
    write_atomically,
)

NOISE = 0.1
"""of a new token's row, in standard deviations of the rows that there are"""
OFF = 1e-6
"""share by which a scale may be off before the start is refused; within it, a warning"""

# What is there


def open_base(init_from: str) -> Source:
    """The model that `init_from` names, not frozen where its source has master weights.

    Raises:
        FileNotFoundError: nothing there. ValueError: something else, or a GGUF file.
        ConnectionError: the hub cannot be reached, or has no such model.
    """
    if init_from.startswith("hf:"):
        found = open_source(init_from, "last", {}, frozen=False)
        name = init_from.removeprefix("hf:")
        return dataclasses.replace(found, facts={**found.facts, "name": name})
    path = Path(init_from).expanduser()
    if not path.exists():
        preset, expected = path.name, "a run folder, an export, or hf:OWNER/NAME"
        if preset in PRESETS:
            expected = "the run that this one starts from, or another with --init-from. To train "
            expected += f"it first: bitllm train --preset {preset} --out {init_from}"
        raise FileNotFoundError(f"init_from={init_from!r}: not there; expected {expected}")
    return open_source(path, "last", {}, frozen=False)


def weights_hash(model: BitLM) -> str:
    """sha256 of names and bytes of a model's weights; of frozen ones, of trits and scales."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _kind(tokenizer: Any) -> str:
    return "wordpiece" if type(tokenizer.model).__name__ == "WordPiece" else "bpe"


def _shape(config: ModelConfig) -> dict[str, Any]:
    return {**asdict(config), "num_key_value_heads": config.num_kv_heads}


def settings_of(init_from: str, configs: Sequence[Any], places: Iterable[Any]) -> list[Any]:
    """A preset's configurations with the shape and kind of tokenizer that the source has.

    Of a run in one of the `places` they are its own, for it may have outlived its source.
    """
    model, data, config = configs
    if saved := saved_settings(places):
        kind = saved["data"]["tokenizer"]
        model = ModelConfig(**saved["model"])
    else:
        base = open_base(init_from)
        model, kind = base.model.config, _kind(base.tokenizer)
    return [model, dataclasses.replace(data, tokenizer=kind), config]


# Before a run begins


def shape_of_run(
    configs: dict[str, Any], out: Path, resume: str, mirror: str | Path | None
) -> ModelConfig:
    """The shape of the run in `out`: its source's, and rows for the marks of a conversation.

    ValueError: settings, or a tokenizer in `out`, are not the source's; or it is `out` itself.
    """
    model, data, init_from = configs["model"], configs["data"], configs["train"].init_from
    saved = saved_settings([] if resume == "never" else [mirror, out])
    if saved:  # what differs is refused where it is opened
        found = ModelConfig(**saved["model"])
        sizes = found.vocab_size, saved["start"].get("vocab_size")
        alike = _shape(dataclasses.replace(model, vocab_size=found.vocab_size)) == _shape(found)
        return found if alike and model.vocab_size in sizes else model
    for folder in filter(None, (out, mirror)):
        source, target = Path(init_from).expanduser().resolve(), Path(folder).expanduser().resolve()
        if target in (source, *source.parents):
            raise ValueError(
                f"init_from={init_from!r}: the new run would be written into the folder that it "
                f"starts from, {folder}. Choose another --out (or resume that run: no --init-from)"
            )
    base = open_base(init_from)
    grown = max(base.model.config.vocab_size, num_rows(base.tokenizer, data))
    theirs, kind = _shape(base.model.config), _kind(base.tokenizer)
    wrong = [
        f"{name}={value!r} (there: {theirs[name]!r})"
        for name, value in _shape(model).items()
        if value != theirs[name] and not (name == "vocab_size" and value == grown)
    ]
    wrong += [f"tokenizer={data.tokenizer!r} (there: {kind!r})"] * (data.tokenizer != kind)
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: expected the shape and the tokenizer of {init_from}, whose "
            "weights are to be trained. Leave these settings out, or --init-from"
        )
    path = out / "tokenizer.json"
    if resume != "never" and path.is_file() and not (out / "config.json").exists():
        same = same_tokenizer(load_tokenizer(path), base.tokenizer)
        require(same, "tokenizer", str(path), f"the tokenizer of {init_from}, or none in {out}")
    return dataclasses.replace(base.model.config, vocab_size=grown)


def give_tokenizer(init_from: str, out: Path) -> None:
    """Put the source's tokenizer into a new run's folder, where the data is made with it."""
    path, tokenizer = out / "tokenizer.json", open_base(init_from).tokenizer
    if not path.is_file() or not same_tokenizer(load_tokenizer(path), tokenizer):
        write_atomically(path, tokenizer.to_str(pretty=True).encode())


# The weights


@torch.no_grad()
def give_weights(session: Session) -> None:
    """Replace a new run's weights by its source's, and note in its settings what they are."""
    init_from, processes = session.config.init_from, session.processes
    assert init_from is not None
    base, device = open_base(init_from), session.device.device
    model, before, sha256 = base.model, num_ids(base.tokenizer), weights_hash(base.model)
    if processes.broadcast(sha256) != sha256:
        raise ValueError(f"init_from={init_from!r}: not the same weights in all processes")
    weights = {name: value.detach() for name, value in model.named_parameters()}
    for name, layer in model.bit_linears().items():
        if layer.frozen:
            weights[f"{name}.weight"] = masters_of(name, *layer.ternary(), device)
    new = [session.tokenizer.token_to_id(name) for name in SPECIAL]
    new = [] if can_chat(base.tokenizer) else [token for token in new if token is not None]
    if new:
        rows, generator = session.model_config.vocab_size, torch.Generator()
        add = partial(add_rows, new=new, rows=rows, known=before)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                generator.manual_seed(session.config.seed)
                weights[name] = add(weights[name], generator=generator)
        if "lm_head.weight" in weights and model.config.linear != "dense":
            scale = model.bit_linears()["lm_head"].ternary()[1]
            settle(weights["lm_head.weight"], scale, torch.tensor(new), device)
    own = session.state.model.state_dict()
    session.state.model.load_state_dict(
        {name: processes.scatter(own[name], value) for name, value in weights.items()}
    )
    known = {key: base.facts.get(key) for key in ("name", "data", "data_licence")}
    start = {**known, "sha256": sha256, "vocab_size": model.config.vocab_size}
    session.settings = {**session.settings, "start": start}
    more = f", and {len(new)} new tokens for conversations" if new else ""
    log.info(f"starting from {init_from} (sha256 {sha256[:12]}){more}")


def add_rows(
    weight: Tensor, generator: torch.Generator, new: Sequence[int], rows: int, known: int
) -> Tensor:
    """An embedding, (V, D), with `rows` rows, of which those of the tokens `new` begin anew.

    They are the mean of the first `known` rows, and noise that tells them apart: so a new token
    has about the others' mean logit. Rows of a model that begins, near 0, would have logits near
    0, which is above most others by then.
    """
    there = weight[:known].double()
    noise = torch.randn(len(new), weight.shape[1], generator=generator, dtype=torch.float64)
    grown = torch.cat([weight, weight.new_zeros(rows - len(weight), weight.shape[1])])
    grown[list(new)] = (there.mean(0) + NOISE * there.std(0) * noise).float()
    return grown


def masters_of(name: str, trits: Tensor, scale: Tensor, device: torch.device) -> Tensor:
    """Master weights, (O, I), that quantize to these trits and this scale again, exactly.

    A weight is s / (1 - share of zeros) in size, so that the mean of all is s. To be exact in
    float32 in whatever order a device adds, sizes are multiples of the last place of their sum:
    then no partial sum is rounded. ValueError, or a warning, where a scale cannot be met.
    """
    s, n, where = float(scale), trits.numel(), trits != 0
    count, floor = int(where.sum()), float(weight_quant(torch.zeros(1, 1))[1])
    weight = trits * (0.75 * scale)
    if not count or s == floor:  # the quantizer gives no lower one: their mean may be less
        return weight
    unit = 2.0 ** (math.floor(math.log2(s * n)) - 23) if 0 < s * n < 2.0**127 else 0.0
    for more in (0, -1, 1) if unit else ():
        total = round(s * n / unit) + more
        sizes = (torch.arange(count + 1) * total // count).diff().double() * unit
        weight[where] = (trits[where] * sizes).float()
        if sizes.min() > 0.51 * s and weight_quant(weight.to(device))[1] == s:
            break
    else:  # a matrix too large for that, or a scale from a device that divides else
        weight = trits * (scale * (n / count))
        settle(weight, scale, torch.arange(len(weight)), device)
    found, off = weight_quant(weight.to(device)), 0.0
    if not torch.equal(found[0].to(trits), trits) or (off := abs(float(found[1]) / s - 1)) > OFF:
        raise ValueError(
            f"{name}: no master weights quantize to its trits and its scale {s:g}; the nearest "
            f"give {float(found[1]):g}. Expected what training can give: at least {floor:g}"
        )
    if off:
        log.warning(f"{name}: its scale {s:.9g} is met but for a share of {off:.1e}")
    return weight


def settle(weight: Tensor, scale: Tensor, rows: Tensor, device: torch.device) -> None:
    """Change the sizes of the weights in `rows`, in place, until the mean of all is `scale`.

    The mean only grows with any one weight: all are made a little too small, and then one larger.
    """
    s, free = float(scale), weight[rows]
    rest = float(weight.double().abs().sum() - free.double().abs().sum())
    free *= (s * weight.numel() * (1 - 2.0**-21) - rest) / float(free.double().abs().sum())
    row, column = divmod(int(free.abs().argmax()), free.shape[1])
    sign, low = float(free[row, column].sign()), float(free[row, column].abs())
    high = low + s * weight.numel()
    for _ in range(100):
        free[row, column] = sign * (low + high) / 2
        weight[rows] = free
        found = float(weight_quant(weight.to(device))[1])
        if found == s:
            return
        low, high = ((low + high) / 2, high) if found < s else (low, (low + high) / 2)
