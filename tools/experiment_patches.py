"""Changes of the core that only experiments make: each is a context around one run.

A context may return a callback for the run. The core looks up what is patched at each call, so that
training and evaluation both see the patch.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import bitllm_core as bit
from bitllm import muon
from bitllm.cpu import training


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace `owner.name` by what `make` returns for it."""
    with mock.patch.object(owner, name, make(getattr(owner, name))):
        yield


@contextlib.contextmanager
def callback(make: Callable[[], bit.Callback]) -> Iterator[bit.Callback]:
    yield make()


def plain_blocks() -> Any:
    """Train with the core's blocks, which a patch changes, and not with a CPU's kernels."""
    return replaced(
        training, "parts_of", lambda _: lambda model, dtype: (list(model.model.layers), None)
    )


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


def unit_gain(model: bit.BitLM) -> None:
    """Begin with matrices twice as large, as in all rows before they were halved."""
    for layer in model.bit_linears().values():
        layer.weight.mul_(2)


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


def scaled_by(size: Callable[[Tensor], Tensor]) -> Any:
    """Scale each ternary matrix by `size` of its magnitudes instead of their mean."""

    def make(_):
        def quant(weight):
            weight = weight.float()
            scale = size(weight.abs()).clamp(min=1e-5)
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

    with (
        plain_blocks(),
        replaced(bit, "weight_quant", weights),
        replaced(bit, "activation_quant", activations),
    ):
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
        plain_blocks(),
        replaced(bit.Attention, "__init__", make),
        replaced(bit.FeedForward, "__init__", make),
    ):
        yield


@contextlib.contextmanager
def dropout(rate: float) -> Iterator[None]:
    """Dropout on what each half of a block adds to the residual stream, in training."""

    def make(_):
        def forward(self, x, rope, cache, mask):
            training = torch.is_grad_enabled()
            y = self.self_attn(self.input_layernorm(x), rope, cache, mask)
            x = x + F.dropout(y, rate, training)
            return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), rate, training)

        return forward

    with plain_blocks(), replaced(bit.Block, "forward", make):
        yield


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


# -----------------------------------------------------------------------------
# What other projects report to help


def norm_muon(beta: float = 0.95) -> Any:
    """Give each row of Muon's update the same long-run size (NorMuon, Li et al., 2025)."""
    means: dict[Any, Tensor] = {}  # of the squares of each row, by shape of the batch

    def make(updates):
        def changed(self, directions, steps):
            update = torch.stack(list(updates(self, directions, steps)))  # (n, O, I)
            squares = update.square().mean(2, keepdim=True)  # (n, O, 1)
            mean = means.setdefault(update.shape, torch.zeros_like(squares))
            mean.lerp_(squares, 1 - beta)
            even = update / mean.sqrt().clamp(min=1e-8)
            size = update.norm(dim=(1, 2), keepdim=True)
            return (even * (size / even.norm(dim=(1, 2), keepdim=True))).unbind()

        return changed

    return replaced(muon.Muon, "updates", make)


POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
)
"""of Amsel et al., 2025, for its first three steps"""


def polar_express() -> Any:
    """Other coefficients in each step of Muon's iteration."""

    def make(_):
        def orthogonalize(matrices, steps):
            tall = matrices.shape[1] > matrices.shape[2]
            x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
            x = (x.mT if tall else x).bfloat16()
            for a, b, c in POLAR_EXPRESS[:steps]:
                gram = x @ x.mT
                x = a * x + (b * gram + c * gram @ gram) @ x
            return x.mT.contiguous() if tall else x

        return orthogonalize

    return replaced(muon, "orthogonalize", make)


def cautious_decay() -> Any:
    """Decay only where it points the way that the update goes (Chen et al., 2025)."""

    def make(update):
        def changed(self, weights, group):
            before = [weight.clone() for weight in weights]
            update(self, weights, {**group, "weight_decay": 0.0})
            for weight, old in zip(weights, before, strict=True):
                same = (old - weight) * old > 0
                weight.sub_(old * same, alpha=float(group["lr"] * group["weight_decay"]))

        return changed

    return replaced(muon.Muon, "_update", make)


def cooldown_shape(shape: Callable[[float], float]) -> Any:
    """Another curve for the last part of the rate: `shape` of what falls linearly from 1 to 0."""

    def make(factor):
        def changed(config, step, *rest):
            f = factor(config, step, *rest)
            return f if step < bit.warmup_that_fits(config) else shape(f)

        return changed

    return replaced(bit, "learning_rate_factor", make)


@contextlib.contextmanager
def adamw_every_other_step() -> Iterator[None]:
    """Update embedding and norms every second step, with the gradients of both."""
    calls = 0

    def step(original):
        def changed(self, *args):
            nonlocal calls
            calls += 1
            return original(self, *args) if calls % 2 == 0 else None

        return changed

    def zero_grad(original):
        return lambda self, *args: original(self, *args) if calls % 2 == 0 else None

    with (
        replaced(torch.optim.AdamW, "step", step),
        replaced(torch.optim.AdamW, "zero_grad", zero_grad),
    ):
        yield


