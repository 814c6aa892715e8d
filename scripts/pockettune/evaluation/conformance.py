"""Whether a server answers a bundle's rows as they were scored, and what is wrong where it does not.

A server is asked as a chat program asks it. Of rows that are answered otherwise the cause is found by
asking again in other ways: with the likeliest token, with the trained messages spelled out, with the
prompt as raw text. The first way that mends all of them, and the tokens that the server counted, tell.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pockettune.data.prompts import take_evenly

Row = Mapping[str, Any]  # a line of conformance.jsonl

ROWS = 50  # in a bundle, of texts that are too long their windows
# Two labels nearer than this, in nats, may change places in another build of llama.cpp, whose kernels sum
# in another order: 0.64 was the most by which the difference of two labels moved, of Q4_K_M in a browser
# (benchmarks/app.md). task.json tells it to the app and to other programs.
NEAR = 0.7
ASKED_AGAIN = 8  # rows that are asked in other ways

CAUSES = {
    "sampling": "the server samples; with temperature 0 it answers as scored: send temperature 0 (conform --greedy"
    " does), or set it so in the server",
    "stop": "answers begin as scored and go on: the server does not stop at {stop}; give it as a stop word",
    "template": "the server does not use the file's chat template but one of its own: switch that to Jinja, to"
    " the template in the file",
    "system prompt": "the server leaves the system message out: switch it to the file's own chat template, or"
    " set the system prompt of task.json in it",
    "BOS": "the server puts a token more before the prompt than was scored, probably a BOS: switch that off",
    "other file": "the prompt as raw text is answered otherwise too: the server has another file loaded; compare"
    " its checksum with SHA256SUMS",
    "unknown": "the template or the file is another; the server takes no raw text by which to tell",
}


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    text: str
    prompt_tokens: int | None = None  # as the server counted them
    first: Mapping[int | str, float] = field(
        default_factory=dict
    )  # log probabilities, by id or text


class Server(Protocol):
    """An OpenAI-compatible address."""

    def chat(self, messages: Sequence[Mapping[str, str]], greedy: bool) -> Reply:
        """Answer a conversation; without `greedy` at the server's own sampling."""

    def complete(self, prompt: str) -> Reply | None:
        """Continue raw text with the likeliest token; None where the server cannot."""


@dataclass(frozen=True)
class Verdict:
    """What was found of all rows."""

    right: int
    near: list[str]  # ids of rows that changed and may, because two labels were close
    wrong: list[tuple[str, str, str]]  # id, scored answer, what was answered
    cause: str | None  # a key of CAUSES, where rows are wrong
    other_length: int  # rows whose prompt had another number of tokens than was scored
    token_more: bool  # every prompt had one more
    largest_difference: float | None  # of a label's log probability, where the server tells them
    text: bool = False  # whether answers are text, and no labels
    first_parting: int | None = None  # of the first wrong row, the token at which its text parts


def unfold(rows: Iterable[Row]) -> list[Row]:
    """Return what is asked one by one: in the place of a row with windows, its windows."""
    return [asked for row in rows for asked in row.get("windows", [row])]


def messages_of(task: Mapping[str, Any], row: Row, spelled: bool = False) -> list[dict[str, str]]:
    """Return what a chat program sends; `spelled` out, also to a file that writes the prompt itself."""
    if "messages" in row:
        return list(row["messages"])
    if task["template"] == "task" and not spelled:
        return [{"role": "user", "content": row["message"]}]
    content = row["message"]
    if task["template"] == "task":
        content = content.join(task["parts"])
    system = [{"role": "system", "content": task["system"]}] if task["system"] else []
    return [*system, {"role": "user", "content": content}]


def judge(row: Row, reply: Reply) -> str:
    """Return right, near, runs on, or wrong."""
    if "labels" not in row:
        return judge_text(row, reply.text)
    said, answer = reply.text.strip(), row["answer"]
    if said == answer:
        return "right"
    if said in row["labels"]:
        scores = [label["log_probability"] for label in row["labels"].values()]
        lost = max(scores) - row["labels"][said]["log_probability"]
        return "near" if lost < NEAR else "wrong"
    return "runs on" if said.startswith(answer) else "wrong"


def judge_text(row: Row, text: str) -> str:
    """Return the same of an answer of text: near where it parts from it at a token that was near another."""
    token = find_parting(row, text)
    if token is None:
        return "right"
    if row["margins"][token] < NEAR:
        return "near"
    return "runs on" if token == len(row["answer_ids"]) else "wrong"


def find_parting(row: Row, text: str) -> int | None:
    """Return the first token of a scored answer that a text does not have; None where it has all.

    Behind the last token comes the end, which an answer that was cut off has not.
    """
    answer = row["answer"]
    if text.strip() == answer.strip():
        return None
    spaces = len(answer) - len(answer.lstrip())  # which servers leave out
    pairs = zip(answer, answer[:spaces] + text.lstrip(), strict=False)
    equal = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
    if equal is None:
        equal = min(len(answer), spaces + len(text.lstrip()))
    token = next((n for n, end in enumerate(row["ends"]) if end > equal), len(row["ends"]))
    return token if token < len(row["margins"]) else None


