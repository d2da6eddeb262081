"""Compare the samples that two runs of lm-evaluation-harness logged; exit status 1 where one differs.

python examples/lm_eval/compare.py out/1 out/16
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def samples(folder: Path, task: str) -> dict[int, object]:
    """Return what the server answered to each document of a task."""
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["doc_id"]: row["resps"] for row in rows}


def main(one: str, other: str) -> int:
    """Print how many samples of each task are the same."""
    different = 0
    for task in ("margingate_generate", "margingate_loglikelihood"):
        a, b = (samples(Path(folder), task) for folder in (one, other))
        same = sum(a[k] == b.get(k) for k in a)
        print(f"{task}: {same}/{len(a)} the same")
        different += same != len(a) or len(a) != len(b)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
