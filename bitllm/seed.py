"""The seed guide's checkpoints, read as models of this program."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from bitllm_core import BitLM, ModelConfig, first_line

_SEED_NAMES = {
    "model.output_layer": "lm_head",
    "token_embedding": "embed_tokens",
    "position_embedding": "embed_positions",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.out_proj": "attn.o_proj",
    "attn": "self_attn",
    "ff.w_1": "mlp.up_proj",
    "ff.w_2": "mlp.down_proj",
}


def import_seed_checkpoint(path: str | Path, num_attention_heads: int = 8) -> BitLM:
    """Turn the seed script's `mi_llm_checkpoint.pth` or `mi_llm_epoch_N.pth` into a `BitLM`.
    The file does not have the number of heads. Nothing in it is executed; ValueError if it differs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the seed script's checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch stores; a bomb would be compressed
            if sum(item.file_size for item in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")
        saved = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
        weights = {}
        for name, tensor in saved.items():
            name = f"model.{name}"
            for old, new in _SEED_NAMES.items():
                name = name.replace(old, new)
            weights[name] = tensor.float()
        V, D = weights["model.embed_tokens.weight"].shape
        T = len(weights["model.embed_positions.weight"])
        ups = [tensor for name, tensor in weights.items() if "up_proj" in name]  # one per layer
        shape = (V, D, len(ups[0]), len(ups), num_attention_heads, None, T)
        config = ModelConfig(*shape, tie_word_embeddings=False, linear="weight_only", block="seed")
        model = BitLM(config, seed=None)
        model.load_state_dict(weights)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{path}: not a checkpoint of the seed script ({why})") from error
    return model
