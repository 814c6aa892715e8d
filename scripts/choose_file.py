"""Choose the smallest file that is proved as good as F16, within a budget of size and memory.

Input   metrics.json, the speed of every GGUF file, the quantized files
Output  best.json: {"chosen", "proved", "why", "limits", "files": {name: {size_bytes, memory_bytes,
        accuracy, prompt_rate, over, front, bound, verdict}}}; front: no other file is as small, as
        accurate and as fast, and better in one of these
        best.gguf: the chosen file; a copy, because a link shares its time with the file, and would seem
        older than the metrics that it was chosen by
"""

import argparse
import json
import shutil
from pathlib import Path

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.evaluation.choice import choose, read_limits


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections choose, evaluate"
    )
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json")
    parser.add_argument("--speed", type=Path, nargs="+", required=True)
    parser.add_argument("--files", type=Path, nargs="+", required=True, help="quantized GGUF files")
    parser.add_argument("--gguf", type=Path, required=True, help="best.gguf to write")
    parser.add_argument("--json", type=Path, required=True, help="best.json to write")

    def work(arguments: argparse.Namespace) -> None:
        stages = program.read_json(arguments.metrics)["stages"]
        speed = {path.stem: program.read_json(path) for path in arguments.speed}
        choice = choose(stages, speed, read_limits(arguments.settings))
        if choice["chosen"] is None:
            raise UserError(
                f"choose: {choice['why']}; raise it or add a smaller recipe to quantize"
            )
        source = next(path for path in arguments.files if path.stem == choice["chosen"])
        with program.staged(arguments.gguf, needed=source.stat().st_size) as partial:
            shutil.copyfile(source, partial)
            program.write_json(arguments.json, choice)  # no file without the reason
        program.logger.info("%s is %s: %s", arguments.gguf, source.name, choice["why"])

    program.run(parser, work)


if __name__ == "__main__":
    main()
