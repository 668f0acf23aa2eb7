"""CUDA graphs: the launches of a whole micro-step, or of one generated token, sent as one.

A small model spends its time on a GPU waiting for Python to launch kernels: 37 ms for a step whose
kernels take 8 ms (6 layers x 512, 8,192 tokens, H200). A graph records the launches once and
replays them with one call. Everything in it has to stay where it was: input, gradients, cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bitllm_core as core
from bitllm.muon import batches

WARM_UP = 3
"""Calls before a recording, on a stream of their own, as torch's documentation asks for."""


class Recording:
    """A function without arguments whose CUDA launches are recorded once and replayed.

    Args:
        work: may not wait for the device; what it returns is overwritten by the next replay.
        reset: called after the calls that warm it up, and after the recording.
        warm_up: calls before the recording; 0 for work that was done before.

    What cannot be recorded, as on another device, is called again by each replay.
    """

    def __init__(
        self,
        work: Callable[[], Any],
        device: torch.device,
        reset: Callable[[], None] = lambda: None,
        warm_up: int = WARM_UP,
    ) -> None:
        self.work, self.graph = work, None
        try:
            if device.type == "cuda":
                self._record(reset, warm_up)
        except RuntimeError as error:
            if warm_up and isinstance(error, torch.OutOfMemoryError):
                raise  # a smaller micro-batch may fit
            core.log.warning(f"CUDA graphs: off ({core.first_line(error)})")
        reset()

    def _record(self, reset: Callable[[], None], warm_up: int) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                self.work()
        torch.cuda.current_stream().wait_stream(side)
        reset()
        torch.cuda.empty_cache()  # the recording has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = self.work()
        self.graph = graph

    def replay(self) -> Any:
        if self.graph is None:
            return self.work()
        self.graph.replay()
        return self.result


@contextlib.contextmanager
def hold_in_batches(model: core.BitLM, dtype: torch.dtype) -> Iterator[None]:
    """As `model.hold_weights` in training, equal to rounding, with a tenth of the launches."""
    layers = {layer.weight: layer for layer in model.bit_linears().values()}
    try:
        for weights in batches(list(layers)):
            with torch.no_grad():
                held = torch.stack(weights)
                if model.config.linear != "dense":
                    ternary, scales = torch.vmap(core.weight_quant)(held)
                    held = ternary * scales[:, None, None]
            for weight, own in zip(weights, held.to(dtype).unbind(), strict=True):
                layers[weight].held = own
        yield
    finally:
        for layer in layers.values():
            layer.held = None


