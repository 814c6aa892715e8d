"""Findings as lines for a terminal, and as a document for a cluster's ticket."""

import getpass
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pockettune.common.redaction import redact
from pockettune.machine.checks import ROOT
from pockettune.machine.findings import Finding, in_words


def as_document(
    findings: Sequence[Finding], run_files: Sequence[Path], profile: Path | None
) -> dict[str, Any]:
    """Return what --json prints."""
    names = [
        path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name for path in run_files
    ]
    return {
        "configfiles": ["config.yaml", *map(str, names)],
        "profile": profile and profile.name,
        "state": worst(findings),
        "findings": [
            {"name": f.name, "state": f.state, "detail": f.detail, "remedy": f.remedy, "bytes": dict(f.items)}
            for f in findings
        ],
    }  # fmt: skip


def worst(findings: Sequence[Finding]) -> str:
    """Return the state of all together."""
    return max((f.state for f in findings), key=("ok", "warning", "problem").index, default="ok")


def as_lines(findings: Sequence[Finding]) -> str:
    """Return the findings as text, a line each, remedies and sizes indented below."""
    lines = []
    width = min(max(len(finding.name) for finding in findings), 24)
    for finding in findings:
        lines.append(f"{finding.state:<7}  {finding.name:<{width}}  {finding.detail}")
        lines += [f"{'':7}    {name}: {told(count)}" for name, count in finding.items.items()]
        if finding.remedy:
            lines.append(f"{'':7}    do: {finding.remedy}")
    counts = {state: sum(f.state == state for f in findings) for state in ("problem", "warning")}
    ends = {
        "problem": "The run cannot work as it is",
        "warning": "The run can work",
        "ok": "All is well",
    }
    numbers = ", ".join(
        f"{count} {state}{'' if count == 1 else 's'}" for state, count in counts.items()
    )
    lines.append(f"{ends[worst(findings)]}: {numbers}.")
    return "\n".join(lines)


def told(count: int | None) -> str:
    """Return bytes in words."""
    return "not known" if count is None else in_words(count)


def hide_user(text: str) -> str:
    """Return text without secrets, without the user's name, and with the checkout as its root."""
    text = redact(text).replace(str(ROOT), ".")
    try:
        home, user = str(Path.home()), getpass.getuser()
    except (KeyError, OSError, RuntimeError, ImportError):  # a number without an account
        return text
    text = text.replace(home, "~") if len(home) > 1 else text
    return text if user == "root" else re.sub(rf"\b{re.escape(user)}\b", "user", text)
