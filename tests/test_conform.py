"""conform: each way of asking wrongly is told by its name."""

import itertools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conftest import run_program
from pockettune.evaluation.conformance import (
    NEAR,
    Reply,
    describe,
    find_parting,
    judge,
    messages_of,
    replay,
)
from stand_in import serve_file

TASK: dict[str, Any] = {
    "template": "task",
    "system": "助手",
    "parts": ["评论：", "\n情感："],
    "bos": "",
    "stop": "<end>",
}
ROWS: list[dict[str, Any]] = [
    {"id": f"test-{n}", "message": f"好{n}", "prompt": f"[助手|评论：好{n}\n情感：]", "prompt_ids": list(range(20)),
     "labels": {"负": {"ids": [1], "log_probability": -3.0}, "正": {"ids": [2], "log_probability": -0.1}}, "answer": "正"}
    for n in range(12)
]  # fmt: skip


@dataclass
class Fake:
    """A server that answers rightly only what is asked as was trained."""

    fault: str = ""
    noise: Iterator[int] = field(default_factory=itertools.count)

    def chat(self, messages: Sequence[Mapping[str, str]], greedy: bool) -> Reply:
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        user = messages[-1]["content"]
        if self.fault == "system prompt":
            prompt = f"[|{user}]"
        elif self.fault == "template":
            prompt = f"[{system}|{user}]"
        elif self.fault == "template of another kind":
            prompt = f"SYSTEM: {system} USER: {user}"
        else:
            prompt = f"[助手|{user.join(TASK['parts'])}]"
        if self.fault == "sampling" and not greedy:
            return Reply("好的", prompt_tokens=20)
        return self.answer(prompt)

    def complete(self, prompt: str) -> Reply | None:
        return None if self.fault == "no raw text" else self.answer(prompt)

    def answer(self, prompt: str) -> Reply:
        right = prompt in {row["prompt"] for row in ROWS}
        tokens = 20 if right else len(prompt)
        if self.fault in ("other file", "no raw text"):
            return Reply("负", prompt_tokens=20)
        if self.fault == "BOS":
            return Reply("负", prompt_tokens=21)
        if self.fault == "stop":
            return Reply("正\n\n正 user", prompt_tokens=20)
        # Beside a token that is no label: a log probability which no two answers share.
        first: dict[int | str, float] = {0: float(-next(self.noise))}
        return Reply("正" if right else "我是助手", prompt_tokens=tokens, first=first)


