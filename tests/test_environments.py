"""requirements.txt, constraints.txt, envs/ and the rules name the same versions."""

import re

import pytest
import yaml

from conftest import ROOT

PIN = re.compile(r"^([\w.-]+)(?:\[\w+\])?==(\S+)", re.MULTILINE)
REQUIREMENTS = dict(PIN.findall((ROOT / "requirements.txt").read_text()))
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}


@pytest.mark.parametrize("name", ["data", "train", "llama_cpp", "report", "onnx", "litert"])
def test_conda_environment_pins_the_same_versions(name: str) -> None:
    environment = yaml.safe_load((ROOT / f"envs/{name}.yaml").read_text())
    # What pip brings of another format's packages, test_formats.py compares.
    packages = [entry.split("=") for entry in environment["dependencies"] if isinstance(entry, str)]
    pinned = {package[0]: package[1] for package in packages if len(package) == 2}
    assert pinned.pop("python") >= "3.11"
    assert {CONDA_NAMES.get(key, key): value for key, value in pinned.items()} == {
        CONDA_NAMES.get(key, key): REQUIREMENTS[CONDA_NAMES.get(key, key)] for key in pinned
    }
    assert [package[0] for package in packages if len(package) == 1] in ([], ["pip"])


def test_lock_holds_every_requirement() -> None:
    def canonical(pins: dict[str, str]) -> dict[str, str]:
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}

    locked = canonical(dict(PIN.findall((ROOT / "constraints.txt").read_text())))
    required = canonical(REQUIREMENTS)
    assert {name: locked.get(name) for name in required} == required


def test_converter_is_of_the_same_release_as_the_runtime() -> None:
    rules = (ROOT / "rules/common.smk").read_text()
    assert f'LLAMA_CPP_PYTHON = "{REQUIREMENTS["llama-cpp-python"]}"' in rules


@pytest.mark.parametrize("rules", sorted((ROOT / "rules").glob("*.smk")), ids=lambda p: p.name)
def test_every_rule_has_log_benchmark_and_an_environment_that_exists(rules) -> None:  # type: ignore[no-untyped-def]
    for block in rules.read_text().split("\nrule ")[1:]:
        name = block.split(":", 1)[0]
        assert "    log:" in block and "    benchmark:" in block, name
        (environment,) = re.findall(r'conda:\s+"\.\./(envs/\w+\.yaml)"', block)[:1]
        assert (ROOT / environment).is_file(), name
