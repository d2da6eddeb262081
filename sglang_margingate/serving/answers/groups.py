"""The seeds of a group's samples (``n`` above 1): SGLang sends every sample with the request's own."""

from __future__ import annotations

import copy
from typing import Any

from sglang_margingate.gate.sampling import derived_seed

COUNT = "margingate_sample"
"""Where the parameters that a group's samples share keep the number of the next one; never sent."""


def seed_sample(_manager: Any, tokenized: Any) -> None:
    """Give a sample of a group a seed of its own, called before it is sent to the scheduler.

    All samples are shallow copies of one tokenized request and share its parameters, in every version that is served. The request for
    the common prefix is sent before them, has parameters of its own and asks for no token.
    """
    params = getattr(tokenized, "sampling_params", None)
    if params is None or (params.n or 1) <= 1 or params.sampling_seed is None or params.max_new_tokens == 0:
        return
    given = params.custom_params or {}
    sample = given.get(COUNT, 0)
    mine = copy.copy(params)
    mine.sampling_seed = derived_seed(params.sampling_seed, sample)
    mine.custom_params = {key: value for key, value in given.items() if key != COUNT} or None
    params.custom_params = {**given, COUNT: sample + 1}
    tokenized.sampling_params = mine
