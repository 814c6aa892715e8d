"""What README and docs say is so: links, commands, numbers, settings, and both languages alike."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, run_snakemake
from pockettune.workflow.config import check_config
from update_readme import fill

PAGES = [ROOT / "README.md", ROOT / "results/README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRANSLATED = [page for page in PAGES if not page.stem.endswith("zh-CN") and page.parent.name != "results"]  # fmt: skip
ALL = sorted({*PAGES, *(page.with_name(f"{page.stem}.zh-CN.md") for page in TRANSLATED)})


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's fenced blocks of one language, without the indent of a list."""
    fences = re.findall(
        r"^( *)```(\w*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [
        re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)
        for indent, kind, text in fences
        if kind == language
    ]


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", ALL, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", TRANSLATED, ids=names)
def test_both_languages_give_the_same_commands_and_numbers(page: Path) -> None:
    chinese = page.with_name(f"{page.stem}.zh-CN.md")
    for language in ("bash", "powershell", "yaml"):
        assert blocks(page, language) == blocks(chinese, language)
    count = r"^#+ "
    assert len(re.findall(count, page.read_text(), re.M)) == len(re.findall(count, chinese.read_text(), re.M))  # fmt: skip


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_numbers_come_from_benchmarks(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count("<!-- benchmarks/") >= 6
    assert fill(text) == text, "run benchmarks/update_readme.py"


def test_tree_of_the_readme_is_the_checkout() -> None:
    (tree,) = (b for b in blocks(ROOT / "README.md", "") if b.startswith("Snakefile"))
    told = set(re.findall(r"^([\w.]+)/? ", tree, re.M))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}
    assert told - {"Snakefile", "sweep.smk", "config.yaml"} == folders - {".ci"}


def test_make_targets_exist() -> None:
    heads = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M)
    targets = {name for head in heads for name in head.split()}
    pages = "\n".join(page.read_text(encoding="utf-8") for page in ALL)
    told = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", pages, re.MULTILINE))
    told = {name for pair in told for name in pair if name}
    assert {"demo", "test"} <= told <= targets
    assert {"setup", "demo", "test", "lint", "bench"} <= targets


RUN_FILES = {
    re.search(r"--configfile (runs/\S+)", command)[1]: content  # type: ignore[index]
    for page in ALL
    for content in blocks(page, "yaml")
    for command in re.findall(r"snakemake .*--configfile runs/.*", page.read_text())
    if "pathvars" in content and "demo" not in command
}


@pytest.mark.parametrize("name", RUN_FILES)
def test_run_file_of_the_docs_is_valid(name: str) -> None:
    from snakemake.utils import update_config

    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    update_config(config, yaml.safe_load(RUN_FILES[name]))
    check_config(config, yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text()))


def test_run_file_for_phones_is_valid_and_names_its_teacher() -> None:
    from snakemake.utils import update_config

    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    update_config(config, yaml.safe_load((ROOT / "runs/mobile.yaml").read_text()))
    check_config(config, yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text()))
    assert config["vocabulary"]["keep"] == "task" and config["model"]["keep_layers"] < 24
    planned = run_snakemake(ROOT, "--dry-run", "--nolock", "--configfile", "runs/mobile.yaml")
    if not (ROOT / "results/merged").exists():
        assert (
            planned.returncode == 2
            and "train.teacher.path results is no finished run" in planned.stdout
        )


def test_variants_of_the_docs_are_valid() -> None:
    schema = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text())
    variants = []
    for block in blocks(ROOT / "docs/quantization.md", "yaml"):
        config = yaml.safe_load((ROOT / "config.yaml").read_text()) | yaml.safe_load(block)
        check_config(config, schema)
        variants += yaml.safe_load(block).get("quantize", {})
    assert {"q4_k_m", "iq4_nl", "small"} <= set(variants)


COMMANDS = sorted(
    {
        command.split("   #")[0].split("snakemake ", 1)[1].strip()
        for page in TRANSLATED
        for block in blocks(page, "bash")
        for command in block.splitlines()
        if "snakemake " in command
        and "runs/mine" not in command
        and "runs/mobile" not in command  # needs the run that teaches it
        and "runs/entities" not in command  # the user puts its files there
        and "runs/rank" not in command
        and "runs/entities"
        not in command  # needs the user's data; tests/test_text_task.py plans it
        and "profiles/slurm" not in command  # asks for conda; tests/slurm runs it
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_snakemake_command_of_the_readme_can_be_planned(command: str) -> None:
    result = run_snakemake(ROOT, "--dry-run", "--nolock", *shlex.split(command))
    assert result.returncode == 0, result.stdout[-2000:]
