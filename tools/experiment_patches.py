"""Changes of the core that only experiments make: each is a context around one run.

A context may return a callback for the run. The core looks up what is patched at each call, so that
training and evaluation both see the patch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import bitllm_core as bit


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace `owner.name` by what `make` returns for it."""
    with mock.patch.object(owner, name, make(getattr(owner, name))):
        yield


@contextlib.contextmanager
def callback(make: Callable[[], bit.Callback]) -> Iterator[bit.Callback]:
    yield make()


# -----------------------------------------------------------------------------
# Initial weights


def initialized(change: Callable[[bit.BitLM], None]) -> Any:
    """The usual initial weights, then `change`."""

    def make(initialize):
        def changed(model, generator):
            initialize(model, generator)
            with torch.no_grad():
                change(model)

        return changed

    return replaced(bit, "initialize", make)


def scaled_projections(gain: float) -> Callable[[bit.BitLM], None]:
    """Multiply the matrices that write to the residual stream by `gain`."""

    def change(model):
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(gain)

    return change


def embedding_std(std: float) -> Callable[[bit.BitLM], None]:
    return lambda model: model.model.embed_tokens.weight.mul_(std / 0.02)


# -----------------------------------------------------------------------------
# Model and loss


def z_loss(weight: float) -> Any:
    """Add `weight` times the squared log of the softmax's denominator to the training loss."""

    def make(_):
        def loss(self, input_ids, targets, blocks=None, softmax=None):
            logits = self(input_ids).flatten(0, 1).float()  # (B * T, V)
            nats = F.cross_entropy(logits, targets.flatten(), reduction="sum")
            if torch.is_grad_enabled():
                nats = nats + weight * logits.logsumexp(-1).square().sum()
            return nats

        return loss

    return replaced(bit.BitLM, "loss", make)


def median_scale() -> Any:
    """Scale each ternary matrix by the median of its magnitudes instead of the mean."""

    def make(_):
        def quant(weight):
            weight = weight.float()
            scale = weight.abs().median().clamp(min=1e-5)
            return (weight / scale).round().clamp(-1, 1), scale

        return quant

    return replaced(bit, "weight_quant", make)


@contextlib.contextmanager
def full_precision_until(share: float) -> Iterator[bit.Callback]:
    """Train dense for the first share of the steps (eager: a compiler would keep one program)."""
    dense = True

    class Switch(bit.Callback):
        def on_step(self, state, metrics):
            nonlocal dense
            dense = state.step < share * state.config.max_steps

    def weights(quant):
        return lambda w: (w.float(), w.new_ones(())) if dense else quant(w)

    def activations(quant):
        return lambda x: x.float() if dense else quant(x)

    with replaced(bit, "weight_quant", weights), replaced(bit, "activation_quant", activations):
        yield Switch()


@contextlib.contextmanager
def without_sub_norms() -> Iterator[None]:
    """Leave out BitNet's norms before `o_proj` and `down_proj`."""

    def make(init):
        def changed(self, *args, **kwargs):
            init(self, *args, **kwargs)
            for name in ("attn_sub_norm", "ffn_sub_norm"):
                if hasattr(self, name):
                    setattr(self, name, torch.nn.Identity())

        return changed

    with (
        replaced(bit.Attention, "__init__", make),
        replaced(bit.FeedForward, "__init__", make),
    ):
        yield


def dropout(rate: float) -> Any:
    """Dropout on what each half of a block adds to the residual stream, in training."""

    def make(_):
        def forward(self, x, rope, cache, mask):
            training = torch.is_grad_enabled()
            y = self.self_attn(self.input_layernorm(x), rope, cache, mask)
            x = x + F.dropout(y, rate, training)
            return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), rate, training)

        return forward

    return replaced(bit.Block, "forward", make)


# -----------------------------------------------------------------------------
# Optimizers


class EachStep(bit.Callback):
    """Sets an option of the optimizers as a function of the share of the steps that are done."""

    def __init__(self, name: str, value: Callable[[float], float]) -> None:
        self.name, self.value = name, value

    def on_start(self, state):
        self.on_step(state, None)

    def on_step(self, state, metrics):
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                if self.name in group:
                    group[self.name] = self.value(state.step / state.config.max_steps)


def each_step(name: str, value: Callable[[float], float]) -> Any:
    return callback(lambda: EachStep(name, value))


class Decay(bit.Callback):
    """Lets the weight decay of the matrices follow the learning rate, to 0 in the cooldown."""

    def on_step(self, state, metrics):
        factor = bit.learning_rate_factor(state.config, state.step)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                if group["weight_decay"]:
                    group["weight_decay"] = max(state.config.weight_decay * factor, 1e-12)


@contextlib.contextmanager
def first_defaults() -> Iterator[bit.Callback]:
    """The initial weights and the Newton-Schulz steps of the first version."""
    with (
        initialized(scaled_projections(10.0)),
        each_step("ns_steps", lambda done: 5) as five_steps,
    ):
        yield five_steps


PATCHES: dict[str, Callable[[], Any]] = {
    "the first defaults": first_defaults,
    "zero-init projections": lambda: initialized(scaled_projections(0.0)),
    "projections x 10": lambda: initialized(scaled_projections(10.0)),
    "embedding std 0.1": lambda: initialized(embedding_std(0.1)),
    "embedding std 0.005": lambda: initialized(embedding_std(0.005)),
    "z-loss 1e-4": lambda: z_loss(1e-4),
    "median scale": median_scale,
    "dense for the first 20%": lambda: full_precision_until(0.2),
    "no sub-norms": without_sub_norms,
    "dropout 0.1": lambda: dropout(0.1),
    "dropout 0.2": lambda: dropout(0.2),
    "momentum 0.85 to 0.95": lambda: each_step(
        "momentum", lambda done: 0.85 + 0.10 * min(done / 0.3, 1)
    ),
    "weight decay to 0": lambda: callback(Decay),
    "2 Newton-Schulz steps": lambda: each_step("ns_steps", lambda done: 2),
    "5 Newton-Schulz steps": lambda: each_step("ns_steps", lambda done: 5),
}
"""By name; a variant of a table names one of them."""
