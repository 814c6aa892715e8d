"""What comes from elsewhere runs nothing, and leads nowhere but to its own folder."""

import copy
import html
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from conftest import HOSTILE, HOSTILE_FOLDER, LINEAGE, ROOT, run_program
from fetch_dataset import fetch_dataset
from fetch_model import fetch_model
from loopback_hub import COMMIT, LoopbackHub, _Handler, serve
from pockettune.common.errors import UserError
from pockettune.data.prompts import Examples
from pockettune.gguf.files import read_gguf
from pockettune.models.folder import check_model_folder
from pockettune.sources import hub as hub_module
from pockettune.workflow.config import check_config, check_files

NAME = "somebody/tiny"
TASK = json.loads(LINEAGE)["task"]


class Pwned:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def local(folder: Path) -> dict[str, Any]:
    return {"name": None, "revision": None, "path": str(folder)}


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder with all that could run: code, pickles, and a name that a shell would run."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / HOSTILE))
    mark = tmp_path / "pwned"
    (folder / "modeling_x.py").write_text(f"open({str(mark)!r}, 'w')")
    for name in ("pytorch_model.bin", "x.pt", "training_args.bin", "data.pkl"):
        (folder / name).write_bytes(pickle.dumps(Pwned(mark)))
    shutil.copyfile(folder / "model.safetensors", folder / "$(touch pwned).safetensors")
    return folder


# --- a model folder ---


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_code_of_the_model_is_refused(file: str, folder: Path) -> None:
    """Also in tokenizer_config.json, which llama.cpp's converter loads with trust_remote_code."""
    check_model_folder(folder)
    path = folder / file
    content = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["x/y--modeling_x.X", None]}}  # fmt: skip
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{file} asks to run the model's own code \(auto_map\)"):
        check_model_folder(folder)


def test_only_files_that_cannot_run_are_taken(folder: Path, tmp_path: Path) -> None:
    fetch_model(local(folder), tmp_path, tmp_path / "taken")
    suffixes = {path.suffix for path in (tmp_path / "taken").iterdir()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}
    assert (tmp_path / "taken/$(touch pwned).safetensors").exists()
    assert not list(tmp_path.rglob("pwned*"))
    (folder / "model.safetensors").unlink()
    (folder / "$(touch pwned).safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin.* is refused"):
        fetch_model(local(folder), tmp_path, tmp_path / "again")


def test_links_that_leave_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (folder / "merges.txt").symlink_to(secret)
    (folder / "vocab.json").symlink_to(folder / "config.json")
    with pytest.raises(UserError) as caught:
        fetch_model(local(folder), tmp_path, tmp_path / "taken")
    assert f"are not followed: merges.txt leads to {secret};" in str(caught.value)
    assert not (tmp_path / "taken").exists()


def test_links_that_lead_nowhere_are_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "dangling.json").symlink_to(tmp_path / "none")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "folder.txt").symlink_to("/etc")
    fetch_model(local(folder), tmp_path, tmp_path / "taken")
    assert not {"dangling.json", "loop.json", "folder.txt"} & {p.name for p in (tmp_path / "taken").iterdir()}  # fmt: skip


def test_snapshot_in_the_cache_of_hugging_face_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    """models--x--y/snapshots/<commit>/<file> -> ../../blobs/<checksum>."""
    snapshot = tmp_path / "models--x--y/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blobs = Path(shutil.copytree(tiny_model, snapshot.parent.parent / "blobs"))
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    fetch_model(local(snapshot), tmp_path, tmp_path / "taken")
    taken = tmp_path / "taken/model.safetensors"
    assert not taken.is_symlink()
    assert taken.read_bytes() == (tiny_model / "model.safetensors").read_bytes()


