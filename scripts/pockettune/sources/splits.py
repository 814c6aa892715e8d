"""Reads a dataset repository as a hub has it: its subset, its splits and parts of them."""

import glob
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pockettune.common import disk, program
from pockettune.common.errors import UserError, list_faults
from pockettune.sources import hub

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

SPLITS = ("train", "validation", "test")


def read_repository(
    dataset: Mapping[str, Any], columns: Sequence[str], downloads: Path
) -> dict[str, pd.DataFrame]:
    """Download the repository of section dataset and return the rows of each split.

    The datasets library writes them anew as Arrow files, into a folder of this process that is
    removed at the end.
    """
    name = dataset["name"]
    place = str(downloads.resolve())
    if glob.escape(place) != place:
        raise UserError(
            f"dataset {name}: the datasets library takes *, ? and [ in a folder's name for a pattern"
            f" and finds nothing in {place}; use a checkout elsewhere, or files of your own"
            " (dataset.files)"
        )
    with hub.repository("dataset", name, dataset["revision"], downloads, keep=True) as folder:
        check_card(name, folder / "README.md")
        for left in downloads.glob(f"{folder.name}.arrow-*"):  # by a killed run: this one is locked
            program.remove(left)
        with (
            tempfile.TemporaryDirectory(prefix=f"{folder.name}.arrow-", dir=downloads) as cache,
            disk.tell_full_disk(downloads, Path(cache)),
        ):
            tables = load_splits(dataset, folder, Path(cache))
    for split, table in tables.items():
        absent = [column for column in columns if column not in table.columns]
        if absent:
            raise UserError(
                f"dataset {name}, {split}: no column {', '.join(absent)}; it has {', '.join(table.columns)}"
            )
    return tables


def load_splits(dataset: Mapping[str, Any], folder: Path, cache: Path) -> dict[str, pd.DataFrame]:
    """Read the three splits of a downloaded repository, by way of `cache`."""
    # Imported here because it takes seconds that a local file need not wait for.
    from datasets import load_dataset_builder

    name = dataset["name"]
    try:
        subset = choose_subset(name, dataset["subset"], folder)
        builder = load_dataset_builder(str(folder), subset, cache_dir=str(cache))
        builder.download_and_prepare()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"dataset {name}: its files cannot be read: {error}") from error
    tables, faults = {}, []
    for split, part in choose_splits(name, dataset["splits"], builder).items():
        try:
            tables[split] = with_names(builder.as_dataset(split=part))
        except ValueError as error:  # what the library says of the expression
            faults.append(f"dataset.splits.{split} is {part!r}: {error}")
    if faults:
        raise UserError(f"dataset {name}: {list_faults(faults)}")
    return tables


def with_names(rows: "Dataset") -> pd.DataFrame:
    """Return rows as a table; lists of class numbers, as of entities' labels, as lists of their names."""
    from datasets import ClassLabel

    table = rows.to_pandas()
    for column, feature in rows.features.items():
        if isinstance(classes := getattr(feature, "feature", None), ClassLabel):
            table[column] = [classes.int2str(numbers.tolist()) for numbers in table[column]]
    return table


def choose_subset(name: str, subset: str | None, folder: Path) -> str | None:
    """Return the name of the subset to read; raise UserError where it is not clear which."""
    from datasets import get_dataset_config_names, get_dataset_default_config_name

    known = get_dataset_config_names(str(folder))
    if subset is None and (len(known) < 2 or get_dataset_default_config_name(str(folder))):
        return None
    if subset in known:
        return subset
    what = f"has no subset {subset}" if subset else "has several subsets"
    raise UserError(f"dataset {name} {what}; set dataset.subset to one of {', '.join(known)}")


def choose_splits(
    name: str, splits: Mapping[str, str] | None, builder: "DatasetBuilder"
) -> Mapping[str, str]:
    """Return what each of the three splits is taken from; raise UserError with what to write."""
    if splits:
        return splits
    has = list(builder.info.splits)
    missing = [split for split in SPLITS if split not in has]
    if not missing:
        return {split: split for split in SPLITS}
    source = "train" if "train" in has else has[0]
    if "test" in has:
        cuts = {"train": f"{source}[10%:]", "validation": f"{source}[:10%]", "test": "test"}
    elif "validation" in has:
        cuts = {"train": f"{source}[10%:]", "validation": f"{source}[:10%]", "test": "validation"}
    else:
        cuts = {"train": f"{source}[20%:]", "validation": f"{source}[10%:20%]", "test": f"{source}[:10%]"}  # fmt: skip
    written = ", ".join(f'{split}: "{part}"' for split, part in cuts.items())
    raise UserError(
        f"dataset {name} has no split {', '.join(missing)}; it has {', '.join(has)}."
        f" Say what to take, for example dataset.splits: {{{written}}}"
    )


def check_card(name: str, card: Path) -> None:
    """Raise UserError where a dataset's README.md sends the datasets library out of its folder.

    Its header may name the files of each split, and the library follows it to any file of this
    machine and any address.
    """
    if not card.exists():
        return
    from huggingface_hub import DatasetCard  # as the library reads it

    try:
        header = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:
        raise UserError(f"dataset {name}: its README.md cannot be read: {error}") from error
    paths = dict.fromkeys(_texts(header.get("configs")))
    hub.refuse_outside(f"dataset {name}: README.md", paths)


def _texts(value: object) -> Iterator[str]:
    """Yield every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
