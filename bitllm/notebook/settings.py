"""The settings of a training, as the notebooks' form asks for them."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bitllm.companion import is_companion, language_of, recorded_persona
from bitllm.machine import estimate_seconds, product_rate
from bitllm.planner import estimate_memory
from bitllm_core import (
    PRESETS,
    DataConfig,
    MetricsLog,
    ModelConfig,
    TrainConfig,
    check_configs,
    choose_device,
    peak_rates,
    read_json,
    require,
)


@dataclass(frozen=True)
class Settings:
    """What the notebooks' form asks for. Empty or 0: the preset's value."""

    preset: str = "auto"
    """a preset's name; auto: $BITLLM_PRESET, or t4-1h with a CUDA GPU, or demo in 3 minutes"""
    data: str = ""
    """a file, a folder, a known data set or hf:OWNER/NAME, as DataConfig.data"""
    hidden_size: int = 0
    """width; the number of heads and the feed-forward width follow"""
    num_hidden_layers: int = 0
    """depth"""
    minutes: float = 0.0
    """time budget: sets the number of steps"""
    batch_tokens: int = 0
    """tokens per optimizer step"""
    learning_rate: float = 0.0
    """peak learning rate of the matrices"""
    resume: str = "auto"
    """auto resumes the run in the folder; never moves that run aside and starts a new one"""
    out: str = ""
    """run folder; default: runs/PRESET, or runs/PRESET-DATA with other data than the preset's"""
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
        fitting = "demo" if self.is_fallback else "t4-1h"
        return os.environ.get("BITLLM_PRESET") or fitting

    @property
    def is_fallback(self) -> bool:
        """Whether there is no GPU and no preset was chosen: then the run is kept short."""
        chosen = self.preset != "auto" or os.environ.get("BITLLM_PRESET")
        return not chosen and not torch.cuda.is_available()

    @property
    def language(self) -> str | None:
        """The companion's, where that is the data."""
        source = self.data or PRESETS[self.preset_name][1].data
        return language_of(source) if is_companion(source) else None

    def replace(self, **changes: Any) -> Settings:
        return dataclasses.replace(self, **changes)

    @property
    def run_folder(self) -> Path:
        own = re.sub(r"[^-.\w]+", "-", f"-{Path(self.data).stem}" if self.data else "")
        return Path(self.out or f"runs/{self.preset_name}{own[:80]}")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `train`."""
        return {"resume": self.resume, **({"mirror": self.mirror} if self.mirror else {})}

    def configs(self) -> tuple[ModelConfig, DataConfig, TrainConfig]:
        """The three configurations for `train`; ValueError names a wrong field and a remedy."""
        model, data, config = PRESETS[self.preset_name]
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
        if self.minutes or self.is_fallback:
            config = dataclasses.replace(config, max_steps=self._fitting_steps(model, config))
        return model, data, config

    def _persona(self, source: str) -> str | None:
        """Who the companion is: as asked for, or as in the run that is resumed."""
        if self.persona:
            return recorded_persona(self.persona)
        saved = self._saved_run()[1].get("data", {}) if self.resume == "auto" else {}
        return saved.get("persona") if saved.get("data") == source else None

    def _fitting_steps(self, model: ModelConfig, config: TrainConfig) -> int:
        """The number of steps that fits the time budget; at most the preset's without a budget.

        A run that is in the folder keeps its length if that is within a factor of 1.5: estimates
        differ from day to day, and another length changes the schedule.
        """
        one = dataclasses.replace(config, max_steps=1)
        rate = product_rate(choose_device(config.device, config.dtype))
        steps = max(1, round(60 * (self.minutes or 3) / estimate_seconds(model, one, rate)))
        saved = self._saved_run()[1].get("train", {})
        before = saved.get("max_steps", 0) if self.resume == "auto" else 0
        if not self.minutes:
            return before or min(steps, config.max_steps)
        return before if 2 / 3 < steps / max(before, 1) < 3 / 2 else steps

    def describe(self) -> str:
        """Parameters, data, steps, memory, time and run folder, one line each."""
        model, data, config = self.configs()
        device = choose_device(config.device, config.dtype)
        minutes = estimate_seconds(model, config, product_rate(device)) / 60
        memory = estimate_memory(model, config) / 2**20
        small = " (small and short: there is no GPU here)" if self.is_fallback else ""
        lines = {
            "preset": self.preset_name + small,
            "model": f"{model.num_parameters / 1e6:.2f}M parameters: {model.num_hidden_layers} "
            f"layers of width {model.hidden_size}, context {model.max_position_embeddings}",
            "data": data.data,
            **({"companion": data.persona or "as its language has it"} if self.language else {}),
            "training": f"{config.max_steps:,} steps of {config.batch_tokens:,} tokens, peak "
            f"learning rate {peak_rates(model, config)[0]:g}",
            "memory": f"{memory:,.0f} MB for weights, gradients and optimizer, plus activations",
            "time": f"about {minutes:.1f} minutes on {device.device}: a guess before training",
            "run folder": f"{self.run_folder.as_posix()}: {self._folder_status(model, data)}",
        }
        return "\n".join(f"{name + ':':12}{value}" for name, value in lines.items())

    def _folder_status(self, model: ModelConfig, data: DataConfig) -> str:
        place, saved = self._saved_run()
        if not saved:
            return "new"
        if self.resume == "never":
            return "holds a run, which is moved aside"
        before = {**asdict(DataConfig()), **saved.get("data", {})}  # of an earlier version
        if (saved.get("model"), before) != (asdict(model), asdict(data)):
            return "HOLDS A RUN WITH OTHER SETTINGS; choose another folder, or resume = never"
        steps = saved["train"]["max_steps"]
        if place != self.run_folder:
            return f"resumes the run of {steps} steps in {place}"
        lines = MetricsLog.read(self.run_folder / "metrics.jsonl")
        step = lines[-1]["step"] if lines else 0
        return f"holds a run at step {step} of {steps}, which is resumed"

    def _saved_run(self) -> tuple[Path, dict[str, Any]]:
        """Where the run to resume is, run folder or mirror, and its config.json."""
        for place in (self.run_folder, *([Path(self.mirror)] if self.mirror else [])):
            saved = read_json(place / "config.json")
            if saved:
                return place, saved
        return self.run_folder, {}
