"""Train the byte-level BPE tokenizer and write its Hugging Face files.

``python -m sglang_margingate.demo.tokenizer --out DIR``
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_margingate.demo.chat import CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS
from sglang_margingate.demo.corpora import CORPORA, TRAIN, generate

VOCAB_SIZE = 2048
MAX_LENGTH = 2048


def training_texts(documents: int, seed: int) -> Iterator[str]:
    """Yield prompts and completions of all corpora in turn."""
    rng = random.Random(seed)
    for _ in range(documents):
        for name in CORPORA:
            document = generate(name, rng, TRAIN)
            yield document.prompt
            yield document.completion


def train_tokenizer(documents: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Any:
    """Train a byte-level BPE that keeps digits apart, so that numbers are spelled digit by digit."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(documents, seed), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Any, out: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template)."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train and write the tokenizer."""
    parser = argparse.ArgumentParser(prog="python -m sglang_margingate.demo.tokenizer", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write into")
    parser.add_argument("--documents", type=int, default=20_000, help="documents of each corpus to learn from")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tokenizer = train_tokenizer(args.documents, args.seed)
    write_tokenizer(tokenizer, args.out)
    print(f"wrote {tokenizer.get_vocab_size()} entries to {args.out}")


if __name__ == "__main__":
    main()
