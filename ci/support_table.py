#!/usr/bin/env python3
"""Writes the README's support table from the suite's results.

    longspan conformance --backend cpu --tier full --json target/conformance/plain.json
    python3 ci/support_table.py target/conformance/*.json            # rewrites README.md; other backends' rows stay
    python3 ci/support_table.py --check target/conformance/*.json    # fails if a backend of the results is not in it

Each row says where and when its numbers come from. Standard library only.
"""

import json
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support-table -->\n", "<!-- /support-table -->"
HEAD = ["backend", "tier", "passed", "failed", "refused", "no machine", "known faults", "machine", "date"]


def main():
    check = "--check" in sys.argv[1:]
    reports = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:] if name != "--check"]
    if not reports:
        sys.exit(__doc__)
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    old, after = rest.split(END, 1)
    if check:
        missing = [report["backend"] for report in reports if f"| `{report['backend']}` |" not in old]
        sys.exit(f"not in the README's table: {', '.join(missing)}" if missing else 0)
    README.write_text(before + BEGIN + table(old, reports) + END + after, encoding="utf-8")


def table(old, reports):
    rows = {cells[0]: cells for cells in (line.strip("| ").split(" | ") for line in old.splitlines()[2:])}
    rows |= {cells[0]: cells for cells in map(row, reports)}
    lines = [HEAD, ["---"] * len(HEAD), *(rows[name] for name in sorted(rows, key=lambda name: name.strip("`")))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def row(report):
    counts = report["counts"]
    numbers = [str(counts[key]) for key in ("passed", "failed", "refused", "no_machine", "broken")]
    return [f"`{report['backend']}`", report["tier"], *numbers, report["machine"], report["date"]]


if __name__ == "__main__":
    main()
