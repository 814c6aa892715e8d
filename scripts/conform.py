"""Replay a bundle's rows against a server and say whether it answers as was scored, or why not.

Any address that speaks OpenAI's API: llama-server, Ollama, LM Studio, llamafile, llama-cpp-python's.
It is asked as a chat program asks it, with nothing but the text: at the server's own temperature, unless
--greedy sends one. Exit status 2 where rows are answered otherwise.

Input   a bundle of make_bundle.py: task.json and conformance.jsonl
"""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.records import read_records
from pockettune.evaluation.conformance import Reply, describe, replay, unfold

# In the words of OpenAI's API, and two of llama.cpp's and Ollama's that others leave unread.
GREEDY = {"temperature": 0, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "top_k": 1,
          "repeat_penalty": 1.0}  # fmt: skip
TOP = 20  # log probabilities asked for, as many as OpenAI's API gives
SECONDS = 300  # for an answer: a small board loads the model first


class Address:
    """A server at an address, as conformance.Server."""

    def __init__(
        self, address: str, model: str | None, greedy: bool, max_tokens: int, stop: str
    ) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")
        self.common: dict[str, Any] = {"max_tokens": max_tokens, **(GREEDY if greedy else {})}
        self.stop = stop
        # Ollama and LM Studio hold several models, the others leave the name unread.
        if name := model or self._first_model():
            self.common["model"] = name
        self.scores: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP}

    def chat(self, messages: Sequence[Mapping[str, str]], greedy: bool) -> Reply:
        body = {**self.common, "messages": messages, **(GREEDY if greedy else {})}
        try:
            reply = self._post("/v1/chat/completions", body | self.scores)
        except urllib.error.HTTPError:
            if not self.scores:
                raise
            reply = self._post("/v1/chat/completions", body)
            self.scores = {}  # it was they that the server refused
        choice = reply["choices"][0]
        return read_reply(reply, choice["message"].get("content") or "")

    def complete(self, prompt: str) -> Reply | None:
        body = {**self.common, **GREEDY, "prompt": prompt, "stop": [self.stop]}
        try:
            reply = self._post("/v1/completions", body)
        except urllib.error.HTTPError:
            return None
        return read_reply(reply, reply["choices"][0]["text"])

    def _first_model(self) -> str | None:
        try:
            listed = self._open(urllib.request.Request(f"{self.address}/v1/models"))
            return listed["data"][0]["id"]
        except (urllib.error.HTTPError, LookupError):
            return None

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self._open(urllib.request.Request(self.address + path, data, headers))

    def _open(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.address} does not answer as OpenAI's API does: {error}; start the server, or give"
                " another --address"
            ) from error


def read_reply(reply: Mapping[str, Any], text: str) -> Reply:
    """Return what an answer in the form of OpenAI's API tells."""
    choice = reply["choices"][0]
    scores = choice.get("logprobs") or {}
    first = (scores.get("content") or [{}])[0].get("top_logprobs") or []
    found: dict[int | str, float] = {}
    for entry in first:
        found[entry["token"]] = entry["logprob"]
        if "id" in entry:
            found[entry["id"]] = entry["logprob"]
    counted = (reply.get("usage") or {}).get("prompt_tokens")
    return Reply(text, counted or None, found)


def conform(bundle: Path, address: str, model: str | None, greedy: bool) -> None:
    """Say whether all rows are answered as scored; UserError names the cause where some are not."""
    task, rows = (bundle / name for name in ("task.json", "conformance.jsonl"))
    if missing := [path.name for path in (task, rows) if not path.is_file()]:
        raise UserError(f"{bundle} is no bundle: {', '.join(missing)} is missing; make one first")
    told, asked = program.read_json(task), unfold(read_records(rows))
    server = Address(address, model, greedy, told["max_tokens"], told["stop"])
    try:
        verdict = replay(told, asked, server)
    except urllib.error.HTTPError as error:
        words = error.read().decode("utf-8", "replace")[:200]
        raise UserError(
            f"{address} refuses {error.url.removeprefix(server.address)}: {error.code} {error.reason}: {words};"
            " see the server's log, or name the model by --model"
        ) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{address} does not answer as OpenAI's API does: {error!r} in its reply; give another --address"
        ) from error
    sentence = f"{address}: {describe(verdict, len(asked), told['stop'])}"
    if verdict.wrong:
        raise UserError(sentence)
    program.logger.info(sentence)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="folder of make_bundle.py")
    parser.add_argument("--address", required=True, help="such as http://127.0.0.1:8080")
    parser.add_argument("--model", help="name in the server; else the first that it lists")
    parser.add_argument(
        "--greedy", action="store_true", help="send temperature 0, as the bundle's README does"
    )
    program.run(parser, lambda a: conform(a.bundle, a.address, a.model, a.greedy))


if __name__ == "__main__":
    main()
