"""The settings of a training, as the notebooks' form asks for them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bitllm.companion import is_companion, language_of, recorded_persona
from bitllm.corpora import Persona
from bitllm.dial import (
    COMPILING_S,
    START_S,
    Choice,
    Machine,
    choose,
    measure,
    size_of,
    step_seconds,
)
from bitllm.mixture import is_mixture, sources_of
from bitllm.notebook.card import duration
from bitllm.notebook.language import say
from bitllm.notebook.runs import run_status
from bitllm.planner import estimate_memory
from bitllm_core import (
    KNOWN_DATA,
    PRESETS,
    DataConfig,
    Device,
    ModelConfig,
    TrainConfig,
    check_configs,
    choose_device,
    config_from,
    is_local,
    peak_rates,
    read_json,
    require,
)

SHORT_MINUTES = 3.0  # without a GPU, and where nothing else was chosen
MOST_EPOCHS = 20  # of a text of the user's own, where its size has a number of steps
SHORT_TEXT = 33_000  # tokens, of 100 kB
FEW_STEPS = 60  # are allowed however short it is
BYTES_PER_TOKEN = 3  # a guess before there is a tokenizer
MOST_FILES = 100  # in a folder that is measured; one with more is not short
PLAIN = (".txt", ".md", ".text", ".csv", ".jsonl")


def text_tokens(source: str) -> int | None:
    """About how many tokens a plain file, or a folder of them, has; None for any other source."""
    if not is_local(source):
        return None
    path = Path(source).expanduser()
    if path.is_dir():
        files = [*itertools.islice(path.rglob("*"), MOST_FILES + 1)]
    else:
        files = [path]
    sizes = [file.stat().st_size for file in files if file.suffix in PLAIN]
    known = len(sizes) == len(files) <= MOST_FILES
    return sum(sizes) // BYTES_PER_TOKEN if known else None


this_machine: Callable[[], Machine] = lru_cache(maxsize=1)(measure)


@lru_cache(maxsize=8)
def _chosen(minutes: float, data: DataConfig, given: tuple[Any, ...], stamp: Any) -> Choice:
    """The dial's choice, the same as long as the text (`stamp`) does not change."""
    return choose(minutes, data, dict(given), this_machine(), size_of(data))