def replay(task: Mapping[str, Any], rows: Sequence[Row], server: Server) -> Verdict:
    """Ask every row as a chat program does, and where some are answered otherwise, find out why."""
    replies = [server.chat(messages_of(task, row), greedy=False) for row in rows]
    judged = [judge(row, reply) for row, reply in zip(rows, replies, strict=True)]
    for place, (row, reply) in enumerate(zip(rows, replies, strict=True)):
        if judged[place] == "near" and "labels" in row and was_drawn(row, reply):
            judged[place] = "wrong"
    wrong = [
        (row, reply, how)
        for row, reply, how in zip(rows, replies, judged, strict=True)
        if how in ("wrong", "runs on")
    ]
    cause = None
    if wrong:
        only_longer = all(how == "runs on" for _, _, how in wrong)
        again = take_evenly([row for row, _, _ in wrong], ASKED_AGAIN)
        cause = "stop" if only_longer else find_cause(task, again, server)
    differences = [d for pair in zip(rows, replies, strict=True) for d in compare_scores(*pair)]
    more = [
        None if reply.prompt_tokens is None else reply.prompt_tokens - len(row["prompt_ids"])
        for row, reply in zip(rows, replies, strict=True)
    ]
    return Verdict(
        right=judged.count("right"),
        near=[row["id"] for row, how in zip(rows, judged, strict=True) if how == "near"],
        wrong=[(row["id"], row["answer"], reply.text) for row, reply, _ in wrong],
        cause=cause,
        other_length=sum(count not in (None, 0) for count in more),
        token_more=set(more) == {1},
        largest_difference=max(differences, default=None),
        text="labels" not in rows[0],
        first_parting=find_parting(wrong[0][0], wrong[0][1].text)
        if wrong and "labels" not in rows[0]
        else None,
    )


def find_cause(task: Mapping[str, Any], rows: Sequence[Row], server: Server) -> str:
    """Return the key of CAUSES that explains rows which a server answers otherwise."""

    def ask(way: Callable[[Row], Reply | None]) -> list[Reply | None]:
        return [way(row) for row in rows]

    def ask_talks(talks: Sequence[Sequence[Mapping[str, str]]]) -> list[Reply]:
        return [server.chat(talk, greedy=True) for talk in talks]

    def mends(replies: Sequence[Reply | None]) -> bool:
        return all(
            reply is not None and judge(row, reply) in ("right", "near")
            for row, reply in zip(rows, replies, strict=True)
        )

    def longer_by_one(replies: Sequence[Reply | None]) -> bool:
        return all(
            reply is not None and reply.prompt_tokens == len(row["prompt_ids"]) + 1
            for row, reply in zip(rows, replies, strict=True)
        )

    greedy = ask(lambda row: server.chat(messages_of(task, row), greedy=True))
    if mends(greedy):
        return "sampling"
    raw = ask(lambda row: server.complete(row["prompt"].removeprefix(task["bos"])))
    if longer_by_one(greedy) or longer_by_one(raw):
        return "BOS"
    talks = [messages_of(task, row, spelled=True) for row in rows]
    spelled = ask_talks(talks)
    if mends(spelled):
        return "template"
    if None in raw:
        return "unknown"
    if not mends(raw):
        return "other file"
    if all(talk[0]["role"] == "system" for talk in talks):
        bare = [server.chat(talk[1:], greedy=True) for talk in talks]
        # Not its numbers: what a server keeps of the last prompt moves their last digits.
        if [(r.text, r.prompt_tokens) for r in bare] == [
            (r.text, r.prompt_tokens) for r in spelled
        ]:
            return "system prompt"
    return "template"


def score_of(row: Row, reply: Reply, word: str) -> float | None:
    """Return the log probability that a server told of a label of one token, in nats."""
    ids = row["labels"][word]["ids"]
    return reply.first.get(ids[0], reply.first.get(word)) if len(ids) == 1 else None


def was_drawn(row: Row, reply: Reply) -> bool:
    """Whether a label was answered by lot: the server itself holds the scored one to be likelier."""
    said, scored = (score_of(row, reply, word) for word in (reply.text.strip(), row["answer"]))
    return said is not None and scored is not None and said < scored


def compare_scores(row: Row, reply: Reply) -> list[float]:
    """Return how far the log probabilities of labels of one token are from those scored, in nats.

    Of an answer of text, that of its first token.
    """
    if "labels" not in row:
        score = reply.first.get(row["answer_ids"][0]) if row["answer_ids"] else None
        return [] if score is None else [abs(score - row["log_probabilities"][0])]
    labels = row["labels"].items()
    told = [(score_of(row, reply, word), label["log_probability"]) for word, label in labels]
    return [abs(score - scored) for score, scored in told if score is not None]


def describe(verdict: Verdict, rows: int, stop: str) -> str:
    """Return the verdict in a sentence or two."""
    told = f"{verdict.right} of {rows} rows are answered as scored"
    if verdict.near:
        told += (
            f", {len(verdict.near)} otherwise whose two best {'tokens' if verdict.text else 'labels'} were closer"
            f" than {NEAR} nats ({', '.join(verdict.near[:5])}), as another build may"
        )
    if verdict.wrong:
        identity, answer, said = verdict.wrong[0]
        assert verdict.cause is not None
        told += (
            f"; {len(verdict.wrong)} are not, first {identity}: scored {answer[:60]!r}, answered {said[:60]!r}"
            f"{'' if verdict.first_parting is None else f', parts at token {verdict.first_parting + 1}'};"
            f" cause: {verdict.cause}: {CAUSES[verdict.cause].format(stop=stop)}"
        )
    if verdict.other_length:
        told += f"; {verdict.other_length} prompts had another number of tokens than was scored"
    if verdict.token_more and verdict.cause != "BOS":
        told += ", each one more: probably a BOS"
    if verdict.largest_difference is not None:
        told += f"; log probabilities differ by {verdict.largest_difference:.3f} nats at most"
    return told
