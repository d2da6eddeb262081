"""Write 100 samples for each of the two tasks beside this file, from the embedded model's prompts: no hub is needed.

python examples/lm_eval/make_data.py
"""

from __future__ import annotations

import json
from pathlib import Path

from sglang_margingate.bench.prompts.embedded import demo_prompts

HERE, SAMPLES = Path(__file__).parent, 100


def main() -> None:
    """Write ``generate.jsonl`` (a prompt and a word to look for) and ``loglikelihood.jsonl`` (a context and its rest)."""
    texts = [prompt.text.strip() for prompt in demo_prompts(SAMPLES)]
    with (HERE / "generate.jsonl").open("w") as file:
        file.writelines(json.dumps({"question": text, "answer": "the"}) + "\n" for text in texts)
    with (HERE / "loglikelihood.jsonl").open("w") as file:
        for text in texts:
            words = text.split(" ")
            cut = max(1, len(words) // 2)
            file.write(json.dumps({"context": " ".join(words[:cut]), "rest": " " + " ".join(words[cut:])}) + "\n")


if __name__ == "__main__":
    main()
