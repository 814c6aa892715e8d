"""What every gate does alike: how many rows it looks at, and what becomes of its checks' results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pockettune.common.errors import UserError
from pockettune.common.program import logger

Result = dict[str, Any]  # "name", "passed", "detail", and the check's numbers

PROMPTS_TOKENIZED = 5_000  # all of them where there are no more
PROMPTS_RENDERED = 200
PROMPTS_COMPUTED = 32
PROMPTS_ANSWERED = 4
ROOM_TO_STOP = 8  # tokens beyond the longest answer


def require_passed(results: Sequence[Result], file: Path, model: Path) -> None:
    """Tell every result; name all that failed in one UserError."""
    for result in results:
        mark = "passed" if result["passed"] else "FAILED"
        logger.info("%s  %s: %s", mark, result["name"], result["detail"])
    if failed := [result for result in results if not result["passed"]]:
        told = " | ".join(f"{result['name']}: {result['detail']}" for result in failed)
        raise UserError(
            f"{file} is not the merged model {model}: {len(failed)} of {len(results)} checks"
            f" failed: {told}"
        )
