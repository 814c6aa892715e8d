"""Writes .litertlm bundles, which LiteRT-LM and the phone apps built on it open, and asks them.

A bundle holds the .tflite file, tokenizer.json, and metadata: the chat template, the tokens that end an
answer, how to choose a token. litert-lm-builder 0.18.1 writes it, litert-lm-api 0.18.1 opens it.
"""

import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from pockettune.common import program
from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError
from pockettune.common.extras import as_numbers, use_extra
from pockettune.common.native import output_in_log
from pockettune.data.chat import added_bos, render_chat
from pockettune.data.serving import context_tokens
from pockettune.data.task_template import find_frame, quote, write_template
from pockettune.litert.exporting import PREFILL
from pockettune.models.folder import load_tokenizer
from pockettune.tasks import load_task

# Of litert-lm, whose schema of the metadata is written: an older one may not know a key. The runtime itself
# opens a bundle that asks for a later one (0.18.1 does), so `open_bundle` looks.
LEAST_RUNTIME = "0.18.1"

# Before a base model's own template: LiteRT-LM hands every message as a list of parts, which a template
# that expects text writes into the prompt as it is.
AS_TEXT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set said = namespace(text="") -%}
{%- if message["content"] is string -%}
{%- set said.text = message["content"] -%}
{%- else -%}
{%- for part in message["content"] -%}
{%- if part["type"] == "text" -%}
{%- set said.text = said.text + part["text"] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [{"role": message["role"], "content": said.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


@dataclass(frozen=True)
class Serving:
    """What a bundle tells a program beside the model."""

    template: str  # Jinja
    ends: Sequence[int]  # tokens, each of which ends an answer
    start: int | None  # the token that is put before every prompt, where the tokenizer adds one
    capacity: int  # tokens of a conversation


def capacity(settings: Mapping[str, Any]) -> int:
    """Return for how many tokens a file is made, of section tokenize: a prompt, an answer, the padding."""
    return context_tokens(settings["tokenize"]["max_length"] + PREFILL)


def make_serving(settings: Mapping[str, Any], model: Path, ends: Sequence[int]) -> Serving:
    """Return how a model folder's files are asked, of sections task, dataset, card and tokenize."""
    tokenizer = load_tokenizer(model)
    if settings["card"]["template"] == "task":
        frame = find_frame(tokenizer, load_task(settings["task"], settings["dataset"]))
        template = write_template(frame)
    else:
        # Which transformers tells a template, and LiteRT-LM does not.
        told = "".join(
            f"{{%- set {name} = {quote(token)} -%}}\n"
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        )
        template = told + AS_TEXT + tokenizer.get_chat_template()
    start = next(iter(added_bos(tokenizer)), None)
    prompt = render_chat(tokenizer, [{"role": "user", "content": "a"}], {}, template=template)
    if start is not None and prompt.startswith(str(tokenizer.bos_token)):
        start = None  # the template writes it
    return Serving(template, ends, start, capacity(settings))


def write_bundle(tflite: Path, tokenizer: Path, serving: Serving, output: Path) -> None:
    """Write `tflite` and tokenizer.json as a .litertlm bundle; the same ones give the same bytes."""
    use_extra("litert")
    from litert_lm_builder import litertlm_builder as made_by

    def text(key: str, value: str) -> Any:
        return made_by.Metadata(key=key, value=value, dtype=made_by.DType.STRING)

    needed = tflite.stat().st_size + tokenizer.stat().st_size
    with program.staged(output, needed) as partial, tempfile.TemporaryDirectory() as work:
        metadata = Path(work, "metadata.pb")
        metadata.write_bytes(describe(serving).SerializeToString())
        content = " ".join(map(sha256, (tflite, tokenizer, metadata)))
        name = text("uuid", str(uuid.uuid5(uuid.NAMESPACE_OID, content)))
        builder = made_by.LitertLmFileBuilder()
        builder.add_system_metadata(text("Authors", "PocketTune"))
        builder.add_llm_metadata(str(metadata))
        builder.add_hf_tokenizer(str(tokenizer))
        # Its own way is a name drawn by lot and the time of day, which differ in every bundle.
        with (
            mock.patch.object(made_by, "populate_system_metadata", lambda given: [*given, name]),
            output_in_log("litert-lm-builder"),
            partial.open("wb") as file,
        ):
            # Else LiteRT-LM computes in FP16 where the processor can, which was not scored.
            builder.add_tflite_model(
                str(tflite),
                made_by.TfLiteModelType.PREFILL_DECODE,
                prefer_activation_type="fp32",
            )
            builder.build(file)


def describe(serving: Serving) -> Any:
    """Return the metadata as litert.lm.proto.LlmMetadata."""
    from litert_lm_builder.runtime.proto.llm_metadata_pb2 import LlmMetadata
    from litert_lm_builder.runtime.proto.sampler_params_pb2 import SamplerParameters

    told = LlmMetadata()
    for token in serving.ends:
        told.stop_tokens.add().token_ids.ids.append(token)
    if serving.start is not None:
        told.start_token.token_ids.ids.append(serving.start)
    told.jinja_prompt_template = serving.template
    told.max_num_tokens = serving.capacity
    told.min_runtime_version = LEAST_RUNTIME
    # The template writes the prompt; models that LiteRT-LM knows by name get one of its own around it.
    told.llm_model_type.generic_model.SetInParent()
    # The likeliest token, which is what was scored. Not GREEDY: litert-lm 0.18.1 knows that type and answers
    # "not implemented yet"; the best of one token is the same.
    told.sampler_params.type = SamplerParameters.TOP_P
    told.sampler_params.k = 1
    told.sampler_params.p = 1.0
    told.sampler_params.temperature = 1.0
    return told


class Bundle:
    """A .litertlm file, opened by LiteRT-LM as an app does."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt, with the start token where the bundle tells one."""
        start = self.engine.bos_token_id
        ids = list(self.engine.tokenize(text))
        return ids if start is None or ids[:1] == [start] else [start, *ids]

    def ends(self) -> set[int]:
        """Return the tokens that end an answer each by itself."""
        return {ids[0] for ids in self.engine.eos_token_ids if len(ids) == 1}

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt that a conversation becomes by the bundle's template."""
        with self._talk(messages, 1) as talk:
            return str(talk.render_message_to_string(messages[-1]))

    def answer(self, messages: Sequence[Mapping[str, str]], limit: int) -> str:
        """Return what is answered to a conversation, up to `limit` tokens."""
        with self._talk(messages, limit) as talk:
            reply = talk.send_message(messages[-1]).to_json()
        return "".join(part.get("text", "") for part in reply["content"])

    def complete(self, prompt: str, limit: int) -> str | None:
        """Return what is written behind a rendered prompt; None where it does not end within `limit` tokens."""
        session = self.engine.create_session(apply_prompt_template=False, max_output_tokens=limit)
        with session:
            session.run_prefill([prompt])
            text = str(session.run_decode().texts[0])
        return text if len(self.engine.tokenize(text)) < limit else None

    def _talk(self, messages: Sequence[Mapping[str, str]], limit: int) -> Any:
        return self.engine.create_conversation(
            messages=list(messages[:-1]), max_output_tokens=limit
        )


@contextmanager
def open_bundle(path: Path, threads: int) -> Iterator[Bundle]:
    """Open a bundle in LiteRT-LM on the CPU; UserError where it cannot, or is older than the bundle asks."""
    use_extra("litert")
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    check_runtime(path)
    try:
        engine = litert_lm.Engine(
            str(path),
            backend=litert_lm.Backend.CPU(thread_count=threads),
            cache_dir=":nocache",  # it would write prepared weights beside the file
        )
    except RuntimeError as error:
        raise UserError(f"{path}: LiteRT-LM cannot open it: {error}") from error
    with engine:
        yield Bundle(engine)


def check_runtime(path: Path) -> None:
    """Raise UserError where a bundle asks for a later LiteRT-LM than is here."""
    import litert_lm

    try:
        with litert_lm.ModelInfo(str(path)) as told:
            least = told.min_runtime_version or "0"
    except RuntimeError as error:
        raise UserError(
            f"{path} is not a .litertlm file: {error}; remove it and run again"
        ) from error
    here = version("litert-lm-api")
    if as_numbers(here) < as_numbers(least):
        raise UserError(
            f"{path} asks for LiteRT-LM {least} or later, here is {here}: run make litert, or in an app take a"
            " newer one"
        )
