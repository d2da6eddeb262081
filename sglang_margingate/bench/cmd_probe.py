"""``margingate probe``: at which shapes does this model give a row the same bits on this machine?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sglang_margingate.bench import options
from sglang_margingate.canonical.invariance import InvarianceMap
from sglang_margingate.words import decode_sizes

EPILOG = """\
Starts a server with --margingate-fast-path canonical and the flags after -- (model, sizes), or asks a running one
(--base-url), and prints its map: for every kind of linear layer the ranges of rows M that share a class, and where the
map lies on disk. --margingate-map-dir among the flags after -- chooses the folder; off probes anew.
"""

PREFILL = {
    "batched": "batched and chunked as SGLang likes",
    "grid": "one request at a time, on the grid",
    None: "NOT the same bits each time, not even alone: no response has a guarantee",
}
"""What a server's trials of its prefill found, in words."""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    p.epilog = EPILOG
    options.add_server(p)
    p.add_argument_group("output").add_argument("-o", "--out", type=Path, metavar="FILE", help="write the map as JSON")


def run(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """Print the map; the exit status is 0 when decode holds its class and a prefill its bits."""
    from sglang_margingate.bench.console import make_console
    from sglang_margingate.bench.servers.client import Client, ServerError

    flags = ["--margingate-fast-path", "canonical", "--margingate-trace", "off"]
    with options.server(args, make_console(), flags) as client:
        if not isinstance(client, Client):
            raise ServerError(f"{client.base_url}: only a margingate server has a map")
        found = client.status().get("invariance")
        base_url = client.base_url
    if found is None:
        raise ServerError(f"{base_url} serves on the stock fast path; start it with --margingate-fast-path canonical")
    print(render(found))
    if args.out is not None:
        options.write(args.out, json.dumps(found, indent=2) + "\n")
    return 0 if found["decode_ok"] and _prefill(found) else 1


def _prefill(found: dict[str, Any]) -> str | None:
    earlier = "batched" if found.get("batched_prefill") else "grid"  # what servers of an earlier version say
    tried: str | None = found.get("prefill", earlier)
    return tried


def render(found: dict[str, Any]) -> str:
    """Return the map as text of at most 100 columns."""
    data = found["map"]
    where = data["environment"]
    # Without its layers: a server of another version may describe those otherwise.
    origin = InvarianceMap([], {}, data["seconds"], data.get("file"), data.get("checked_seconds")).origin()
    lines = [
        f"invariance map of {where.get('device', '?')}, torch {where.get('torch', '?')}",
        origin,
        "",
        f"{'layer':36} {'shape':>14}  classes over M (rows)",
    ]
    for layer in data["layers"]:
        runs = layer["classes"]
        shown = " ".join(_run(*run) for run in runs[:8]) + (f" ... {len(runs) - 8} more" if len(runs) > 8 else "")
        shape = "x".join(map(str, reversed(layer["shape"])))
        lines.append(f"{layer['name'].removeprefix('model.'):36} {shape:>14}  {shown}")
    decode = "same bits as the verify" if found["decode_ok"] else "NOT the verify's bits: gated by margin"
    prefill = PREFILL[_prefill(found)]
    lines += [
        "",
        f"decode    {decode_sizes(found)}: {decode}",
        f"verify    {found['verify_rows']} rows a pass",
        f"prefill   {prefill}",
    ]
    if found["graph_sizes"]:
        lines.append(
            f"graphs    {', '.join(map(str, found['graph_sizes']))} rows; attention: {found['decode_attention']}"
        )
    if found.get("prefill_attention", "sglang") != "sglang":
        lines.append(f"attention {found['prefill_attention']} in prefills")
    lines += [f"note      {note}" for note in found["notes"]]
    return "\n".join(lines)


def _run(first: int, last: int, label: int | None) -> str:
    rows = str(first) if first == last else f"{first}-{last}"
    return f"{rows}:{'-' if label is None else chr(ord('a') + label % 26)}"