@contextlib.contextmanager
def two_tokens_ahead(weight: float = 0.5) -> Iterator[bit.Callback]:
    """Let the same logits predict the second next token too, less and less up to two thirds."""
    now = weight

    class Fade(bit.Callback):
        def on_step(self, state, metrics):
            nonlocal now
            now = weight * min(max(2 - 3 * state.step / state.config.max_steps, 0), 1)

    def make(loss):
        def changed(self, input_ids, targets, blocks=(), softmax=None):
            if not now or not torch.is_grad_enabled():
                return loss(self, input_ids, targets, blocks, softmax)
            at = torch.arange(input_ids.shape[1])
            hidden = self.blocks(self.embed(input_ids, at), at, blocks=blocks)
            logits = self.head(hidden).float()  # (B, T, V)
            second = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum"
            )
            return F.cross_entropy(logits.mT, targets, reduction="sum") + now * second

        return changed

    with replaced(bit.BitLM, "loss", make):
        yield Fade()


@contextlib.contextmanager
def learned_scales() -> Iterator[None]:
    """A learned factor for each matrix, from 1."""

    def init(original):
        def changed(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.norm_of_weight = torch.nn.Parameter(torch.ones(1))  # so that it begins as 1

        return changed

    def forward(original):
        return lambda self, x: original(self, x) * self.norm_of_weight

    with (
        replaced(bit.BitLinear, "__init__", init),
        replaced(bit.BitLinear, "forward", forward),
    ):
        yield


def gains_alone() -> Any:
    """Gains of norms move one by one, as in all rows before they were also scaled."""
    return replaced(bit, "scale_gains", lambda _: lambda *args: None)


@contextlib.contextmanager
def together(*patches: Callable[[], Any]) -> Iterator[None]:
    """Several patches at once, none of which has a callback."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch())
        yield


RAMP = 2
"""How many times as large a step is after the first quarter of the tokens."""


@contextlib.contextmanager
def batch_ramp() -> Iterator[None]:
    """Steps of `batch_tokens` for the first quarter of the tokens, `RAMP` times that after it."""

    def in_small_steps(config, step):
        small = config.max_steps // 4
        return min(step, small) + RAMP * max(step - small, 0)

    def batch(original):
        def changed(self, config, context, step):
            small = config.max_steps // 4
            large = dataclasses.replace(config, batch_tokens=config.batch_tokens * RAMP)
            if step < small:
                return original(self, config, context, step)
            return original(self, large, context, small // RAMP + step - small)

        return changed

    def factor(original):
        def changed(config, step, *rest):
            done = step if step < config.warmup_steps else in_small_steps(config, step)
            return original(config, done, *rest)

        return changed

    def tokens(_):
        return property(
            lambda state: in_small_steps(state.config, state.step) * state.config.batch_tokens
        )

    def finished(original):
        def changed(state):
            done = in_small_steps(state.config, state.step)
            return done >= state.config.max_steps or original.fget(state)

        return property(changed)

    with (
        replaced(bit.TokenData, "batch", batch),
        replaced(bit, "learning_rate_factor", factor),
        replaced(bit.TrainState, "finished", finished),
        replaced(bit.TrainState, "tokens", tokens),
    ):
        yield


PATCHES: dict[str, Callable[[], Any]] = {
    "NorMuon": norm_muon,
    "Polar Express": polar_express,
    "cautious decay": cautious_decay,
    "cooldown 1 - sqrt": lambda: cooldown_shape(lambda f: 1 - (1 - f) ** 0.5),
    "cooldown squared": lambda: cooldown_shape(lambda f: f * f),
    "AdamW every other step": adamw_every_other_step,
    "two tokens ahead": two_tokens_ahead,
    "learned scales": learned_scales,
    "gains alone": gains_alone,
    "unit gain": lambda: initialized(unit_gain),
    # 1.53 has the least squared error of three levels for normally distributed weights (Lloyd)
    "1.5 x mean as scale": lambda: scaled_by(lambda sizes: 1.53 * sizes.mean()),
    "0.75 x mean as scale": lambda: scaled_by(lambda sizes: 0.75 * sizes.mean()),
    "NorMuon, learned scales": lambda: together(norm_muon, learned_scales),
    "batch ramp": batch_ramp,
    "the first defaults": first_defaults,
    "zero-init projections": lambda: initialized(scaled_projections(0.0)),
    "projections x 10": lambda: initialized(scaled_projections(10.0)),
    "embedding std 0.1": lambda: initialized(embedding_std(0.1)),
    "embedding std 0.005": lambda: initialized(embedding_std(0.005)),
    "z-loss 1e-4": lambda: z_loss(1e-4),
    "median scale": lambda: scaled_by(torch.median),
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
