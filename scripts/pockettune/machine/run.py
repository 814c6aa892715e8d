"""The run that is asked about: its config, its profile, and what several checks share of it."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pockettune.common.errors import UserError
from pockettune.machine.findings import Finding, Once
from pockettune.workflow.pins import model_folder

Config = dict[str, Any]


@dataclass
class Run:
    """A config in a checkout, and what of it is here already."""

    root: Path
    config: Config | None = None  # None where it cannot be read
    profile: Mapping[str, Any] = field(default_factory=dict)
    end: float = 0.0  # of time.monotonic(): when a check must have answered
    facts: dict[str, Once[Any]] = field(default_factory=dict)  # by name, what checks share

    def path(self, name: str) -> Path:
        """Return a path of the config or the rules, which counts from the checkout."""
        return self.root / name

    @property
    def uses_conda(self) -> bool:
        method = self.profile.get("software-deployment-method") or []
        return "conda" in ([method] if isinstance(method, str) else method)

    @property
    def on_cluster(self) -> bool:
        return self.profile.get("executor") == "slurm"

    @property
    def settings(self) -> Config:
        assert self.config is not None, "checks of a config run only where there is one"
        return self.config

    @property
    def results(self) -> Path:
        return self.path(self.settings.get("pathvars", {}).get("results", "results"))

    @property
    def own_model(self) -> Path | None:
        """The local model that the config names instead of one of a hub."""
        path = self.settings["model"]["path"]
        return self.path(path) if path else None

    @property
    def base(self) -> Path:
        """The folder that fetch_model makes."""
        return self.path(model_folder(self.settings["model"]))

    @property
    def converter_version(self) -> str:
        """Of llama-cpp-python; the converter is of the same (rules/common.smk; a test compares)."""
        text = self.path("requirements.txt").read_text(encoding="utf-8")
        match = re.search(r"^llama-cpp-python==([\w.]+)", text, re.MULTILINE)
        assert match, "requirements.txt pins llama-cpp-python"
        return match[1]

    @property
    def converter(self) -> Path:
        return self.path(f"resources/llama.cpp-{self.converter_version}")

    @property
    def has_bundle(self) -> bool:
        """Whether what was packed for a machine without a network lies here."""
        folder = self.path("resources/offline")
        return folder.is_dir() and any(folder.iterdir())

    def missing_repositories(self) -> list[tuple[str, str, str]]:
        """Return (kind, name, revision) of what is still to be fetched from a hub."""
        model, dataset = self.settings["model"], self.settings["dataset"]
        wanted = []
        if not model["path"] and not self.base.is_dir():
            wanted.append(("model", model["name"], model["revision"]))
        records = [
            self.results / f"dataset/{split}.jsonl" for split in ("train", "validation", "test")
        ]
        if not dataset["files"] and not all(path.is_file() for path in records):
            wanted.append(("dataset", dataset["name"], dataset["revision"]))
        return wanted


def load_config(root: Path, run_files: Iterable[Path]) -> Config:
    """Return config.yaml with the run files laid over it, as the Snakefile does."""
    from snakemake.utils import update_config

    from pockettune.workflow.pins import unpin_others

    layers: list[Config] = []
    for path in [root / "config.yaml", *run_files]:
        layers.append(read_sections(path, path.name))
    own, *others = layers
    given: Config = {}
    for layer in others:
        update_config(given, layer)
    config = copy.deepcopy(own)
    update_config(config, given)
    unpin_others(config, own, given)
    return config


def read_sections(path: Path, called: str) -> Config:
    """Return a YAML file's sections; UserError, naming it as `called`, where it has none."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{called} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{called} holds no sections")
    return content


def load_profile(folder: Path) -> dict[str, Any]:
    """Return a Snakemake profile's settings."""
    import yaml

    for name in ("config.v9+.yaml", "config.v8+.yaml", "config.yaml"):
        if (folder / name).is_file():
            try:
                return dict(yaml.safe_load((folder / name).read_text(encoding="utf-8")) or {})
            except (ValueError, TypeError, yaml.YAMLError) as error:
                raise UserError(f"profile {folder.name}: {name} cannot be read: {error}") from error
    raise UserError(f"profile {folder.name}: there is no config.yaml in it")


def check_settings(run: Run) -> list[Finding]:
    """The config against its schema, and the local files that it names."""
    import yaml

    from pockettune.workflow.config import check_config, check_files, local_files
    from pockettune.workflow.pins import check_fetched, pinned_files

    schema = yaml.safe_load(run.path("schemas/config.schema.yaml").read_text(encoding="utf-8"))
    config = run.settings
    try:
        check_config(config, schema)
        check_files({key: str(run.path(path)) for key, path in local_files(config).items()})
        if not config["model"]["path"]:
            check_fetched(run.base, pinned_files(config["model"]["sha256"]))
    except UserError as error:
        return [Finding("config", "problem", str(error), "mend the run file or config.yaml")]
    return [Finding("config", "ok", f"valid; results in {run.results.relative_to(run.root)}")]
