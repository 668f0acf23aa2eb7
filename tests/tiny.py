"""The smallest run that has everything; tests change what they are about."""

import signal

import bitllm_core as bit

MODEL = bit.ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)
TRAIN = bit.TrainConfig(
    max_steps=12,
    batch_tokens=128,
    warmup_steps=2,
    log_every_steps=2,
    eval_every_steps=4,
    eval_tokens=256,
    save_every_steps=3,
    dtype="float32",
    compile="off",
)


class StopAt(bit.Callback):
    """Stops after a step, as Ctrl-C would."""

    def __init__(self, step):
        self.step = step

    def on_step(self, state, metrics):
        if state.step == self.step:
            state.stop_signal = signal.SIGINT
