"""Say what a SGLang version does otherwise than the tested ones, at every place that margingate stands on.

::

    python tests/contract/record.py 0.5.24                      compare with the newest record
    python tests/contract/record.py 0.5.24 --against 0.5.20     with another one
    python tests/contract/record.py 0.5.24 --write              and keep the result as this version's record

Exit status 1 where a call or a name changed: an adapter must follow before the version is served. A changed body is
listed to be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import contract
import overlays
from touch_points import touch_points

from sglang_margingate.serving.cpu import install_stand_ins


def main(argv: list[str] | None = None) -> int:
    """Compare one version with a record; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    parser.add_argument("--against", metavar="VERSION", default=None, help="the newest other record by default")
    parser.add_argument("--write", action="store_true", help="write tests/contract/records/VERSION.json")
    args = parser.parse_args(argv)
    install_stand_ins()
    others = [version for version in contract.recorded() if version != args.version]
    against = args.against or (others[-1] if others else None)
    try:
        found = contract.record(contract.Sources(overlays.sources(args.version)), touch_points())
    except overlays.OverlayError as error:
        print(f"record: error: {error}", file=sys.stderr)
        return 2
    if against is not None and against not in contract.recorded():
        print(
            f"record: error: --against: {against} has no record; there are {', '.join(contract.recorded())}",
            file=sys.stderr,
        )
        return 2
    difference = contract.compare(found if against is None else contract.load(against), found)
    print(f"SGLang {args.version} against {against or 'nothing'}: {len(found)} touch points, "
          f"{len(difference.broken)} called or named otherwise, {len(difference.to_read)} with another body")  # fmt: skip
    for title, lines in (("must follow", difference.broken), ("to read", difference.to_read)):
        for line in lines:
            print(f"  {title}: {line}")
    if args.write:
        print(f"written: {contract.save(args.version, found)}")
        return 0
    return 1 if difference.broken else 0


if __name__ == "__main__":
    sys.exit(main())
