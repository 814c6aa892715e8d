"""The training loop: batches, loss, validation, early stopping, and going on after a kill.

A loop of our own and not transformers' Trainer: the Trainer pads or wants a flash-attention wheel,
computes logits for every token, and validates by loss. Schedule, optimizer, mixed precision and
quantization are the libraries'.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pockettune.common import program
from pockettune.common.errors import DiskFullError, UserError
from pockettune.data.prompts import Example
from pockettune.evaluation import metrics
from pockettune.evaluation.reading import describe_reading, read_answers
from pockettune.evaluation.scoring import score_answers
from pockettune.runtimes import packing
from pockettune.runtimes.batching import group_by_tokens
from pockettune.runtimes.memory import memory_hint
from pockettune.tasks import Task
from pockettune.training import checkpoints
from pockettune.training.teacher import Teacher

Settings = Mapping[str, Any]
Scores = dict[str, float]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WITHOUT_ANSWER = -100  # stands for the token that no one knows, and has no loss
GRADIENT_NORM_LIMIT = 1.0  # the usual clip; keeps one odd batch from undoing the rest


@dataclass(frozen=True)
class Hardware:
    """What the training computes on, and in which number format."""

    device: str  # cpu, cuda
    precision: str  # bf16, fp16, fp32

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.precision != "fp32")


@dataclass(frozen=True)
class Validator:
    """Scores the model on rows of validation in the way that every later stage is scored."""

    task: Task
    examples: Sequence[Example]
    words: Sequence[str]  # the allowed answers
    answer_ids: Sequence[Sequence[int]]
    metric: str  # the number of the task's score by which the best checkpoint is chosen
    interval: int  # updates between two validations

    def score(self, model: torch.nn.Module, hardware: Hardware) -> tuple[Scores, np.ndarray]:
        """Return the metric and "loss", minus the true answer's mean log probability; and the
        answers' log probabilities: (examples, answers)."""
        prompts = [example.prompt_ids for example in self.examples]
        with without_dropout(model), hardware.autocast():
            logits = partial(packing.next_token_logits, model)
            scores = score_answers(logits, prompts, self.answer_ids, "validation")
        predictions = metrics.predict(self.examples, self.words, scores)
        true = self.true_answers()
        return {
            self.metric: metrics.score_predictions(self.task, predictions)[self.metric],
            "loss": -float(scores[np.arange(len(true)), true].mean()),
        }, scores

    def true_answers(self) -> np.ndarray:
        """Return each example's right answer, as its place among `words`: (examples,)."""
        return np.array([self.words.index(example.reference) for example in self.examples])


@dataclass(frozen=True)
class TextValidator:
    """Reads the reference answers of validation with the model, token by token.

    Generating them would take many times as long.
    """

    examples: Sequence[Example]
    interval: int  # updates between two validations
    metric: ClassVar = "token_accuracy"

    def score(self, model: torch.nn.Module, hardware: Hardware) -> tuple[Scores, None]:
        """Return the share of the answers' tokens that were the likeliest, and "loss", minus the mean
        log probability of a token; no answers' scores."""
        with without_dropout(model), hardware.autocast():
            read = list(
                read_answers(partial(packing.logits_at, model), self.examples, "validation")
            )
        return describe_reading(read), None


