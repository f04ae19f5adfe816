"""Conversations as text and token ids, under the tokenizer's chat template or, where it has none, a plain one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Message = dict[str, str]
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
"""For base models, whose tokenizers have no chat template: the messages, an empty line after each."""


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template of its own."""
    return getattr(tokenizer, "chat_template", "its own") is not None


def render(tokenizer: Any, messages: Sequence[Message], template_arguments: Mapping[str, Any] | None = None) -> str:
    """The conversation up to where the next answer starts; `template_arguments` go to `apply_chat_template`."""
    arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    if not has_template(tokenizer):
        arguments["chat_template"] = PLAIN_TEMPLATE
    return tokenizer.apply_chat_template(list(messages), **{**arguments, **(template_arguments or {})})


def check_parts(text: str, parts: Iterable[tuple[str, str]], hint: str) -> None:
    """Raise ValueError unless the rendered `text` holds all `(name, part)`, in this order, but for what is trimmed at
    their ends: templates of reasoning models cut the reasoning of earlier turns."""
    found = 0
    for name, part in parts:
        part = part.strip()
        found = text.find(part, found)
        if found < 0:
            short = part if len(part) <= 60 else part[:40] + " ... " + part[-15:]
            raise ValueError(f"the chat template drops or changes a part of {name}, {short!r}: {hint}")
        found += len(part)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered conversation. A chat template writes special tokens itself; without one the tokenizer
    opens the text as it opens any document."""
    if has_template(tokenizer):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
