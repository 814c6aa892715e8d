"""A server of OpenAI's API on the loopback address, for a GGUF file, that can be made to ask wrongly."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pockettune.runtimes.greedy import as_text
from pockettune.runtimes.llama import LlamaModel


@dataclass
class Behaviour:
    """What the server does, and in which it may be wrong."""

    template: str | None = None  # instead of the file's
    drops_system: bool = False
    temperature: float = 0.0  # where a request names none
    token_before: int | None = None  # put before every prompt
    stops: bool = True
    takes_text: bool = True  # has /v1/completions
    takes_logprobs: bool = True


class StandIn(ThreadingHTTPServer):
    """Answers chats and raw text with a model; one request at a time."""

    def __init__(self, model: LlamaModel, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.behaviour = model, behaviour
        self.chance, self.turn = np.random.default_rng(0), threading.Lock()
        self.asked: list[dict[str, Any]] = []  # bodies of requests

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return the prompt, as llama-cpp-python's server renders it."""
        if self.behaviour.drops_system:
            messages = [message for message in messages if message["role"] != "system"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(
            self.behaviour.template or self.model.chat_template() or ""
        )
        return template.render(messages=messages, add_generation_prompt=True)

    def answer(self, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return a choice and the usage."""
        before = self.behaviour.token_before
        ids = [*([] if before is None else [before]), *self.model.tokenize(prompt)]
        temperature = body.get("temperature", self.behaviour.temperature)
        said: list[int] = []
        scores: dict[str, float] = {}
        ended = False
        while len(said) < body["max_tokens"] and not ended:
            (logits,) = self.model.next_token_logits([[*ids, *said]])
            probabilities = softmax(logits)
            if not said:
                best = np.argsort(-logits)[:20]
                scores = {as_text(self.model, [t]): float(np.log(probabilities[t])) for t in best}
            token = int(logits.argmax())
            if temperature:
                token = int(self.chance.choice(len(logits), p=softmax(logits / temperature)))
            ended = self.model.stops_at(token) and self.behaviour.stops
            said += [] if ended else [token]
        choice: dict[str, Any] = {"text": as_text(self.model, said), "finish_reason": "stop" if ended else "length"}  # fmt: skip
        top = [{"token": token, "logprob": score} for token, score in scores.items()]
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"top_logprobs": top}]}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:  # http.server's name
        self.reply({"data": [{"id": "stand-in"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        behaviour = self.server.behaviour
        with self.server.turn:
            self.server.asked.append(body)
            if "logprobs" in body and not behaviour.takes_logprobs:
                self.send_error(400)
            elif self.path == "/v1/chat/completions":
                told = self.server.answer(self.server.render(body["messages"]), body)
                choice = told["choices"][0]
                choice["message"] = {"role": "assistant", "content": choice.pop("text")}
                self.reply(told)
            elif self.path == "/v1/completions" and behaviour.takes_text:
                self.reply(self.server.answer(body["prompt"], body))
            else:
                self.send_error(404)

    def reply(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


@contextmanager
def serve_file(path: Path, **behaviour: Any) -> Iterator[tuple[str, StandIn]]:
    """Serve a GGUF file; yield the address and the server."""
    with LlamaModel(path, threads=1) as model, StandIn(model, Behaviour(**behaviour)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", server
        server.shutdown()
        thread.join()
