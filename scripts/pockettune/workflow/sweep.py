"""A sweep: run files that differ in some keys, their names, and the order in which they own what they share."""

import copy
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from snakemake.utils import update_config

from pockettune.common.errors import UserError, list_faults
from pockettune.workflow.config import check_config, check_files, drop_idle, local_files
from pockettune.workflow.pins import unpin_others
from pockettune.workflow.teacher import find_teacher

Config = dict[str, Any]

MEMBERS_LIMIT = 200
KEYS = ("base", "over")
# Of two members that differ in nothing else one is enough.
NO_SETTING = ("hub", "pathvars", "report", "bundle")
LONGEST_NAME = 100  # characters; file systems take 255, and rules are named by it


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    changed: Config  # value by dotted key, such as train.rank
    config: Config  # complete and valid


def read_sweep(path: Path) -> tuple[Path | None, dict[str, list[Any]]]:
    """Return the run file that a sweep file names, if any, and its values by dotted key.

    Raises UserError naming every fault of the file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"sweep {path} cannot be read: {error}") from error
    if not re.fullmatch(r"\w[\w.-]*", path.stem, re.ASCII):
        raise UserError(
            f"sweep {path}: its results lie under its name, {path.stem!r}; rename it to letters, digits, ., _ and -"
        )
    if not isinstance(content, dict):
        raise UserError(f"sweep {path} holds no sections; it needs over: {{train.rank: [4, 8]}}")
    faults = [f"unknown key {key}; known: {', '.join(KEYS)}" for key in content if key not in KEYS]
    base, over = content.get("base"), content.get("over")
    if base is not None and not isinstance(base, str):
        faults.append(f"base is {base!r}, not the path of a run file")
    if not isinstance(over, dict) or not over:
        faults.append("over names no key; write over: {train.rank: [4, 8]}")
        over = {}
    faults += [
        f"over {key} is {values!r}, not a list of values"
        for key, values in over.items()
        if not isinstance(values, list) or not values
    ]
    faults += [
        f"over {key}: the sweep gives every member a folder of its own; take the key away"
        for key in over
        if str(key).split(".")[0] == "pathvars"
    ]
    if faults:
        raise UserError(f"sweep {path}: {list_faults(faults)}")
    if (count := math.prod(map(len, over.values()))) > MEMBERS_LIMIT:
        raise UserError(
            f"sweep {path} has {count:,} members, more than {MEMBERS_LIMIT}; give fewer values, or make several sweeps"
        )
    return Path(base) if base else None, {str(key): values for key, values in over.items()}


def expand(
    own: Config, run: Config, over: Mapping[str, list[Any]], schema: Config, results: Path
) -> list[Member]:
    """Return a member for each combination of values, the last key's changing fastest.

    `own` is config.yaml, `run` what the base's run file lays over it. Members' results lie in
    `results`/<name>. Raises UserError for keys and values that the schema does not know and files that
    are not here, all at once, and for members of equal settings or names.
    """
    faults: dict[str, None] = {}
    members = []
    for values in itertools.product(*over.values()):
        changed = dict(zip(over, values, strict=True))
        try:
            given = lay_over(run, changed)
            config = copy.deepcopy(own)
            update_config(config, copy.deepcopy(given))
            name = name_member(changed)
            config["pathvars"] = {"results": str(results / name)}
            unpin_others(config, own, given)
            check_config(config, schema)
            check_inputs(config)
            members.append(Member(name, changed, config))
        except UserError as error:
            faults[str(error).removeprefix("config: ")] = None
    if faults:
        raise UserError(f"sweep: {list_faults(list(faults))}")
    refuse_equal(members)
    return members


def check_inputs(config: Config) -> None:
    """Raise UserError where a valid config names files, or a teacher, that are not here."""
    check_files(local_files(config))
    used = copy.deepcopy(config)
    drop_idle(used)
    if teacher := used["train"].get("teacher"):
        find_teacher(teacher["path"], used["pathvars"]["results"])


def lay_over(run: Config, changed: Mapping[str, Any]) -> Config:
    """Return a copy of a run file with the values of dotted keys in it."""
    given = copy.deepcopy(run)
    for key, value in changed.items():
        *sections, last = key.split(".")
        section = given
        for part in sections:
            if not isinstance(section.get(part), dict):
                section[part] = {}  # should a value have stood here, the schema tells
            section = section[part]
        section[last] = copy.deepcopy(value)
    return given


def refuse_equal(members: list[Member]) -> None:
    """Raise UserError where two members would compute the same, or cannot be made in one call."""
    by_settings: dict[str, str] = {}
    equal = []
    for member in members:
        config = copy.deepcopy(member.config)
        drop_idle(config)
        settings = {key: value for key, value in config.items() if key not in NO_SETTING}
        text = json.dumps(settings, sort_keys=True)
        if text in by_settings:
            equal.append(f"{by_settings[text]} and {member.name}")
        by_settings.setdefault(text, member.name)
    if equal:
        raise UserError(
            f"sweep: members of equal settings: {list_faults(equal)}; take the repeated value away, or the"
            " key that another one makes idle"
        )
    names = Counter(member.name for member in members)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(
            f"sweep: members of one name: {list_faults(twice)}; their values are spelled alike, make two sweeps"
            " of them"
        )
    # The programs that fetch get checksums from their environment, which is one for all members.
    pins = {
        json.dumps([m.config["model"]["sha256"], m.config["hub"]], sort_keys=True) for m in members
    }
    if len(pins) > 1:
        raise UserError(
            "sweep: members differ in model.sha256 or hub, which one call has once; set model.sha256 to null"
            " in the base's run file, or make a sweep for each base"
        )


def name_member(changed: Mapping[str, Any]) -> str:
    """Return a member's name, such as rank-8_seed-13, that can stand in a path and in a rule's name.

    It holds no __, behind which the name of a rule begins.
    """
    last_parts = Counter(key.split(".")[-1] for key in changed)
    parts = []
    for key, value in changed.items():
        last = key.split(".")[-1]
        label = last if last_parts[last] == 1 else key
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"{label}-{text}")
    full = "_".join(parts)
    name = re.sub(r"[^A-Za-z0-9_.]+|__+", "-", full).strip("-_")
    plain = all(isinstance(value, str | int | float | None) for value in changed.values())
    if plain and name == full and len(name) <= LONGEST_NAME:
        return name
    # What was lost in the spelling could have told two members apart.
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(full.encode()).hexdigest()[:6]}"


def in_order(
    members: list[Member], recorded: list[Member], results: Path
) -> list[tuple[Member, bool]]:
    """Return all members and whether each is still one of the sweep: those of earlier calls come first.

    The first of those that share a product owns it. So a member that is added takes nothing over, and
    one that is taken out keeps what the others share with it, as long as its folder is there.
    """
    current = {member.name: member for member in members}
    earlier = [
        (current.get(member.name, member), member.name in current)
        for member in recorded
        if member.name in current or (results / member.name).is_dir()
    ]
    known = {member.name for member, _ in earlier}
    return [*earlier, *((member, True) for member in members if member.name not in known)]
