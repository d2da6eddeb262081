"""The one chat format of the demo model, as training wrote it."""

from __future__ import annotations

EOS = "<|endoftext|>"
PAD = "<|pad|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (EOS, PAD, USER, ASSISTANT)

# Gives for one user message exactly `render_prompt`. There is no BOS. A system message reads as more user text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|endoftext|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def render_prompt(prompt: str) -> str:
    """Put plain user text into the chat template: the string to send to ``/generate`` or to tokenize.

    The tokenizer adds nothing of its own (no BOS), so the token ids of this string are those seen in training.
    """
    return f"{USER}{prompt}{ASSISTANT}"
