"""A conversation with a model: in the terminal, and the same in notebooks."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitllm.conversations import IM_END, Message, can_chat, encode_messages, require_chat
from bitllm.vocabulary import Decoder
from bitllm_core import BitLM, SamplingConfig, generate_tokens, load_model, num_ids, stream

log = logging.getLogger("bitllm")

ANSWER_TOKENS = 64  # of the context are left for an answer, at least, or a quarter of it
SAMPLING = SamplingConfig(max_new_tokens=200, temperature=0.3, top_k=20)


def room_of(context: int) -> int:
    """How many tokens of a context the history may take."""
    return context - min(ANSWER_TOKENS, context // 4)


class Chat:
    """One conversation; `messages` is its history, in the shape that chat templates take.

    Raises:
        ValueError: the model was not trained on conversations.
    """

    def __init__(self, model: BitLM, tokenizer: Any, sampling: SamplingConfig = SAMPLING) -> None:
        require_chat(tokenizer)
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.messages: list[Message] = []
        self._told = False

    def new(self) -> None:
        """Begin a new conversation."""
        self.messages, self._told = [], False

    def prompt(self) -> list[int]:
        """Tokens of the history that fits into the context: the oldest turns are dropped whole."""
        context = self.model.config.max_position_embeddings
        room = room_of(context)
        kept = list(self.messages)
        ids = encode_messages(self.tokenizer, kept)
        while len(ids) > room and len(kept) > 1:
            kept = kept[1:]
            while len(kept) > 1 and kept[0]["role"] != "user":
                kept = kept[1:]
            ids = encode_messages(self.tokenizer, kept)
        if len(kept) < len(self.messages) and not self._told:
            self._told = True
            log.info(
                f"the conversation is longer than {context} tokens: its first turns are left out"
            )
        return ids

    def reply(self, text: str) -> Iterator[str]:
        """Say something; yield the answer piece by piece, in complete characters."""
        self.messages.append({"role": "user", "content": text})
        decoder, answer = Decoder(skip_special_tokens=True), ""
        end, size = self.tokenizer.token_to_id(IM_END), num_ids(self.tokenizer)
        tokens = generate_tokens(self.model, [self.prompt()], self.sampling, end, size)
        for (token,) in tokens:
            piece = decoder.step(self.tokenizer, token) if token is not None else None
            if piece:
                answer += piece
                yield piece
        self.messages.append({"role": "assistant", "content": answer})

    def answer(self, text: str) -> str:
        """Say something; return the whole answer."""
        return "".join(self.reply(text))


def respond(
    model: BitLM, tokenizer: Any, prompt: str, sampling: SamplingConfig | None = None
) -> Iterator[str]:
    """What a model has to say, piece by piece: an answer to `prompt`, where it was trained on
    conversations, and how the text goes on, where it was not."""
    if can_chat(tokenizer):
        return Chat(model, tokenizer, sampling or SAMPLING).reply(prompt)
    return stream(model, tokenizer, prompt, sampling or SamplingConfig())


HELP = "/new begins a new conversation, /quit ends"


def chat(path: str | Path, checkpoint: str | int = "last", sampling: Any = SAMPLING) -> None:
    """Talk with a model in the terminal until /quit or the end of the input."""
    talk = Chat(*load_model(path, checkpoint), sampling)
    with contextlib.suppress(ImportError):  # arrows bring back what was typed
        import readline  # noqa: F401
    print(HELP)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/new":
            talk.new()
        elif text.startswith("/"):
            print(HELP)
        elif text:
            for piece in talk.reply(text):
                print(piece, end="", flush=True)
            print()