class RecordedStep:
    """A training session's micro-step, recorded for each shape of its input.

    Args:
        step: takes inputs and targets, (B, T) each, adds up the gradients of `parameters` in their
            `.grad` and returns the loss.
        model: its weights are held in `dtype` inside the recording, since what is held outside
            lies elsewhere in every step.
        windows: of a whole step; where one micro-step takes them all, nothing is added up.

    The gradients are tensors of this object, which stay where they are; they are put in their
    places whenever `.grad` is none of them, as after an optimizer step.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        model: core.BitLM,
        dtype: torch.dtype,
        parameters: Sequence[Tensor],
        windows: int,
    ) -> None:
        self.step, self.model, self.dtype, self.parameters = step, model, dtype, parameters
        self.windows = windows
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.recordings: dict[tuple[torch.Size, bool], tuple[Tensor, Tensor, Recording]] = {}

    def place(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def begin(self) -> None:
        """Zero the gradients and put them in their places."""
        torch._foreach_zero_(self.gradients)  # pyright: ignore[reportPrivateImportUsage]
        self.place()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        with hold_in_batches(self.model, self.dtype):
            return self.step(x, y)

    def replace(self, x: Tensor, y: Tensor) -> Tensor:
        """`begin` and `add` in one, with two passes over the gradients less."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.add(x, y)
        pairs = zip(self.gradients, self.parameters, strict=True)
        own, new = zip(*((g, p.grad) for g, p in pairs if p.grad is not None), strict=True)
        torch._foreach_copy_(own, new)  # pyright: ignore[reportPrivateImportUsage]
        self.place()
        return loss

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of these windows, to be read before the next call."""
        first = self.parameters[0].grad is not self.gradients[0]
        whole = first and len(x) == self.windows
        if (x.shape, whole) not in self.recordings:
            self._record(x.clone(), y.clone(), whole)
        if first:
            self.place() if whole else self.begin()
        own_x, own_y, recording = self.recordings[x.shape, whole]
        own_x.copy_(x)
        own_y.copy_(y)
        return recording.replay()

    def _record(self, x: Tensor, y: Tensor, whole: bool) -> None:
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        self.begin()
        work = partial(self.replace if whole else self.add, x, y)
        recording = Recording(work, x.device, self.begin)
        for gradient, value in zip(self.gradients, before, strict=True):
            if value is not None:  # a smaller last micro-batch is recorded within a step
                gradient.copy_(value)
        self.recordings[x.shape, whole] = x, y, recording


class RecordedUpdate:
    """An optimizer's `step`, recorded: Python takes longer for a small model's than the GPU.

    The recording reads the learning rates from tensors, and so do the steps that are not recorded:
    the first, which makes the optimizer's state, and all where recording fails.

    Args:
        optimizer: its parameters' gradients lie in the same place in every step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.plain, self.groups = optimizer.step, optimizer.param_groups
        self.device = self.groups[0]["params"][0].device
        self.rates = [torch.zeros((), device=self.device) for _ in self.groups]
        self.begun, self.recording = False, None

    def update(self) -> None:
        given = [dict(group) for group in self.groups]
        try:
            for group, rate in zip(self.groups, self.rates, strict=True):
                group.update(lr=rate, capturable=True)  # without this, AdamW refuses a recording
            self.plain()
        finally:
            for group, before in zip(self.groups, given, strict=True):
                group.clear()
                group.update(before)

    def __call__(self) -> None:
        for group, rate in zip(self.groups, self.rates, strict=True):
            rate.fill_(group["lr"])
        if self.begun and self.recording is None:
            self.recording = Recording(self.update, self.device, warm_up=0)
        if self.recording is not None:
            self.recording.replay()
        else:
            self.update()
        self.begun = True


class RecordedDecoder:
    """The step of a generation: one token for each row in, its logits out, recorded.

    Args:
        model: frozen, with its weights held; in eval mode.
        cache: filled by the prompt; all of it is read under a mask, so that the shapes stay.
        left_pad: (B,), how many tokens at the beginning of each row are only filling; or None.
    """

    def __init__(self, model: core.BitLM, cache: core.KVCache, left_pad: Tensor | None) -> None:
        self.model, self.cache = model, cache
        keys: Any = cache.keys
        rows, limit, device = keys.shape[1], keys.shape[3], keys.device
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.keys_at = torch.arange(limit, device=device)
        self.left_pad = left_pad
        self.position.fill_(cache.length)
        self.recording = Recording(self._step, device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What attention calls: store at the position and return all of the cache."""
        whole = self.cache.keys[layer], self.cache.values[layer]
        for stored, new in zip(whole, (keys, values), strict=True):
            stored.index_copy_(2, self.position, new.to(stored.dtype))
        return whole

    def _step(self) -> Tensor:
        seen = self.keys_at <= self.position  # (limit)
        at = self.position  # (1)
        if self.left_pad is not None:
            seen = seen & (self.keys_at >= self.left_pad[:, None])  # (B, limit)
            at = (self.position - self.left_pad[:, None]).clamp(min=0)  # (B, 1)
        mask = seen.view(-1, 1, 1, len(self.keys_at))
        hidden = self.model.blocks(self.model.embed(self.tokens, at), at, self, mask)
        return self.model.head(hidden)

    def __call__(self, tokens: Tensor, cache: core.KVCache, left_pad: Tensor | None) -> Tensor:
        """Logits, (B, 1, V), after `tokens`, (B, 1); the next call overwrites them."""
        self.tokens.copy_(tokens)
        self.position.fill_(self.cache.length)
        logits = self.recording.replay()
        self.cache.length += 1
        return logits


core.DECODERS["cuda"] = RecordedDecoder