FAULTS = {
    "sampling": "sampling", "stop": "stop", "template": "template", "template of another kind": "template",
    "system prompt": "system prompt", "BOS": "BOS", "other file": "other file", "no raw text": "unknown",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_cause_is_named(fault: str) -> None:
    verdict = replay(TASK, ROWS, Fake(fault))
    assert verdict.cause == FAULTS[fault] and len(verdict.wrong) == len(ROWS)
    told = describe(verdict, len(ROWS), TASK["stop"])
    assert told.startswith(
        "0 of 12 rows are answered as scored; 12 are not, first test-0: scored '正'"
    )
    assert f"cause: {FAULTS[fault]}: " in told


def test_server_that_asks_rightly_passes() -> None:
    verdict = replay(TASK, ROWS, Fake())
    assert (verdict.right, verdict.wrong, verdict.cause, verdict.other_length) == (12, [], None, 0)
    assert describe(verdict, 12, "<end>") == "12 of 12 rows are answered as scored"


def test_near_labels_may_change_places() -> None:
    labels: dict[str, dict[str, Any]] = {
        "负": {"ids": [1], "log_probability": -0.9},
        "正": {"ids": [2], "log_probability": -0.9 + NEAR - 0.01},
    }
    row = ROWS[0] | {"labels": labels}
    assert judge(row, Reply("负")) == "near" and judge(row, Reply("好")) == "wrong"
    labels["负"]["log_probability"] -= 0.02
    assert judge(row, Reply("负")) == "wrong"
    assert judge(row, Reply(" 正\n")) == "right" and judge(row, Reply("正 因为")) == "runs on"


@dataclass
class Lot(Fake):
    """A server that draws its answers where no temperature is sent."""

    first: Mapping[int | str, float] = field(default_factory=dict)

    def chat(self, messages: Sequence[Mapping[str, str]], greedy: bool) -> Reply:
        return Reply("正" if greedy else "负", prompt_tokens=20, first=self.first)


@pytest.mark.parametrize(
    ("first", "cause"), [({1: -0.8, 2: -0.6}, "sampling"), ({1: -0.6, 2: -0.8}, None), ({}, None)]
)
def test_near_label_that_was_drawn_is_told(first: dict[int | str, float], cause: str | None) -> None:  # fmt: skip
    labels = {"负": {"ids": [1], "log_probability": -0.9}, "正": {"ids": [2], "log_probability": -0.5}}  # fmt: skip
    verdict = replay(TASK, [{**row, "labels": labels} for row in ROWS], Lot(first=first))
    assert (verdict.cause, len(verdict.near)) == (cause, 0 if cause else len(ROWS))


class Longer(Fake):
    """A server that puts a token before the prompt, and answers as scored nevertheless."""

    def answer(self, prompt: str) -> Reply:
        return Reply("正", prompt_tokens=21)


def test_token_before_the_prompt_is_told_where_answers_hold() -> None:
    verdict = replay(TASK, ROWS, Longer())
    assert verdict.wrong == [] and verdict.token_more
    told = describe(verdict, 12, TASK["stop"])
    assert told.endswith("12 prompts had another number of tokens than was scored, each one more: probably a BOS")  # fmt: skip


TEXT_ROW: dict[str, Any] = {
    "answer": "北京大学", "answer_ids": [5, 6, 7], "ended": True,
    "ends": [2, 3, 4], "margins": [3.0, NEAR - 0.1, 3.0, 2.0], "log_probabilities": [-0.1] * 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "judged", "token"),
    [
        ("北京大学", "right", None),
        (" 北京大学\n", "right", None),
        ("南京大学", "wrong", 0),
        ("北平", "wrong", 0),
        ("北京小学", "near", 1),
        ("北京大会", "wrong", 2),
        ("北京", "near", 1),
        ("北京大学在北京", "runs on", 3),
        ("", "wrong", 0),
    ],
)  # fmt: skip
def test_text_is_judged_by_the_token_at_which_it_parts(said: str, judged: str, token: int | None) -> None:  # fmt: skip
    assert (judge(TEXT_ROW, Reply(said)), find_parting(TEXT_ROW, said)) == (judged, token)


def test_end_of_a_text_may_be_near_too_and_a_cut_one_may_go_on() -> None:
    assert (
        judge({**TEXT_ROW, "margins": [3.0, 3.0, 3.0, NEAR - 0.1]}, Reply("北京大学在")) == "near"
    )
    spaced = {**TEXT_ROW, "answer": " 北京大学", "ends": [3, 4, 5]}
    assert judge(spaced, Reply("北京小学")) == "near", "servers take the space away"
    cut = {**TEXT_ROW, "ended": False, "margins": [3.0, 3.0, 3.0]}
    assert judge(cut, Reply("北京大学在")) == "right"


TALK = [{"role": "system", "content": "助手"}, {"role": "user", "content": "北京的大学？"}]


def test_conversation_is_sent_whole() -> None:
    row = {**TEXT_ROW, "messages": TALK}
    assert messages_of({**TASK, "template": "base"}, row) == TALK


@dataclass
class Talker(Fake):
    """Answers a conversation rightly, but for its fault."""

    def chat(self, messages: Sequence[Mapping[str, str]], greedy: bool) -> Reply:
        self.right = "北京大学" if list(messages) == TALK or self.fault == "stop" else "南京"
        if self.fault in ("template", "system prompt", "other file"):
            self.right = "南京" if self.fault != "template" or len(messages) > 1 else "东京"
        return Reply(self.right + ("，对" if self.fault == "stop" else ""))

    def complete(self, prompt: str) -> Reply | None:
        return Reply("南京" if self.fault == "other file" else "北京大学")