@dataclass(frozen=True)
class Settings:
    """What the notebooks' form asks for. Empty or 0: the preset's value, or the dial's choice."""

    preset: str = "auto"
    """a preset's name; auto: what the dial chooses for some minutes and a text, $BITLLM_PRESET, or
    t4-1h with a CUDA GPU, or 3 minutes without one; demo for the companion"""
    data: str = ""
    """a file, a folder, a known data set, hf:OWNER/NAME or a mixture, as DataConfig.data"""
    hidden_size: int = 0
    """width; the number of heads and the feed-forward width follow"""
    num_hidden_layers: int = 0
    """depth"""
    minutes: float = 0.0
    """the clock ends the run after so many, instead of a number of steps"""
    batch_tokens: int = 0
    """tokens per optimizer step"""
    learning_rate: float = 0.0
    """peak learning rate of the matrices"""
    resume: str = "auto"
    """auto resumes the run in the folder; never moves that run aside and starts a new one"""
    out: str = ""
    """run folder; default: one in runs/ for each choice of preset, data, size and character"""
    mirror: str = ""
    """folder for copies of the checkpoints, such as one on Drive"""
    persona: str = ""
    """who the companion is, a .json file or as DataConfig.persona; empty: as the run in the folder
    has it, or the language"""

    def __post_init__(self) -> None:
        names = ("auto", *PRESETS)
        require(self.preset in names, "preset", self.preset, f"one of {', '.join(names)}")
        require(self.preset_name in PRESETS, "BITLLM_PRESET", self.preset_name, ", ".join(PRESETS))
        require(self.minutes >= 0, "minutes", self.minutes, "0 (the preset's steps) or more")
        require(self.resume in ("auto", "never"), "resume", self.resume, "auto or never")
        self.configs()

    @property
    def preset_name(self) -> str:
        if self.preset != "auto":
            return self.preset
        fitting = "demo" if self.is_fallback or is_companion(self.data) else "t4-1h"
        return os.environ.get("BITLLM_PRESET") or fitting

    @property
    def is_fallback(self) -> bool:
        """Whether there is no GPU and no preset was chosen: then the run is kept short."""
        return not self._chosen_preset and not torch.cuda.is_available()

    @property
    def _chosen_preset(self) -> bool:
        return self.preset != "auto" or bool(os.environ.get("BITLLM_PRESET"))

    @property
    def clock_minutes(self) -> float | None:
        """The clock ends the run after so many; None: it has the preset's number of steps."""
        return self.minutes or (SHORT_MINUTES if self.is_fallback else None)

    @property
    def is_dialed(self) -> bool:
        """Whether the dial chooses: for some minutes and a text, where no preset was chosen."""
        return bool(self.clock_minutes) and not self._chosen_preset and not self.language

    @property
    def language(self) -> str | None:
        """The companion's, where that is the data."""
        source = self.data or PRESETS[self.preset_name][1].data
        return language_of(source) if is_companion(source) else None

    def replace(self, **changes: Any) -> Settings:
        return dataclasses.replace(self, **changes)

    @property
    def run_folder(self) -> Path:
        own = re.sub(r"[^-.\w]+", "-", f"-{_name_of(self.data)}" if self.data else "")[:80]
        kind = self.preset_name
        letters = {"hidden_size": "w", "num_hidden_layers": "l", "batch_tokens": "b"}
        letters["learning_rate"] = "r"
        changed = [(letter, getattr(self, name)) for name, letter in letters.items()]
        own += "".join(f"-{letter}{value:g}" for letter, value in changed if value)
        if self.persona and (character := recorded_persona(self.persona)):
            name = re.sub(r"[^\w]+", "-", Persona.parse(character).name)[:20]
            own += f"-{name}-{zlib.crc32(character.encode()) & 0xFFFF:04x}"
        if self.is_dialed:  # the minutes decide which model it is
            kind, own = "auto", f"{own}-{self.clock_minutes:g}min"
        return Path(self.out or f"runs/{kind}{own}")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `train`."""
        return {"resume": self.resume, **({"mirror": self.mirror} if self.mirror else {})}

    def configs(self) -> tuple[ModelConfig, DataConfig, TrainConfig]:
        """The three configurations for `train`; ValueError names a wrong field and a remedy."""
        if self.is_dialed:
            return self._dialed()
        model, data, config = PRESETS[self.preset_name]
        expected = f"a multiple of {model.head_dim}, such as {model.hidden_size}"
        fits = self.hidden_size >= 0 and self.hidden_size % model.head_dim == 0
        require(fits, "hidden_size", self.hidden_size, expected)
        if self.hidden_size and self.hidden_size != model.hidden_size:
            heads = max(1, self.hidden_size // model.head_dim)
            groups = model.num_attention_heads // model.num_kv_heads
            model = dataclasses.replace(
                model,
                hidden_size=self.hidden_size,
                intermediate_size=self.hidden_size * model.intermediate_size // model.hidden_size,
                num_attention_heads=heads,
                num_key_value_heads=heads // groups if heads % groups == 0 else None,
            )
        changes = {name: getattr(self, name) for name in ("batch_tokens", "learning_rate")}
        config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v})
        if self.num_hidden_layers:
            model = dataclasses.replace(model, num_hidden_layers=self.num_hidden_layers)
        if self.data:
            data = dataclasses.replace(data, data=self.data)
        if self.language or self.persona:
            data = dataclasses.replace(data, persona=self._persona(data.data))
        check_configs(model, config)
        saved = self.resumed_run()[1].get("train", {})
        minutes = self.minutes or (saved.get("minutes") if saved else self.clock_minutes)
        config = dataclasses.replace(config, minutes=minutes)
        if not minutes and (tokens := text_tokens(data.data)):  # more would be learned by heart
            enough = max(FEW_STEPS, MOST_EPOCHS * tokens // config.batch_tokens)
            enough = max(enough, saved.get("max_steps", 0))  # what was begun can be finished
            config = dataclasses.replace(config, max_steps=min(config.max_steps, enough))
        return model, data, config

    def _dialed(self) -> tuple[ModelConfig, DataConfig, TrainConfig]:
        """As the dial chooses; a run that is resumed keeps what was chosen when it began."""
        _, data, _ = PRESETS[self.preset_name]
        data = dataclasses.replace(data, data=self.data or data.data)
        place, saved = self.resumed_run()
        if saved and saved["data"]["data"] == data.data:
            kinds = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
            model, data, config = (config_from(kind, saved[k], place) for k, kind in kinds.items())
            config = dataclasses.replace(config, minutes=self.minutes or config.minutes)
            return model, data, config
        _require_source(data.data)
        names = ("hidden_size", "num_hidden_layers", "batch_tokens", "learning_rate")
        given = tuple((name, getattr(self, name)) for name in names if getattr(self, name))
        assert self.clock_minutes
        found = _chosen(self.clock_minutes, data, given, text_tokens(data.data))
        check_configs(found.model, found.train)
        return found.model, found.data, found.train

    def _persona(self, source: str) -> str | None:
        """Who the companion is: as asked for, or as in the run that is resumed."""
        if self.persona:
            return recorded_persona(self.persona)
        saved = self.resumed_run()[1].get("data", {})
        return saved.get("persona") if saved.get("data") == source else None

    def describe(self) -> str:
        """Parameters, data, steps, memory, time and run folder, one line each.

        Raises:
            ValueError: the data is a file that is not there, or too short to train on.
        """
        model, data, config = self.configs()
        device = choose_device(config.device, config.dtype)
        memory = estimate_memory(model, config) / 2**20
        small = say(" (small and short: there is no GPU here)")
        small = small if self.is_fallback and not self.minutes else ""
        size = say("chosen for this text, these minutes and this machine")
        persona = data.persona or say("as its language has it")
        lines = {
            say("size"): (size if self.is_dialed else self.preset_name) + small,
            say("model"): say(
                "{million:.2f}M parameters: {layers} layers of width {width}, context {context}",
                million=model.num_parameters / 1e6,
                layers=model.num_hidden_layers,
                width=model.hidden_size,
                context=model.max_position_embeddings,
            ),
            say("data"): data.data + _length_of_text(data, model, config),
            **({say("companion"): persona} if self.language else {}),
            say("training"): _training(model, config),
            say("memory"): say(
                "{size:,.0f} MB for weights, gradients and optimizer, plus activations", size=memory
            ),
            say("time"): _time(self, model, config, device),
            say("run folder"): f"{self.run_folder.as_posix()}: {_folder_status(self, model, data)}",
        }
        return "\n".join(f"{name + ':':12}{value}" for name, value in lines.items())

    def resumed_run(self) -> tuple[Path, dict[str, Any]]:
        """`saved_run` where that is resumed; empty where a new one begins."""
        return self.saved_run() if self.resume == "auto" else (self.run_folder, {})

    def saved_run(self) -> tuple[Path, dict[str, Any]]:
        """Where the run to resume is, run folder or mirror, and its config.json."""
        for place in (self.run_folder, *([Path(self.mirror)] if self.mirror else [])):
            saved = read_json(place / "config.json")
            if saved:
                return place, saved
        return self.run_folder, {}


def _training(model: ModelConfig, config: TrainConfig) -> str:
    if config.minutes:
        steps = say("{minutes:g} minutes", minutes=config.minutes)
    else:
        steps = say("{steps:,} steps", steps=config.max_steps)
    return say(
        "{steps}, {count:,} tokens per step, peak learning rate {rate:g}",
        steps=steps,
        count=config.batch_tokens,
        rate=peak_rates(model, config)[0],
    )


def _time(settings: Settings, model: ModelConfig, config: TrainConfig, device: Device) -> str:
    place, saved = settings.resumed_run()
    status, before = run_status(place) if saved else None, saved.get("train", {})
    name = "minutes" if config.minutes else "max_steps"
    if status and status.finished and before[name] >= getattr(config, name):
        return say("none: this run is complete")
    if config.minutes:
        return say(
            "{minutes:g} minutes in all, however often it is stopped and resumed",
            minutes=config.minutes,
        )
    machine = this_machine()
    compiled = machine.compiles and config.compile != "off"
    whole = START_S + COMPILING_S * compiled
    whole += config.max_steps * step_seconds(model, machine, compiled, config.batch_tokens)
    left = whole * (1 - min(1.0, (status.step if status else 0) / config.max_steps))
    return say(
        "about {time} on this {device} (rough estimate)",
        time=duration(left),
        device=device.device.type,
    )


def _folder_status(settings: Settings, model: ModelConfig, data: DataConfig) -> str:
    place, saved = settings.saved_run()
    if not saved:
        return say("new")
    if settings.resume == "never":
        return say("holds a run, which is moved aside")
    before = {**asdict(DataConfig()), **saved.get("data", {})}  # of an earlier version
    if (saved.get("model"), before) != (asdict(model), asdict(data)):
        return say("HOLDS A RUN WITH OTHER SETTINGS; choose another folder, or start over")
    status = run_status(place)
    if place != settings.run_folder:
        return say("{status}, from {place}", status=status, place=place)
    return str(status)


def _name_of(data: str) -> str:
    """What a run folder is called after: a source, or those of a mixture with their weights."""
    if is_mixture(data):
        return "-".join(Path(source).name for source in data.split(","))
    return Path(data).stem


def _require_source(source: str) -> None:
    if is_mixture(source):
        try:
            sources_of(source)  # it checks them
        except FileNotFoundError as error:
            raise ValueError(error) from error
        return
    known = ("hf", "pydocs", "companion", *KNOWN_DATA)
    found = is_local(source) or source.partition(":")[0] in known
    require(found, "data", source, "a file or folder that is there, or a known name")


def _length_of_text(data: DataConfig, model: ModelConfig, config: TrainConfig) -> str:
    """How long a text of the user's own is, where that is short for its steps."""
    _require_source(data.data)
    tokens = text_tokens(data.data)
    if tokens is None:
        return ""
    enough = tokens > model.max_position_embeddings
    expected = f"a text of {4 * model.max_position_embeddings:,} characters or more"
    require(enough, "data", data.data, f"{expected}; 100 kB or more make sense")
    epochs = config.max_steps * config.batch_tokens / tokens
    if config.minutes:
        often = "" if tokens < SHORT_TEXT else None  # the clock ends it before it only overfits
    else:
        often = say(", which will be read {times:,.0f} times and learned by heart", times=epochs)
        often = often if epochs >= MOST_EPOCHS / 2 else None
    if often is None:
        return ""
    short = say("SHORT: about {tokens:,} tokens{often};", tokens=tokens, often=often)
    return f"\n{'':12}{short}\n{'':12}{say('100 kB or more make sense')}"
