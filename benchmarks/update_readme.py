"""Copy the benchmarks' tables to where README.md and README.zh-CN.md show them.

A line `<!-- benchmarks/demo.md, table 1 -->` stands above each; what follows it, up to the next empty
line, is replaced by that table of that page. A test fails where the copy is not what the page says.

    python benchmarks/update_readme.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(<!-- (benchmarks/\w+\.md), table (\d) -->\n)(?:(?!<!--).+\n)*")


def tables(page: str) -> list[str]:
    """Return the tables of a Markdown page."""
    return re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)


def fill(text: str) -> str:
    """Return `text` with every table as its benchmark's page has it now."""

    def table(match: re.Match[str]) -> str:
        page = (ROOT / match[2]).read_text(encoding="utf-8")
        return match[1] + tables(page)[int(match[3]) - 1]

    return PLACE.sub(table, text)


def main() -> None:
    for name in ("README.md", "README.zh-CN.md"):
        path = ROOT / name
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
