"""Runs a model without some of its layers, and again and again without one more.

A layer is left out by handing on what it is given, so that the model's own code does all the rest. What
reaches a layer is computed once: without that layer only those behind it are run anew.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from pockettune.common.errors import UserError
from pockettune.models.layers import find_layers
from pockettune.runtimes.packing import Tokens, packed_logits


class Skipping:
    """A model that was loaded with packing's attention, and its layers, of which any may be left out.

    UserError where the layers are not found, or do more than to pass one tensor on from each to the next.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.layers = model, find_layers(model)
        with torch.inference_mode():
            passed = self._watch([0, 1])
        self.in_tuple = [isinstance(output, tuple) for _, output in passed]
        given = [hidden for hidden, _ in passed]
        made = [output[0] if isinstance(output, tuple) else output for _, output in passed]
        chained = len(passed) == len(self.layers) and all(
            torch.is_tensor(output) and output.shape == given[0].shape for output in made
        )
        if not (chained and all(map(torch.equal, made[:-1], given[1:]))):
            raise UserError(
                f"model.keep_layers: a {model.config.model_type} model's layers pass on more than one"  # type: ignore[union-attr]
                " tensor, none can be left out on trial; give a number or a list instead of choose: auto"
            )

    @contextmanager
    def without(self, removed: Collection[int]) -> Iterator[None]:
        """Have the model run without these layers while the block runs."""
        with self._replaced(dict.fromkeys(removed, _hand_on)):
            yield

    def without_each(
        self, sequences: Sequence[Tokens], removed: Collection[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each remaining layer and the logits of the model without it and the `removed` ones.

        Logits (sequences, vocabulary) are those behind each sequence's last token; the sequences are one
        pass of packing.
        """
        last = [[len(tokens) - 1] for tokens in sequences]
        with torch.inference_mode():
            given: dict[int, torch.Tensor] = {}
            with self.without(removed), self._recorded(given, removed):
                packed_logits(self.model, sequences, last)
            for layer, hidden in given.items():
                left_out = dict.fromkeys(removed, _hand_on)
                with self._replaced(left_out | dict.fromkeys(range(layer + 1), _always(hidden))):
                    yield layer, packed_logits(self.model, sequences, last)

    @contextmanager
    def _recorded(self, given: dict[int, torch.Tensor], removed: Collection[int]) -> Iterator[None]:
        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers):
                if number not in removed:

                    def record(_: Any, args: Any, kwargs: Any, number: int = number) -> None:
                        given[number] = _hidden(args, kwargs).clone()

                    hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
            yield

    @contextmanager
    def _replaced(self, by: dict[int, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
        """Have layers give what a function makes of their hidden state; all else of them stays."""
        with ExitStack() as restored:
            for number, function in by.items():
                # Before the class's own, and gone when it is deleted.
                self.layers[number].forward = self._forward(number, function)
                restored.callback(delattr, self.layers[number], "forward")
            yield

    def _forward(self, number: int, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = function(_hidden(args, kwargs))
            return (hidden,) if self.in_tuple[number] else hidden

        return forward

    def _watch(self, tokens: Tokens) -> list[tuple[Any, Any]]:
        """Return what each layer was given and what it made of it, in the order of a pass."""
        passed: list[tuple[Any, Any]] = []

        def watch(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            passed.append((_hidden(args, kwargs).clone(), output))

        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.callback(layer.register_forward_hook(watch, with_kwargs=True).remove)
            packed_logits(self.model, [tokens], [[len(tokens) - 1]])
        return passed


def _hidden(args: Any, kwargs: Any) -> torch.Tensor:
    """Return the hidden state out of a layer's arguments."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _hand_on(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _always(state: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that gives a copy of `state`: the next layer may compute in place."""
    return lambda _: state.clone()
