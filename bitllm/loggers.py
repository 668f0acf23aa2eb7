"""TensorBoard and Weights & Biases: the lines of metrics.jsonl, as curves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitllm_core import Callback, MetricsLog, TrainState, first_line, library, log, read_json


class _Curves(Callback):
    """Hands every line of metrics.jsonl to `write`, in order, those of earlier sessions first.

    An error ends the writing for this session, not the training; the next session catches up.
    """

    write: Callable[[dict[str, Any]], None]
    close: Callable[[], None]

    def __init__(self, out: str | Path) -> None:
        self.out, self.failed = Path(out), False
        self.library = library(type(self).__name__.lower(), type(self).__name__)

    def on_start(self, state: TrainState) -> None:
        for line in MetricsLog.read(self.out / "metrics.jsonl"):
            self._try(lambda line=line: self.write(line))

    def on_step(self, state: TrainState, metrics: dict[str, Any] | None) -> None:
        if metrics:
            self._try(lambda: self.write(metrics))

    on_eval = on_step

    def on_end(self, state: TrainState) -> None:
        self._try(lambda: self.close())

    def _try(self, work: Callable[[], None]) -> None:
        try:
            if not self.failed:
                work()
        except Exception as error:  # a full disk, no network: training continues
            self.failed, name = True, type(self).__name__
            what = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
            log.warning(f"{name}: {what}. It gets no more in this session; metrics.jsonl has all")


def curve_points(line: dict[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl under names for charts: `train/loss`, `flip_rate/layer_03`."""
    kind = "final" if line.get("final") else "validation" if "val_loss" in line else "train"
    points = {}
    for name, value in line.items():
        if isinstance(value, dict):  # of a mixture's sources
            points |= {f"{name}/{source}": x for source, x in value.items() if x is not None}
        elif isinstance(value, list):
            points |= {f"{name}/layer_{layer:02}": x for layer, x in enumerate(value)}
        elif name not in ("step", "final"):
            points[f"{kind}/{name}"] = value
    return points


class TensorBoard(_Curves):
    """The lines of metrics.jsonl, for `tensorboard --logdir OUT/tensorboard`.

    Each session writes the whole curve anew and makes TensorBoard forget what it read before, so
    that no step is there twice and none that was rolled back. ImportError: it is not installed.
    """

    writer: Any = None

    def write(self, line: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-not-found]
        from torch.utils.tensorboard.writer import SummaryWriter

        if self.writer is None:
            self.writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=0)
        points = [{"tag": tag, "simple_value": x} for tag, x in curve_points(line).items()]
        # in one event: add_scalar writes one a number, which takes twenty times as long
        self.writer.file_writer.add_summary(Summary(value=points), line["step"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()


class WandB(_Curves):
    """The lines of metrics.jsonl, at Weights & Biases; ImportError: it is not installed.

    All sessions of a run, on any machine, continue one run there: its id is made of the first
    training line. W&B takes no step twice, so of steps that were rolled back it keeps what came
    first, which an exact resume would repeat. Without a network, W&B gives up after a minute and a
    half, for which training waits. WANDB_MODE=offline leaves the whole curve of each session in
    OUT/wandb: `wandb sync` the newest.
    """

    def __init__(self, out: str | Path, project: str = "bitllm") -> None:
        super().__init__(out)
        self.project, self.run, self.first = project, None, 0
        self.waiting: list[dict[str, Any]] = []

    def write(self, line: dict[str, Any]) -> None:
        self.waiting.append(line)
        if self.run is None and "train_seconds" in line:  # with times no two runs are alike
            self.run = self.library.init(
                project=self.project,
                dir=str(self.out),
                id=hashlib.sha256(json.dumps(line).encode()).hexdigest()[:16],
                name=self.out.resolve().name,
                resume="allow",
                config=read_json(self.out / "config.json"),
            )
            self.first = self.run.step  # the one after the last that is there
        while self.run and self.waiting:
            line = self.waiting.pop(0)
            if line["step"] >= self.first:
                self.run.log(curve_points(line), step=line["step"])

    def close(self) -> None:
        if self.run:
            self.run.finish()
