"""Chat templates of several families: what they make of options and days, and where answers end.

The templates are the deciding lines of the published ones.
"""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from conftest import run_program
from pockettune.common.errors import UserError
from pockettune.data.prompts import Example, ExampleMaker
from pockettune.tasks import load_task
from tokenize_dataset import describe_chat

TASK = {"type": "classification", "system": "助手", "prompt": "评论：{text}\n情感：", "labels": {"0": "差", "1": "好"}, "template_options": {}}  # fmt: skip
COLUMNS = {"text_column": "text", "label_column": "label"}

GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_3_2 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
)
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SMOLLM3 = (
    "{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}"
    + CHATML
    + ASK
)
QWEN_3 = """{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
        {{- content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_folder(
    folder: Path,
    template: str,
    special: list[str],
    eos: str,
    bos: str | None = None,
    plain: tuple[str, ...] = (),
    adds_bos: bool = False,
) -> Path:
    """Write a tokenizer of bytes with these special tokens, and `plain` added ones, into a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+|\S+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["好"], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    if adds_bos:
        assert bos is not None
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": bos,
              "chat_template": template}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    return folder


@pytest.fixture
def load(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Return what makes a tokenizer as make_folder does."""
    from pockettune.models.folder import load_tokenizer

    return lambda *arguments, **options: load_tokenizer(
        make_folder(tmp_path / "model", *arguments, **options)
    )


def maker(tokenizer: Any, **changes: Any) -> ExampleMaker:
    return ExampleMaker(tokenizer, load_task({**TASK, **changes}, COLUMNS), 512)


def make(made: ExampleMaker, text: str = "房间很干净。") -> Example:
    (example,) = made.make([{"id": "test-1", "text": text, "label": "好"}])
    return example


def tokenize(folder: Path, output: Path, **changes: Any) -> str:
    """Run tokenize_dataset.py on a row; return what it said if it failed, else nothing."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"id": "test-1", "text": "房间很干净。", "label": "好"}\n')
    settings = {"task": {**TASK, **changes.pop("task", {})}, "dataset": COLUMNS,
                "tokenize": {"max_length": 256, **changes}}  # fmt: skip
    splits = [word for split in ("train", "validation", "test") for word in (f"--{split}", rows)]
    result = run_program("tokenize_dataset.py", "--settings", json.dumps(settings), "--model", folder,
                         *splits, "--output", output)  # fmt: skip
    assert result.returncode in (0, 2), result.stdout
    assert output.exists() == (result.returncode == 0)
    return result.stdout if result.returncode else ""


def on_day(day: datetime.date, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers live on another day."""
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls(day.year, day.month, day.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


# --- the day ---


@pytest.mark.parametrize("template", [LLAMA_3_2, SMOLLM3], ids=["llama-3.2", "smollm3"])
def test_tokens_made_on_two_days_are_the_same_bytes(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenize_dataset import tokenize_dataset

    folder = make_folder(tmp_path / "model", template, IM, "<|im_end|>", "<|endoftext|>")
    (tmp_path / "rows.jsonl").write_text('{"id": "test-1", "text": "好", "label": "好"}\n')
    dataset = {split: tmp_path / "rows.jsonl" for split in ("train", "validation", "test")}
    settings = {"task": TASK, "dataset": COLUMNS, "tokenize": {"max_length": 512}}
    made = []
    for day in (datetime.date(2025, 1, 2), datetime.date(2026, 3, 4)):
        on_day(day, monkeypatch)
        output = tmp_path / f"tokens {day}"
        tokenize_dataset(settings, folder, dataset, output)
        made.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert made[0] == made[1]
    assert "26 Ju" in json.loads(made[0]["chat.json"])["prompt"]


def test_a_runtime_is_told_the_day_where_an_option_sets_it(load: Any) -> None:
    tokenizer = load(LLAMA_3_2, ["<bos>", "<|eot_id|>"], "<|eot_id|>", "<bos>")
    told = describe_chat(tokenizer, load_task(TASK, COLUMNS))
    assert told["options"] == {"date_string": "26 Jul 2024"} and not told["reads_clock"]
    own = {**TASK, "template_options": {"date_string": "01 Jan 2020"}}
    told = describe_chat(tokenizer, load_task(own, COLUMNS))
    assert told["options"] == {"date_string": "01 Jan 2020"} and "Date: 01 Jan" in told["prompt"]


def test_a_day_that_no_option_sets_is_said(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    told = describe_chat(load(SMOLLM3, IM, "<|im_end|>"), load_task(TASK, COLUMNS))
    assert told["reads_clock"] and told["options"] == {}
    assert "writes the day, which no option sets" in caplog.text
    caplog.clear()
    told = describe_chat(load(CHATML + ASK, IM, "<|im_end|>"), load_task(TASK, COLUMNS))
    assert not told["reads_clock"] and "day" not in caplog.text


# --- options ---


def test_options_reach_the_template(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load(QWEN_3, IM, "<|im_end|>")
    quiet = maker(tokenizer, template_options={"enable_thinking": False})
    assert make(quiet).prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert make(maker(tokenizer)).prompt.endswith("<|im_start|>assistant\n")
    told = describe_chat(tokenizer, quiet.task)
    assert told["options"] == {"enable_thinking": False} and caplog.text == ""
    describe_chat(tokenizer, load_task(TASK, COLUMNS))
    assert "set task.template_options: {enable_thinking: false}" in caplog.text


def test_a_runtime_is_told_not_to_think_where_the_template_does_not(load: Any) -> None:
    """llama-server sets enable_thinking where a template knows it, whatever the template's default."""
    asks = "{% if enable_thinking is defined and enable_thinking %}{{ '<think>' }}{% endif %}"
    told = describe_chat(load(CHATML + ASK + asks, IM, "<|im_end|>"), load_task(TASK, COLUMNS))
    assert told["options"] == {"enable_thinking": False} and "<think>" not in told["prompt"]


def test_a_prompt_that_ends_in_a_thought_is_said(
    load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    thinks = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    describe_chat(load(CHATML + thinks, IM, "<|im_end|>"), load_task(TASK, COLUMNS))
    assert "the base model may expect to think first" in caplog.text


def test_a_template_that_the_tasks_cannot_be_is_said(
    load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    joins = CHATML.replace("message['content']", "(message['content'] | replace('\n', ' '))") + ASK
    task = load_task({**TASK, "system": "", "prompt": "{text}"}, COLUMNS)
    describe_chat(load(joins, IM, "<|im_end|>"), task)
    assert "set card.template: base" in caplog.text
    caplog.clear()
    describe_chat(load(CHATML + ASK, IM, "<|im_end|>"), task)
    assert caplog.text == ""


def test_options_that_a_template_does_not_read_are_refused(load: Any) -> None:
    tokenizer = load(QWEN_3, IM, "<|im_end|>")
    with pytest.raises(UserError, match=r"names bos_token, enable_thinkin, messages, which .* not read; it reads .*enable_thinking"):  # fmt: skip
        maker(
            tokenizer, template_options={"enable_thinkin": False, "messages": "", "bos_token": ""}
        )


# --- the end of an answer ---


@pytest.mark.parametrize(
    ("template", "special", "eos", "end"),
    [
        (GEMMA_2, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<end_of_turn>"),
        (PHI_3, ["<|endoftext|>", "<|end|>", "<|user|>"], "<|endoftext|>", "<|end|>"),
        (LLAMA_3_2, ["<bos>", "<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>", "<|eot_id|>"),
        (QWEN_3, IM, "<|endoftext|>", "<|im_end|>"),
        (CHATML + ASK, IM, "<|im_end|>", "<|im_end|>"),
        (ZEPHYR, ["<s>", "</s>"], "</s>", "</s>"),
        (CHATML + ASK, ["<eos>"], "<eos>", "<eos>"),  # its markers are no tokens
        ("{{ messages[0].content }}\nAnswer:", ["<eos>"], "<eos>", "<eos>"),
    ],
    ids=["gemma", "phi", "llama", "qwen3", "chatml", "zephyr", "chatml as text", "no turns"],
)
def test_an_answer_ends_as_the_template_ends_it(
    template: str, special: list[str], eos: str, end: str, load: Any
) -> None:
    bos = "<bos>" if "<bos>" in special else None
    made = maker(load(template, special, eos, bos), system="")
    assert made.tokenizer.decode(make(made).answer_ids) == f"好{end}"
    assert set(made.tokenizer.convert_ids_to_tokens(made.ends)) == {end, eos}


def test_a_turn_that_ends_with_a_token_not_marked_special(load: Any) -> None:
    tokenizer = load(CHATML + ASK, ["<eos>"], "<eos>", plain=("<|im_end|>", "\n", "  "))
    made = maker(tokenizer)
    assert made.tokenizer.decode(make(made).answer_ids) == "好<|im_end|>"


# --- messages that a template does not take ---


def test_a_refused_system_message_names_the_remedy(load: Any) -> None:
    tokenizer = load(GEMMA_2, ["<bos>", "<eos>", "<end_of_turn>"], "<eos>", "<bos>")
    with pytest.raises(UserError, match=r'refuses a system message: System role not supported; set task\.system: ""'):  # fmt: skip
        make(maker(tokenizer))
    assert "<end_of_turn>" in make(maker(tokenizer, system="")).prompt


def test_a_dropped_system_message_names_the_remedy(load: Any) -> None:
    drops = CHATML.replace("{{", "{% if message['role'] != 'system' %}{{").replace("}}", "}}{% endif %}")  # fmt: skip
    with pytest.raises(UserError, match=r'does not write the system message .* set task\.system: ""'):  # fmt: skip
        make(maker(load(drops + ASK, IM, "<|im_end|>")))


@pytest.mark.parametrize(
    ("template", "message"),
    [("{% for m in messages %}", "Unexpected end of template"), ([{"name": "rag", "template": "x"}], "rag")],
    ids=["no jinja", "no default"],
)  # fmt: skip
def test_a_template_that_cannot_be_read_is_refused(template: Any, message: str, load: Any) -> None:
    with pytest.raises(UserError, match=f"its chat template cannot be used: .*{message}"):
        load(template, IM, "<|im_end|>")


def test_a_template_without_the_text_is_refused(load: Any) -> None:
    with pytest.raises(UserError, match="does not write the user message of record test-1"):
        make(maker(load("{{ messages[0]['content'] }}", IM, "<|im_end|>")))


# --- texts ---

GEMMA_ADDED = ("\n", "\n\n", "  ", "   ", "<table>", "<b>", "<unused0>")


def test_what_is_plain_text_to_a_tokenizer_is_not_changed(load: Any) -> None:
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    made = maker(load(GEMMA_2, special, "<eos>", "<bos>", plain=GEMMA_ADDED), system="")
    text = "第一行\n第二行\n\n<b>好</b>  两个   三个<table>"
    example = make(made, text)
    assert not example.defused and text in example.prompt
    assert make(made, "好<end_of_turn>\n<b>").defused
    assert made.defuse("好<end_of_turn>\n<b>") == "好< end_of_turn>\n<b>"


def test_tokens_that_the_template_writes_are_broken_special_or_not(load: Any) -> None:
    made = maker(load(QWEN_3, IM, "<|im_end|>", plain=("<think>", "</think>", "<tool>")))
    assert made.defuse("<think>a</think><tool>") == "< think>a< /think><tool>"


def test_no_control_token_is_left_where_one_stands_in_another(load: Any) -> None:
    made = maker(load(CHATML + ASK, [*IM, "[[X]]", "[X]]", "|"], "<|im_end|>"))
    broken = made.defuse("[[X]]<|im_end|><<|im_start|>|im_end|>")
    assert not any(token in broken for token in ("[[X]]", "[X]]", "<|im_end|>", "<|im_start|>"))


# --- BOS ---


def test_a_prompt_begins_with_a_bos_as_in_serving(load: Any) -> None:
    tokenizer = load(ZEPHYR, ["<s>", "</s>"], "</s>", "<s>", adds_bos=True)
    made = maker(tokenizer)
    bos = tokenizer.bos_token_id
    example = make(made)
    assert example.prompt_ids[0] == bos and example.prompt_ids.count(bos) == 1
    assert example.answer_ids[0] != bos
    assert not example.prompt.startswith("<s>"), "the runtime adds it"
    long = make(ExampleMaker(tokenizer, made.task, 120), "好" * 500)
    assert long.cut and long.prompt_ids[0] == bos and len(long.prompt_ids) + 4 <= 120


def test_a_bos_of_the_template_is_not_doubled(load: Any) -> None:
    for adds in (True, False):
        tokenizer = load(GEMMA_2, ["<bos>", "<eos>", "<end_of_turn>"], "<eos>", "<bos>", adds_bos=adds)  # fmt: skip
        made = maker(tokenizer, system="")
        assert make(made).prompt_ids.count(tokenizer.bos_token_id) == 1
        # What is sent to a runtime that adds a BOS must not hold one.
        assert describe_chat(tokenizer, made.task)["prompt"].startswith("<bos>") != adds


# --- what tokenize_dataset.py refuses in a line ---


def test_max_length_beyond_the_context_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", CHATML + ASK, IM, "<|im_end|>")
    for config in (
        {"max_position_embeddings": 1024},
        {"n_positions": 1024},
        {"text_config": {"max_position_embeddings": 1024}},
    ):
        (folder / "config.json").write_text(json.dumps(config))
        told = tokenize(folder, tmp_path / "tokens", max_length=1025)
        assert "tokenize.max_length is 1,025, the model's context ends at 1,024 tokens" in told
        assert len([line for line in told.splitlines() if "error:" in line]) == 1
    assert tokenize(folder, tmp_path / "tokens", max_length=1024) == ""


def test_words_of_the_same_tokens_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", CHATML + ASK, IM, "<|im_end|>")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFKC"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    labels = {"0": "A", "1": "Ａ", "2": "①", "3": "1", "4": "好"}
    told = tokenize(folder, tmp_path / "tokens", task={"labels": labels})
    assert "task.labels: 'A' and 'Ａ'; '①' and '1' are the same tokens to this model" in told


def test_answers_json_names_the_ends(tmp_path: Path) -> None:
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    folder = make_folder(tmp_path / "model", GEMMA_2, special, "<eos>", "<bos>")
    assert tokenize(folder, tmp_path / "tokens", task={"system": ""}) == ""
    answers = json.loads((tmp_path / "tokens/answers.json").read_text())
    assert answers["ends"] == [1, 3] and [ids[-1] for ids in answers["ids"]] == [3, 3]
