"""Write a checkpoint of random weights for a model shape, as ``margingate doctor --shape`` does.

    python tests/gpu/random_model.py SHAPE_DIR OUT_DIR [DEVICE]

SHAPE_DIR holds the shape's ``config.json``. One fixed seed: every server of a session has the same weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from sglang_margingate.bench.kernels.random_weights import (
    ARCHITECTURES,
    STD,
    Sizes,
    end_sizes,
    layer_sizes,
    main,
)

__all__ = ["ARCHITECTURES", "STD", "Sizes", "end_sizes", "layer_sizes", "main"]

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