ATTACKS = {
    "out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a command": "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
    "a broken template": "{% for %}",
    "a refusal": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_chat_template_cannot_leave_its_sandbox(
    attack: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = ATTACKS[attack]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    result = tokenize(folder, tmp_path, "好")
    assert result.returncode == 2, result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert "chat template cannot " in line
    assert "Traceback" not in result.stdout
    assert not (tmp_path / "tokens").exists() and not list(tmp_path.rglob("pwned*"))


def test_text_is_no_template(folder: Path, tmp_path: Path) -> None:
    text = "{{7*7}} {% raw %} {text} {0} %s ${HOME}"
    assert tokenize(folder, tmp_path, text).returncode == 0
    assert text in Examples(tmp_path / "tokens/test.arrow")[0].prompt


def tokenize(model: Path, folder: Path, text: str) -> Any:
    records = folder / "records.jsonl"
    records.write_text(json.dumps({"id": "test-1", "text": text, "label": "好"}) + "\n")
    columns = {"text_column": "text", "label_column": "label"}
    settings = {"task": TASK, "dataset": columns, "tokenize": {"max_length": 256}}
    return run_program("tokenize_dataset.py", "--settings", json.dumps(settings), "--model", model,
                       "--train", records, "--validation", records, "--test", records,
                       "--output", folder / "tokens")  # fmt: skip


# --- a repository on a hub ---


class Liar(_Handler):
    """Lists files under names that lead out of the folder, and sends something for each."""

    def names(self) -> list[str]:
        home = self.server.folder.parent
        return ["../victim.json", "../../victim.json", str(home / "victim.json"), "x/../../v.json"]

    def huggingface_info(self) -> dict[str, Any]:
        info = super().huggingface_info()
        lies = [{**info["siblings"][0], "rfilename": name} for name in self.names()]
        return {**info, "siblings": info["siblings"] + lies}

    def modelscope_files(self) -> dict[str, Any]:
        files = super().modelscope_files()["Files"]
        lies = [{**files[0], "Path": name, "Name": Path(name).name} for name in self.names()]
        return {"Files": files + lies}

    def send_file(self, file: str, send_body: bool) -> None:
        super().send_file(file if (self.server.folder / file).is_file() and ".." not in file else "config.json", send_body)  # fmt: skip


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_names_on_a_hub_that_lead_out_of_the_folder(
    source: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Path(shutil.copytree(tiny_model, tmp_path / "repository"))
    victim = tmp_path / "victim.json"
    victim.write_text("mine")
    monkeypatch.setattr(LoopbackHub, "finish_request", lambda self, r, a: Liar(r, a, self))
    target = tmp_path / "down/loads"
    with serve(repository, NAME) as hub:
        monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.entry(source))
        with pytest.raises(UserError, match=r"files outside its own folder: \.\./victim\.json"):
            hub_module.download("model", NAME, COMMIT, target, {})
    assert victim.read_text() == "mine"
    known = [repository, target]
    strays = [path for path in tmp_path.rglob("*") if path.is_file() and path != victim
              and not any(path.is_relative_to(place) for place in known)]  # fmt: skip
    assert strays == []


def fetch_from_hub(repository: Path, target: Path, patch: pytest.MonkeyPatch) -> LoopbackHub:
    settings = {"name": NAME, "revision": COMMIT, "files": None, "split": None, "subset": None,
                "splits": None, "unlabelled": "refuse", "bad_rows": "refuse", "text_column": "text", "label_column": "label"}  # fmt: skip
    with serve(repository, NAME) as hub:
        patch.setenv("POCKETTUNE_HUB_SOURCES", hub.address)
        fetch_dataset(settings, TASK, target / "downloads", target / "out")
    return hub


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset repository with what could run, a file outside that it must not reach, and its card."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.csv").write_text("text,label\n好,1\n差,0\n")
    (folder / "repository.py").write_text("raise SystemExit('ran')")
    (folder / "data.pkl").write_bytes(pickle.dumps(Pwned(tmp_path / "pwned")))
    (tmp_path / "secret.csv").write_text("text,label\nsecret,1\n")
    return folder


def test_dataset_script_and_pickles_are_not_even_fetched(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = fetch_from_hub(dataset, tmp_path, monkeypatch)
    assert (tmp_path / "out/train.jsonl").exists()
    assert any("train.csv" in request for request in hub.requests)
    assert not [r for r in hub.requests if "/resolve/" in r and (".py" in r or ".pkl" in r)]
    assert not (tmp_path / "pwned").exists()


CARDS = {
    "an absolute path": "data_files: {secret}",
    "a way up": "data_files: [{{split: train, path: ../../../secret.csv}}]",
    "an address": "data_files: [{{split: train, path: [train.csv, 'http://127.0.0.1:9/x.csv']}}]",
    "a chain": "data_files: zip://x.csv::../../secret.zip",
    "a folder": "data_dir: ../..",
}


@pytest.mark.parametrize("card", CARDS)
def test_card_cannot_send_the_reader_elsewhere(
    card: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = CARDS[card].format(secret=tmp_path / "secret.csv")
    (dataset / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {line}\n---\n")
    with pytest.raises(UserError, match=r"README\.md names files outside its own folder: "):
        fetch_from_hub(dataset, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_honest_card_is_followed(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dataset / "extra.csv").write_text("text,label\n一般,1\n")
    files = "".join(f"  - {{split: {s}, path: {s}.csv}}\n" for s in ("validation", "test"))
    (dataset / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        f"{files}  - {{split: train, path: [train.csv, extra.csv]}}\n---\n"
    )
    checkout = tmp_path / HOSTILE_FOLDER
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    fetch_from_hub(dataset, Path("resources"), monkeypatch)  # relative, as the rule gives it
    assert "一般" in (checkout / "resources/out/train.jsonl").read_text()


def test_folder_that_the_reader_takes_for_a_pattern(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"takes \*, \? and \[ in a folder's name for a pattern"):
        fetch_from_hub(dataset, tmp_path / "a[b]", monkeypatch)


# --- paths that cannot work are refused before anything starts ---


@pytest.mark.parametrize("path", ["a{b}.csv", "<results>/a.csv", "a\nb.csv", "-a.csv", "a\x00.csv"])
@pytest.mark.parametrize("key", ["dataset.files.all", "model.path", "train.adapter", "pathvars.results"])  # fmt: skip
def test_path_that_snakemake_would_misread(key: str, path: str) -> None:
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    schema = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text())

    def check(value: str) -> None:
        changed = copy.deepcopy(config)
        section, *rest = key.split(".")
        changed.setdefault(section, {})[rest[0]] = {"all": value} if len(rest) == 2 else value
        check_config(changed, schema)

    check(HOSTILE)
    with pytest.raises(UserError) as caught:
        check(path)
    assert str(caught.value).startswith(f"config: {key} is {path!r}: ")
    assert str(caught.value).endswith(" cannot stand there; rename it")


def test_weights_with_a_name_that_snakemake_would_misread(tmp_path: Path) -> None:
    (tmp_path / "{x}.safetensors").touch()
    with pytest.raises(UserError, match=r"model\.path, weights is '\{x\}\.safetensors'"):
        check_files({"model.path": str(tmp_path)})


# --- the whole workflow, every name and text hostile ---


def test_hostile_names_run_through_and_run_nothing(hostile_run: Path) -> None:
    results = hostile_run / f"results/{HOSTILE}"
    metadata, tensors = read_gguf(results / "q4_k_m.gguf")
    assert tensors and metadata["general.base_model.0.name"] == f"模型 {HOSTILE}"
    assert "$(touch pwned-5)" in metadata["pockettune.task.prompt"]
    assert "$(touch pwned-7)" in metadata["pockettune.task.labels"][0]
    assert not list(hostile_run.rglob("pwned*"))
    assert not list(ROOT.glob("pwned*"))
    first = pd.read_json(results / "dataset/train.jsonl", lines=True)["text"][0]
    assert first == "<script>alert(1)</script> {{7*7}} $(touch pwned-4)"


def test_folders_of_this_machine_stay_out_of_page_and_card(hostile_run: Path) -> None:
    """The base model and the data lie in a folder of their own, which may be a customer's name."""
    results = hostile_run / f"results/{HOSTILE}"
    for name in ("report.html", "card.md"):
        text = html.unescape((results / name).read_text())
        assert "外部 data" not in text and str(hostile_run) not in text, name
        assert f"模型 {HOSTILE}" in text, name


@pytest.mark.parametrize(
    ("path", "name"),
    [("/home/mei/models/base", "base"), ("../a.csv", "a.csv"), ("~/x/", "x"), ("base", "base")],
)
def test_path_is_published_by_its_last_part(path: str, name: str) -> None:
    from write_report import last_part, without_folders

    assert last_part(path) == name
    settings = {
        "model": {"path": path, "chat_template": None},
        "dataset": {"files": {"train": path}},
        "train": {"adapter": path},
        "card": {},
    }
    assert without_folders(settings) == {
        "model": {"path": name, "chat_template": None},
        "dataset": {"files": {"train": name}},
        "train": {"adapter": name},
        "card": {},
    }


def test_hostile_text_is_text_in_page_and_card(hostile_run: Path) -> None:
    results = hostile_run / f"results/{HOSTILE}"
    page = (results / "report.html").read_text()
    card = (results / "card.md").read_text()
    assert "<script" not in page and "<script" not in card
    assert "&lt;script&gt;t&lt;/script&gt; $(touch pwned-9) {z} {{7*7}}" in page
    assert "&lt;script&gt;t&lt;/script&gt; $(touch pwned-9) {z} {{7*7}}" in card
    header = yaml.safe_load(card.split("\n---\n")[0])
    assert header["license"] == "mit\nx: $(touch pwned-8)" and "x" not in header
    assert header["language"] == ["no"]
    assert "\n````\n{text}\n```\n" in card, "the prompt's own fence does not end the block"
