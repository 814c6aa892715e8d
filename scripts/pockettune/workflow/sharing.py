"""Finds the steps that members of a sweep have in common, from the rules themselves.

Two steps are one where their rule, command and params are the same and so is all that they read: a
file of the checkout by its path, a product by the step that makes it. So no list of keys says what
decides what, and a rule that is added to the Snakefile is shared like the others.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Rule = Any  # snakemake.rules.Rule, as Snakemake 9.27 has it


@dataclass(frozen=True)
class Step:
    """A rule with its wildcards filled in."""

    rule: str  # its name in the Snakefile
    wildcards: tuple[str, ...]  # their values
    inputs: tuple[str, ...]
    products: tuple[str, ...]  # outputs, and the benchmark, which the report reads
    folders: frozenset[str]  # the products that are folders
    settings: str


@dataclass(frozen=True)
class Link:
    """Products of one member's step that another member has made, or will make."""

    name: str  # of a rule
    folders: dict[str, str]  # the other's product by the member's
    files: dict[str, str]


class MemberRules:
    """The rules of one member, whose names begin with `prefix` and whose products lie in `results`."""

    def __init__(self, prefix: str, results: str, rules: Iterable[Rule]) -> None:
        self.prefix, self.results = prefix, results
        rules = [rule for rule in rules if rule.name.startswith(prefix)]
        self._plain = {
            str(path): rule
            for rule in rules
            if not rule.has_wildcards()
            for path in rule.products()
        }
        self._patterns = [rule for rule in rules if rule.has_wildcards()]
        self._steps: dict[str, Step | None] = {}
        self._signatures: dict[Step, str] = {}

    def making(self, path: str) -> Step | None:
        """Return the step that makes a file; None for a file that no rule makes."""
        if path not in self._steps:
            rule = self._plain.get(path) or next(
                (rule for rule in self._patterns if rule.is_producer(path)), None
            )
            self._steps[path] = self._fill_in(rule, rule.get_wildcards(path)) if rule else None
        return self._steps[path]

    def behind(self, targets: Iterable[str]) -> dict[Step, None]:
        """Return the steps that make the targets and all that these need, in a fixed order."""
        steps: dict[Step, None] = {}
        open_paths = list(targets)
        while open_paths:
            step = self.making(open_paths.pop())
            if step and step not in steps:
                steps[step] = None
                open_paths += step.inputs
        return steps

    def signature(self, step: Step) -> str:
        """Return a digest of all that decides what a step makes, the same for every member."""
        if step not in self._signatures:
            read = []
            for path in step.inputs:
                maker = self.making(path)
                read.append([self.relative(path), self.signature(maker) if maker else None])
            text = json.dumps([step.rule, step.settings, read])
            self._signatures[step] = hashlib.sha256(text.encode()).hexdigest()
        return self._signatures[step]

    def relative(self, path: str) -> str:
        """Return a path with the member's folder as <results>, where it lies in it."""
        own = path.startswith(f"{self.results}/")
        return f"<results>{path.removeprefix(self.results)}" if own else path

    def _fill_in(self, rule: Rule, wildcards: dict[str, str]) -> Step:
        inputs = rule.expand_input(wildcards)[0]
        outputs = rule.expand_output(wildcards)[0]
        params = rule.expand_params(wildcards, inputs, outputs, None)[0]
        benchmark = [rule.expand_benchmark(wildcards)] if rule.benchmark else []
        decides = [rule.shellcmd, {key: str(value) for key, value in params.items()}, wildcards]
        return Step(
            rule=rule.name.removeprefix(self.prefix),
            wildcards=tuple(wildcards.values()),
            inputs=tuple(map(str, inputs)),
            products=tuple(map(str, [*outputs, *benchmark])),
            folders=frozenset(str(output) for output in outputs if output.is_directory),
            settings=json.dumps(decides, sort_keys=True),
        )


def find_links(members: Iterable[tuple[MemberRules, Iterable[str]]]) -> list[Link]:
    """Return what each member, given with its targets, takes from those before it.

    What lies outside the members' folders, such as a base model, is one file for all anyway.
    """
    owners: dict[str, tuple[MemberRules, Step]] = {}
    links: list[Link] = []
    for member, targets in members:
        for step in member.behind(targets):
            owner, made = owners.setdefault(member.signature(step), (member, step))
            own = {
                path: other
                for path, other in zip(step.products, made.products, strict=True)
                if path != other
            }
            if owner is not member and own:
                links.append(
                    Link(
                        name=member.prefix + "_".join(["link", step.rule, *step.wildcards]),
                        folders={path: own[path] for path in own if path in step.folders},
                        files={path: own[path] for path in own if path not in step.folders},
                    )
                )
    return links
