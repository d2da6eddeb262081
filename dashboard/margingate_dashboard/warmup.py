"""Load, beside the first page, what the other pages need."""

from __future__ import annotations

import gc

import numpy as np
import pandas as pd
import pyarrow as pa

from sglang_margingate.trace.schema import REQUEST_SCHEMA, STEP_SCHEMA

ROWS = 12


def rows(schema: pa.Schema, count: int = ROWS) -> pd.DataFrame:
    """Return rows of a table as the reader gives them, with nothing in them: they are drawn and thrown away."""
    columns = []
    for field in schema:
        plain = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        values = ["x"] * count if pa.types.is_string(plain) else np.arange(count) % 2
        if pa.types.is_list(plain):
            columns.append(pa.nulls(count, plain))
            continue
        if pa.types.is_timestamp(plain):
            values = pa.array(np.arange(count) * 1_000_000).cast(pa.int64())
        columns.append(pa.array(values).cast(plain).cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema).to_pandas()


def load() -> None:
    """Import the figures and draw some: Plotly loads its classes one by one, as they are used."""
    from margingate_dashboard import states, tokens
    from margingate_dashboard.figures import compare, flips, latency, margins, overview, request, tuning
    from sglang_margingate.gate import calibration

    del compare, latency, margins, tuning, calibration
    steps, requests = rows(STEP_SCHEMA), rows(REQUEST_SCHEMA, 1)
    steps = steps.assign(state=states.classify(steps), triggered=states.triggered(steps), shown="")
    counted = flips.by_bucket(steps["step"].to_numpy() * 0, steps["state"].to_numpy(), ["all"])
    for figure in (
        overview.events(overview.over_time(steps)),
        request.margins(steps, selected=1, log=True),
        request.waterfall(requests.iloc[0]),
        flips.bars(counted, ""),
    ):
        figure.to_json()
    tokens.strip(steps)
    # Streamlit collects all garbage after every run of a page, of a fragment that looks for new runs as well, and goes through
    # every object for it: half a million of the libraries', which live as long as the server. They are not looked at again.
    gc.collect()
    gc.freeze()
