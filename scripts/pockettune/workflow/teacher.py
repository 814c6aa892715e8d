"""Which model train.teacher.path means, and the files that decide what it says."""

from pathlib import Path

from pockettune.common.errors import UserError

# Of a finished run, the best first: the whole vocabulary and all layers, as trained.
OF_A_RUN = ("merged", "f16.gguf")
TOKENIZER = ("config.json", "tokenizer.json", "tokenizer_config.json")


def find_teacher(path: str, results: str) -> Path:
    """Return the model folder or .gguf file that a path names: itself, or that of a finished run.

    Raises UserError where it names neither, or what the run with these `results` makes itself.
    """
    named = Path(path)
    made = [named / name for name in OF_A_RUN if (named / name).exists()]
    is_gguf = named.is_file() and named.suffix.lower() == ".gguf"
    is_model = is_gguf or (named / "config.json").is_file()
    own = Path(results).resolve()
    if named.resolve() == own or (is_model and named.parent.resolve() == own):
        raise UserError(
            f"config: train.teacher.path {path} is of this run itself, whose results go to {results}: name"
            " another run's, or give this one a pathvars.results of its own"
        )
    if is_model:
        return named
    if not made:
        raise UserError(
            f"config: train.teacher.path {path} is no finished run ({' or '.join(OF_A_RUN)} in it), no"
            " model folder (config.json in it) and no .gguf file"
        )
    return made[0]


def deciding_files(model: Path) -> list[str]:
    """Return the files whose content decides what a teacher says: a run's manifest stands for its folder."""
    manifest = model.with_name(f"{model.name}.sha256")
    if model.is_file():
        return [str(model)]
    if manifest.is_file():
        return [str(manifest)]
    return [str(model / name) for name in TOKENIZER] + sorted(map(str, model.glob("*.safetensors")))


def weight_bytes(model: Path) -> int:
    """Return the bytes of a model's weights."""
    files = [model] if model.is_file() else model.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
