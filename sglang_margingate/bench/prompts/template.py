"""Chat templates: plain user text to the string that the model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sglang_margingate.bench.servers.client import Prompt

EMBEDDED_MODEL = "margingate-demo"


class TemplateError(ValueError):
    """The chat template cannot be found; one line with the fix."""


class Template(NamedTuple):
    """A way to render user text, and its name for messages."""

    name: str
    render: Callable[[str], str]

    def apply(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts rendered; token ids stay as they are."""
        return [p if p.ids else replace(p, text=self.render(p.text)) for p in prompts]


PLAIN = Template("none", lambda text: text)
NO_TEXT = Template("none (token ids)", lambda text: text)


def is_embedded(model: str) -> bool:
    """Return whether a model name or folder is the embedded model."""
    from sglang_margingate.demo.paths import model_path

    if model == EMBEDDED_MODEL:
        return True
    path = Path(model)
    # A server on another machine has the same folder under another root.
    here = model_path()  # may be missing: the embedded model is a distribution of its own
    return (path.exists() and here.exists() and path.samefile(here)) or path.parts[-3:] == here.parts[-3:]


def find_template(model: str, tokenizer: str | None = None) -> Template:
    """Return the chat template of a model.

    Parameters
    ----------
    model
        Name or folder, as the server gives it.
    tokenizer
        Folder or hub id of the tokenizer where it is another.

    Raises
    ------
    TemplateError
        Neither the embedded model nor a tokenizer with a chat template.
    """
    if tokenizer is None and is_embedded(model):
        from sglang_margingate.demo.chat import render_prompt

        return Template("embedded model's", render_prompt)
    name = tokenizer or model
    skip = "use --no-template to send plain text"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise TemplateError(
            f"the chat template of {name} needs transformers (pip install transformers); or {skip}"
        ) from None
    try:
        tok = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise TemplateError(f"no tokenizer {name!r} here ({reason}); name one with --tokenizer, or {skip}") from None
    if not getattr(tok, "chat_template", None):
        raise TemplateError(f"the tokenizer {name!r} has no chat template; {skip}")
    # The server tokenizes the text again and adds its BOS there: the template's own would be a second one.
    bos = tok.bos_token if tok.bos_token and tok("x").input_ids[:1] == [tok.bos_token_id] else ""

    def render(text: str) -> str:
        chat = tok.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return str(chat).removeprefix(bos)

    return Template(f"{name}'s", render)