@contextlib.contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off while the block runs.

    model.eval() would do more: on a CPU it makes bitsandbytes (0.50) pack 4-bit weights in a format
    that cannot be trained through any more.
    """
    active = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
    for layer in active:
        layer.eval()
    try:
        yield
    finally:
        for layer in active:
            layer.train()


@dataclass
class TrainingState:
    """All that an interrupted training needs to go on as if nothing had happened."""

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    updates: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # weights of the best validation
    best_scores: torch.Tensor | None = None  # and its log probabilities (examples, answers)
    seconds: float = 0.0
    resumed: int = 0  # times that the training went on from a checkpoint

    PLAIN: ClassVar = ("updates", "validations", "best", "best_scores", "seconds", "resumed")

    def as_dict(self) -> dict[str, Any]:
        """Return everything as `checkpoints.save_checkpoint` takes it."""
        # Of the device in use alone: the next job may see fewer of them.
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": (torch.get_rng_state(), cuda),
            **{name: getattr(self, name) for name in self.PLAIN},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `as_dict` returned in a run before."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved["parameters"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        cpu, cuda = saved["random"]
        torch.set_rng_state(cpu.cpu())
        if cuda is not None:
            torch.cuda.set_rng_state(cuda.cpu())
        for name in self.PLAIN:
            setattr(self, name, saved[name])
        self.resumed += 1

    def add_validation(
        self, scores: Scores, metric: str, log_probabilities: np.ndarray | None
    ) -> None:
        """Record a validation; keep the weights if it is the best: by metric, then by loss."""
        self.validations.append({"update": len(self.updates), **scores})
        if self.best_validation(metric) is self.validations[-1]:
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
            if log_probabilities is not None:
                self.best_scores = torch.from_numpy(log_probabilities)

    def best_validation(self, metric: str) -> dict[str, Any] | None:
        """Return the best validation so far, the earliest of equals."""
        return max(self.validations, key=lambda v: (v[metric], -v["loss"]), default=None)

    def has_stopped_improving(self, metric: str, patience: int | None) -> bool:
        """Whether the last `patience` validations were no better than the best before them."""
        best = self.best_validation(metric)
        if patience is None or best is None:
            return False
        return len(self.validations) - 1 - self.validations.index(best) >= patience

    def take_best(self) -> None:
        """Put the weights of the best validation, if there was one, into the model."""
        with torch.no_grad():
            for name, weights in self.best.items():
                self.parameters[name].copy_(weights)


def start_training(
    model: torch.nn.Module, settings: Settings, hardware: Hardware, updates: int
) -> TrainingState:
    """Return the state before the first of `updates` updates."""
    from transformers import get_scheduler  # here: what bitsandbytes says at import goes to the log

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings["learning_rate"], weight_decay=0.0, fused=True
    )
    warmup = round(settings["warmup_ratio"] * updates)
    return TrainingState(
        parameters,
        optimizer,
        get_scheduler(settings["scheduler"], optimizer, warmup, updates),
        torch.amp.GradScaler(hardware.device, enabled=hardware.precision == "fp16"),
    )


def draw_batches(lengths: Sequence[int] | np.ndarray, settings: Settings) -> list[list[int]]:
    """Return the rows of every update, each epoch in a new random order.

    `lengths` are the rows' tokens. An update is of batch_size rows, or of as many as have
    batch_tokens tokens, times gradient_accumulation; the last of an epoch may be smaller.
    """
    generator = torch.Generator().manual_seed(settings["seed"])
    rows, tokens = _pass_limits(settings)
    accumulated = settings["gradient_accumulation"]
    remaining = math.ceil(len(lengths) * settings["epochs"])
    batches: list[list[int]] = []
    while remaining > 0:
        order = torch.randperm(len(lengths), generator=generator)[:remaining].tolist()
        batches += group_by_tokens(
            order, tokens * accumulated, lambda row: lengths[row], rows and rows * accumulated
        )
        remaining -= len(order)
    return batches


def cut_batch(batch: Sequence[Example], settings: Settings, device: str) -> Iterator[list[Example]]:
    """Cut an update's examples into forward passes that the settings and the hardware allow.

    The gradient does not depend on the cuts.
    """
    rows, tokens = _pass_limits(settings)
    limit = min(tokens, packing.TOKENS_A_PASS[device])

    def weigh(example: Example) -> int:
        return max(len(example.ids()), int(len(example.learned()) * limit / packing.ROWS_A_PASS))

    return group_by_tokens(batch, limit, weigh, rows)


def _pass_limits(settings: Settings) -> tuple[int | None, float]:
    """Return the most rows and the most tokens of a forward pass; one of them sets no limit."""
    if settings["batch_tokens"]:
        return None, settings["batch_tokens"]
    return settings["batch_size"], math.inf


@dataclass(frozen=True)
class AnswerWeights:
    """How much each answer counts in the loss."""

    mean_tokens: float  # of the answers of train
    classes: Mapping[str, float] = field(default_factory=dict)  # by answer; 1 where not named

    def of_token(self, example: Example) -> float:
        """Return the weight of each token of an example's answer.

        The same for every answer of the same class, however many tokens it has: divided by its own
        length, the token that decides would count more for shorter labels, and be favoured.
        """
        return self.classes.get(example.reference, 1.0) / self.mean_tokens


def weigh_answers(counts: Mapping[str, int], mean_tokens: float, balanced: bool) -> AnswerWeights:
    """Return the weights for rows with these answers; balanced, each class counts as much in all.

    The weights n / (classes * rows of the class), as scikit-learn's "balanced", have the mean 1.
    """
    total = sum(counts.values())
    classes = {word: total / (len(counts) * n) for word, n in counts.items()} if balanced else {}
    return AnswerWeights(mean_tokens, classes)


def batch_loss(
    model: torch.nn.Module,
    examples: Sequence[Example],
    weights: AnswerWeights,
    teacher: Teacher | None = None,
) -> torch.Tensor:
    """Return the mean over examples of the weighted cross-entropy of all their answer tokens.

    With a teacher (1 - weight) of that, and weight of the divergence from what it says; an example
    without an answer has the latter alone.
    """
    sequences = [[*e.prompt_ids, *e.answer_ids[:-1]] for e in examples]
    # The token at position p is predicted at p - 1: the answer's first one at the prompt's last.
    positions = [
        [p - 1 for p in e.learned()] or [len(s) - 1]
        for e, s in zip(examples, sequences, strict=True)
    ]
    logits = packing.packed_logits(model, sequences, positions).float()
    answers = [(e, t) for e in examples for t in targets_of(e)]
    targets = torch.tensor([t for _, t in answers], device=logits.device)
    of_tokens = torch.tensor([weights.of_token(e) for e, _ in answers], device=logits.device)
    losses = cross_entropy(logits, targets, reduction="none", ignore_index=WITHOUT_ANSWER)
    gold = (losses * of_tokens).sum() / len(examples)
    if teacher is None:
        return gold
    behind_prompts = list(accumulate(map(len, positions[:-1]), initial=0))
    divergence = teacher.divergence(logits[behind_prompts], examples)
    return (1 - teacher.weight) * gold + teacher.weight * divergence


def targets_of(example: Example) -> list[int]:
    """Return the tokens that are learned of an example, or WITHOUT_ANSWER alone."""
    ids = example.ids()
    return [ids[place] for place in example.learned()] or [WITHOUT_ANSWER]


def run_updates(
    model: torch.nn.Module,
    examples: Sequence[Example],
    batches: Sequence[Sequence[int]],
    settings: Settings,
    weights: AnswerWeights,
    hardware: Hardware,
    validator: Validator | TextValidator | None,
    scratch: Path,
    save_every: float,
    teacher: Teacher | None = None,
) -> TrainingState:
    """Train to the end, to early stopping, or until asked to stop; go on from a checkpoint.

    Writes a checkpoint to `scratch` every `save_every` seconds and when asked to stop, then ending
    with status 128 + the signal's number. UserError where the loss is not finite or memory is out.
    """
    state = start_training(model, settings, hardware, len(batches))
    if saved := checkpoints.load_checkpoint(scratch, hardware.device):
        state.restore(saved)
        program.logger.info("going on after update %d of %d", len(state.updates), len(batches))
    metric = validator.metric if validator else ""
    begun = time.perf_counter() - state.seconds
    last_saved = time.perf_counter()
    model.train()
    done = len(state.updates)
    bar = program.progress(
        batches[done:], description="training", unit="updates", total=len(batches), initial=done
    )
    with checkpoints.StopRequest() as stop, bar:
        for rows in bar:
            if validator and state.has_stopped_improving(metric, settings["patience"]):
                program.logger.info("stopped early: %d validations no better", settings["patience"])
                break
            with memory_hint(less_memory(settings)):
                batch = [examples[row] for row in rows]
                make_update(model, batch, state, settings, weights, hardware, teacher)
                number = len(state.updates)
                if validator and (number % validator.interval == 0 or number == len(batches)):
                    scores, log_probabilities = validator.score(model, hardware)
                    state.add_validation(scores, metric, log_probabilities)
                    told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
                    program.logger.info("validation after update %d: %s", number, told)
            state.seconds = time.perf_counter() - begun
            stopped_by = stop.signal  # a signal that comes from here on is for the next update
            if stopped_by or time.perf_counter() - last_saved >= save_every:
                try:
                    checkpoints.save_checkpoint(scratch, state.as_dict())
                except DiskFullError as error:  # hours of work need not end with it
                    if stopped_by:
                        raise
                    program.logger.warning("going on without a new checkpoint: %s", error)
                last_saved = time.perf_counter()
            if stopped_by:
                program.logger.error(
                    "stopped by %s after update %d of %d; the same command goes on from there",
                    stopped_by.name, number, len(batches),
                )  # fmt: skip
                raise SystemExit(128 + stopped_by)
    state.take_best()
    return state


def make_update(
    model: torch.nn.Module,
    batch: Sequence[Example],
    state: TrainingState,
    settings: Settings,
    weights: AnswerWeights,
    hardware: Hardware,
    teacher: Teacher | None = None,
) -> None:
    """Change the parameters once, by the mean loss over `batch`."""
    loss = torch.zeros((), device=hardware.device)
    for part in cut_batch(batch, settings, hardware.device):
        with hardware.autocast():
            share = batch_loss(model, part, weights, teacher) * (len(part) / len(batch))
        state.scaler.scale(share).backward()
        loss += share.detach()
    if not torch.isfinite(loss):
        raise UserError(
            f"the loss became {loss.item()} at update {len(state.updates) + 1}: lower"
            f" train.learning_rate ({settings['learning_rate']}) or set train.precision to fp32"
        )
    state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(state.parameters.values(), GRADIENT_NORM_LIMIT)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    rate = float(state.scheduler.get_last_lr()[0])
    state.updates.append({"loss": loss.item(), "learning_rate": rate})
    state.scheduler.step()


def less_memory(settings: Settings) -> str:
    """Return which settings to change where memory is out."""
    if settings["batch_tokens"]:
        smaller = f"lower train.batch_tokens ({settings['batch_tokens']})"
    else:
        smaller = f"lower train.batch_size ({settings['batch_size']})"
    return (
        f"{smaller} and raise train.gradient_accumulation by as much, set"
        " train.gradient_checkpointing to true, or lower tokenize.max_length"
    )
