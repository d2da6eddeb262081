"""What is examined: a model folder or hub id, a named shape with random weights, or the embedded model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_margingate.bench.kernels.shapes import SHAPES, weight_bytes
from sglang_margingate.bench.options import UsageError
from sglang_margingate.bench.prompts.random_ids import read_config
from sglang_margingate.bench.prompts.template import is_embedded

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
SKIP_TOKENIZER = "--skip-tokenizer-init"
ROOM = 0.9
"""Share of a memory that weights may take: columns of K/V need room, too."""


@dataclass(frozen=True)
class Subject:
    """The model that is examined."""

    name: str
    path: str
    """Folder or hub id; empty for a shape whose weights are not written yet."""
    config: dict[str, Any]
    """``config.json``; empty where it cannot be read here."""
    weights: int | None
    """Bytes of the weights, where they are known."""
    embedded: bool = False
    random: bool = False
    flags: tuple[str, ...] = ()
    """What a server of it is started with beside ``--model-path``."""

    @property
    def vocab(self) -> int | None:
        """Token ids that it knows."""
        found = self.config.get("vocab_size")
        return found if isinstance(found, int) else None

    def kernels(self) -> str:
        """Return the shape that its kernels are run at, as their process takes it; empty where it is not known."""
        c = self.config
        heads, hidden, inner = (c.get(n) for n in ("num_attention_heads", "hidden_size", "intermediate_size"))
        if not all(isinstance(n, int) for n in (heads, hidden, inner, self.vocab)):
            return ""
        size = c.get("head_dim") or hidden // heads  # type: ignore[operator]
        return ",".join(map(str, (heads, c.get("num_key_value_heads", heads), size, hidden, inner, self.vocab)))


def subject_of(model_path: str | None, shape: str | None) -> Subject:
    """Return what the options name.

    Raises
    ------
    UsageError
        One line: an unknown shape, both a model and a shape, a folder that is not there, or no embedded model.
    """
    if model_path and shape:
        raise UsageError(f"--shape {shape}: --model-path {model_path} names a model already; leave one of them out")
    if shape is not None:
        if shape not in SHAPES:
            raise UsageError(f"--shape: {shape!r} is unknown; use {', '.join(SHAPES)}, or a folder with --model-path")
        config = SHAPES[shape]
        return Subject(
            f"{shape}, random weights", "", config, weight_bytes(config), random=True, flags=(SKIP_TOKENIZER,)
        )
    if model_path is not None and is_embedded(model_path):
        model_path = None
    if model_path is None:
        from sglang_margingate.demo.paths import ModelFilesError, check_model_dir
        from sglang_margingate.demo.paths import model_path as embedded

        try:
            check_model_dir(embedded())
        except ModelFilesError as error:
            raise UsageError(f"{error}; or name a model with --model-path or --shape") from None
        return replace(_of_folder(str(embedded())), name="the embedded model, 7.6 M parameters", embedded=True)
    if model_path.startswith(("/", "./", "../", "~")) and not Path(model_path).is_dir():
        raise UsageError(f"--model-path: {model_path} is not a folder; name a model folder or a hub id")
    return _of_folder(model_path)


def _of_folder(path: str) -> Subject:
    folder = Path(path)
    config = read_config(path)
    if not folder.is_dir():
        return Subject(path, path, config, None)
    weights = sum(f.stat().st_size for f in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]) or None
    bare = not any((folder / name).is_file() for name in TOKENIZERS)
    return Subject(folder.resolve().name, path, config, weights, flags=(SKIP_TOKENIZER,) if bare else ())


def too_large(subject: Subject, memory: int | None, where: str) -> str:
    """Return why the weights do not fit, or an empty text."""
    if subject.weights is None or memory is None or subject.weights <= ROOM * memory:
        return ""
    return (
        f"{subject.name} does not fit: {subject.weights / 1e9:.1f} GB of weights, {memory / 1e9:.1f} GB of memory in "
        f"{where}; name a smaller --model-path or --shape, or spread it with -- --tp-size N"
    )


def write_weights(subject: Subject, folder: Path, device: str) -> Subject:
    """Write a shape's random weights into ``folder``; return the subject with its path.

    Raises
    ------
    UsageError
        The disk has no room for them.
    """
    free = shutil.disk_usage(folder).free
    if subject.weights is not None and subject.weights > ROOM * free:
        raise UsageError(
            f"{folder} has {free / 1e9:.1f} GB free, the weights take {subject.weights / 1e9:.1f} GB; "
            "name another folder with --scratch"
        )
    shape, model = folder / "shape", folder / "model"
    shape.mkdir()
    (shape / "config.json").write_text(json.dumps(subject.config))
    module = "sglang_margingate.bench.kernels.random_weights"
    command = [sys.executable, "-m", module, str(shape), str(model), device]
    done = subprocess.run(
        command, capture_output=True, text=True
    )  # in a process of its own, whose GPU memory ends with it
    if done.returncode:
        raise UsageError(f"the weights of {subject.name} could not be written: {done.stderr.strip().splitlines()[-1:]}")
    return replace(subject, path=str(model))
