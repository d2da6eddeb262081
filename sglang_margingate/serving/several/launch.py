"""What a server over several GPUs needs before its schedulers start."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from sglang_margingate.serving import sgl
from sglang_margingate.serving.several.schedulers import RUN_ENV
from sglang_margingate.settings import several

CPU_CORES = "SGLANG_CPU_OMP_THREADS_BIND"
"""Which cores each rank on a CPU computes with, as 0|1."""


def prepare(server_args: Any, args: Any, verifies: bool) -> None:
    """Check that the model can be cut over the ranks, and set the variables that they must start with.

    Parameters
    ----------
    server_args, args
        SGLang's settings, as an object and resolved.
    verifies
        The policy does; where it only looks on, sums over ranks stay SGLang's own.

    Raises
    ------
    ConfigError
        One line with the setting and the fix.
    """
    os.environ.pop(RUN_ENV, None)
    if args.dp_size > 1:  # all schedulers write one run
        os.environ[RUN_ENV] = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}/{os.getpid()}"
    if args.device == "cpu" and args.tp_size > 1:
        # SGLang asks for it where there are fewer NUMA nodes than ranks.
        os.environ.setdefault(CPU_CORES, several.share_cores(sorted(os.sched_getaffinity(0)), args.tp_size))
    if args.tp_size == args.dp_size == 1 or not verifies:
        return
    model = sgl.model_config(server_args)
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    several.check_split(args, model.num_attention_heads, model.get_total_num_kv_heads(), gpus)
    os.environ.update(several.environment(args, model.hidden_size, os.environ))