@pytest.mark.parametrize("fault", ["stop", "template", "system prompt", "other file"])
def test_cause_is_named_of_text(fault: str) -> None:
    rows = [{**TEXT_ROW, "id": f"test-{n}", "messages": TALK, "prompt": "x", "prompt_ids": [1]} for n in range(4)]  # fmt: skip
    verdict = replay({**TASK, "template": "base"}, rows, Talker(fault))
    told = describe(verdict, 4, "<end>")
    assert verdict.cause == fault and "scored '北京大学'" in told
    assert f"parts at token {4 if fault == 'stop' else 1}" in told


def test_base_template_is_sent_system_and_prompt() -> None:
    task = {**TASK, "template": "base"}
    row = {"message": "评论：好\n情感："}
    expected = [{"role": "system", "content": "助手"}, {"role": "user", "content": row["message"]}]
    assert messages_of(task, row) == messages_of(task, row, spelled=True) == expected
    assert messages_of({**task, "system": ""}, row) == expected[1:]
    assert messages_of(TASK, {"message": "好"}) == [{"role": "user", "content": "好"}]
    assert messages_of(TASK, {"message": "好"}, spelled=True) == expected


def conform(bundle: Path, address: str, *options: str) -> tuple[int, str]:
    result = run_program("conform.py", "--bundle", bundle, "--address", address, *options)
    assert "Traceback" not in result.stdout
    return result.returncode, result.stdout.splitlines()[-1]


class OtherApi(BaseHTTPRequestHandler):
    """Answers with JSON that is not OpenAI's."""

    def do_POST(self) -> None:  # http.server's name
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"response": "yes"}')

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


def test_address_of_another_api_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps({**TASK, "max_tokens": 4}))
    (tmp_path / "conformance.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherApi) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, line = conform(tmp_path, f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert code == 2 and "does not answer as OpenAI's API does: KeyError('choices')" in line


# --- a real model behind a real address ---


def test_right_server(bundle: Path) -> None:
    with serve_file(bundle / "model.gguf") as (address, server):
        code, line = conform(bundle, f"{address}/v1/")
        assert (
            code == 0
            and "50 of 50 rows are answered as scored; log probabilities differ by 0.0" in line
        )
        assert len(server.asked) == 50 and all(body["model"] == "stand-in" for body in server.asked)
        assert all(
            len(body["messages"]) == 1 and "temperature" not in body for body in server.asked
        )
        server.behaviour.takes_logprobs = False
        code, line = conform(bundle, address)
        assert code == 0 and line.endswith("50 of 50 rows are answered as scored")


VICUNA = "{% for m in messages %}USER: {{ m['content'] }} {% endfor %}ASSISTANT:"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "temperature 1.5": ({"temperature": 1.5}, "cause: sampling: "),
    "another template": ({"template": VICUNA}, "cause: template: "),
    "no stop": ({"stops": False}, "cause: stop: "),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_server_is_told_why(wrong: str, bundle: Path) -> None:
    behaviour, told = WRONG[wrong]
    with serve_file(bundle / "model.gguf", **behaviour) as (address, _):
        code, line = conform(bundle, address)
        assert code == 2 and line.startswith("error: ") and told in line
        code, _ = conform(bundle, address, "--greedy")
        assert code == (0 if wrong == "temperature 1.5" else 2)


def test_wrong_file(bundle: Path, f16: Path) -> None:
    with serve_file(f16) as (address, _):
        code, line = conform(bundle, address)
    assert code == 2 and "cause: other file: " in line


def test_no_server_and_no_bundle_are_one_line(bundle: Path, tmp_path: Path) -> None:
    code, line = conform(bundle, "http://127.0.0.1:9")
    assert code == 2 and "http://127.0.0.1:9 does not answer as OpenAI's API does" in line
    code, line = conform(tmp_path, "http://127.0.0.1:9")
    assert code == 2 and "is no bundle: task.json, conformance.jsonl is missing" in line
