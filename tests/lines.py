"""Lines of Python by package beside the budget in CONTRIBUTING.md; fails above it: `make check` runs it."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROW = re.compile(r"\| `([\w/]+)` \| ([\d,]+) \|")


def main() -> int:
    table = Path("CONTRIBUTING.md").read_text()
    budgets = {name: int(lines.replace(",", "")) for name, lines in ROW.findall(table)}
    names = subprocess.check_output(["git", "ls-files", "*.py"], text=True).split()
    lines = Counter[str]()
    for path in (Path(name) for name in names):
        count = len(path.read_text().splitlines())
        for parent in path.parents:
            lines[str(parent)] += count
    over = [name for name, budget in budgets.items() if lines[name] > budget]
    for name, budget in budgets.items():
        print(f"{name:<18} {lines[name]:>7,} of {budget:>7,}{'  too many' * (name in over)}")
    if over:
        print(f"above the budget in CONTRIBUTING.md: {', '.join(over)}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
