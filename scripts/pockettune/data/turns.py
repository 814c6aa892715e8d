"""What stands between the messages of a conversation, for programs that have no engine for chat templates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from pockettune.common.errors import UserError
from pockettune.data.chat import PROBE, control_tokens, render_chat
from pockettune.data.task_template import STRIPS, broken, stripped
from pockettune.tasks import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turns:
    """A rendered conversation without its messages; user and assistant take turns."""

    start: str  # before the first user's message, where there is no system message
    system: tuple[str, str] | None  # before and behind one; None where the template takes none
    between: str  # behind a user's message that is answered
    following: str  # behind an answer
    tail: str  # behind the last user's message
    strips: Mapping[str, str]  # of STRIPS: what the template does to a role's message
    control: tuple[str, ...]  # tokens that are broken in a message, longest first

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt of a conversation that ends with the user, as the template writes it."""
        written = "" if messages[0]["role"] == "system" else self.start
        for place, message in enumerate(messages):
            role, content = message["role"], message["content"]
            for token in self.control:
                content = content.replace(token, broken(token))
            before, behind = "", self.following
            if role == "system":
                assert self.system, "the template takes none"
                before, behind = self.system
            elif role == "user":
                behind = self.tail if place == len(messages) - 1 else self.between
            written += before + stripped(content, self.strips[role]) + behind
        return written


def find_turns(tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any]) -> Turns:
    """Return what all conversations share, by a trial; UserError where they do not."""

    def rendered(roles: str, content: str = PROBE) -> str:
        return render_chat(tokenizer, speak(roles, content), options)

    system = None
    try:
        before, behind, _ = rendered("su").split(PROBE)
        system = before, behind
    except Exception:  # the template's own, which refuses a system message, or writes it otherwise
        pass
    trials = ["u", "uauau", *(["su", "suauau"] if system else [])]
    spaced = f" \n{PROBE}\n "
    parts = rendered("uau").split(PROBE)
    if len(parts) == 4:
        control = tuple(control_tokens(tokenizer))
        for strips in product(STRIPS, repeat=len(ROLES)):
            found = dict(zip(ROLES, strips, strict=True))
            start, between, following, tail = parts
            turns = Turns(start, system, between, following, tail, found, control)
            if all(
                turns.render(speak(roles, spaced)) == rendered(roles, spaced) for roles in trials
            ):
                return turns
    raise UserError(
        "the base's chat template writes an earlier message otherwise than the last; a page cannot put a"
        " conversation together as it was trained: take another model, or mend chat_template in its folder"
    )


def speak(roles: str, content: str) -> list[Message]:
    """Return a conversation in which all say the same; `roles` are their first letters."""
    names = {name[0]: name for name in ROLES}
    return [{"role": names[role], "content": content} for role in roles]
