"""Where the embedded model lies, and whether its files are whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path

DEMO = Path(__file__).resolve().parent
WEIGHTS = "model.safetensors"
NEEDED = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
INSTALL = "pip install 'sglang-margingate[demo]', or name a model with --model-path"
RESTORE = "restore it with `git checkout -- sglang_margingate/demo/model` or retrain (see its README.md)"


class ModelFilesError(ValueError):
    """A model folder that cannot be served; the message is one line and names the file and the fix."""


def model_path() -> Path:
    """Return the folder of the embedded model."""
    return DEMO / "model"


def prompts_path() -> Path:
    """Return the folder of the committed held-out prompts."""
    return DEMO / "prompts"


def check_model_dir(path: str | Path, fix: str = RESTORE) -> None:
    """Raise `ModelFilesError` unless the folder's files are there and its weights file is whole.

    Reads the safetensors header only: it states where each tensor ends, so a file cut short anywhere is found without
    reading the weights.
    """
    folder = Path(path)
    if folder == model_path() and not folder.is_dir():
        raise ModelFilesError(f"the embedded model is not installed here: {INSTALL}")
    for name in NEEDED:
        if not (folder / name).is_file():
            raise ModelFilesError(f"{folder / name} is missing: {fix}")
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError:
            raise ModelFilesError(f"{folder / name} is not valid JSON: {fix}") from None
    weights = folder / WEIGHTS
    size = weights.stat().st_size
    with weights.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if prefix.startswith(b"version "):
            raise ModelFilesError(f"{weights} is a Git LFS pointer, not weights: run `git lfs pull`, or {fix}")
        if not 2 <= length <= size - 8:
            raise ModelFilesError(f"{weights} is truncated ({size} bytes, header incomplete): {fix}")
        try:
            header = json.loads(file.read(length))
            end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelFilesError(f"{weights} has a damaged safetensors header: {fix}") from None
    expected = 8 + length + end
    if end == 0 or size != expected:
        state = "truncated" if size < expected else "damaged"
        raise ModelFilesError(f"{weights} is {state} ({size} of {expected} bytes): {fix}")
