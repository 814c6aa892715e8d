"""Try before hours are spent on it whether the base model's vocabulary can be trimmed to the task.

What trim_vocabulary.py refuses of the merged model shows in the base: of both, the tokenizer and the names and
shapes of the tensors are the same.

Input   the base model; the folder tokens/; the records of train
Output  vocabulary_check.json: {"kept": how many tokens, "reasons"}
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.data.prompts import Examples
from pockettune.models.trimming import refuse_other_tensors, trim_files
from trim_vocabulary import check_tokens, choose, read_own, read_tokenizer

TRIAL = ".vocabulary_check."


def check_vocabulary(
    settings: Mapping[str, Any], base: Path, tokens: Path, train: Path, output: Path
) -> None:
    """Write `output` where nothing is in the way; UserError says what is."""
    refuse_other_tensors(base)
    texts = read_own(settings, train)
    whole = read_tokenizer(base)
    kept, reasons = choose(settings, base, whole, tokens, texts)
    for left in output.parent.glob(f"{TRIAL}*"):  # by a run that was killed
        program.remove(left)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=TRIAL) as name:
        folder = Path(name)
        trim_files(base, kept, folder)
        check_tokens(whole, folder, kept, texts, Examples(tokens / "train.arrow"))
    program.write_json(output, {"kept": len(kept), "reasons": reasons})


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections vocabulary, task, dataset"
    )
    parser.add_argument("--base", type=Path, required=True, help="base model's folder")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--train", type=Path, required=True, help="train.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")

    def work(a: argparse.Namespace) -> None:
        check_vocabulary(a.settings, a.base, a.tokens, a.train, a.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
