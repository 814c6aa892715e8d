"""Answers of free text: those of many prompts at once are those of each alone, in llama.cpp and PyTorch."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import CONVERTER, LINEAGE, run_program
from pockettune.common.errors import UserError
from pockettune.models.folder import load_model, load_tokenizer
from pockettune.runtimes import generation, generation_pytorch, packing
from pockettune.runtimes.answers import Generation, log_probability
from pockettune.runtimes.grammar import ASKED, Grammar, candidates
from pockettune.runtimes.greedy import as_text
from pockettune.runtimes.llama import LlamaModel
from pockettune.runtimes.packing import ATTENTION

CONTEXT = 160
# Of logits that spread by 3. llama.cpp holds keys and values in FP16; which tokens share a batch chooses its
# kernels, so that it differs as much from itself.
NEAR = 0.05
START = [5, 6, 7, 8]
LINES = 'root ::= line ("\\n" line){0,2}\nline ::= ("正面" | "负面") "：" [a-z房间很干净]{1,4}\n'


@pytest.fixture(scope="module")
def rambling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that does not repeat itself: untied, its weights larger than a trained one's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    from generated import train_tokenizer, write_tokenizer_config

    folder = tmp_path_factory.mktemp("rambling") / "model"
    folder.mkdir()
    tokenizer = train_tokenizer(["房间很干净，但是服务很差。", "正面", "负面", "情感："] * 3, 512)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder / "tokenizer_config.json")
    set_seed(1)
    shape: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
    config = Qwen2Config(**shape, max_position_embeddings=CONTEXT, tie_word_embeddings=False, eos_token_id=2)  # fmt: skip
    Qwen2ForCausalLM(config).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(rambling: Path) -> Iterator[LlamaModel]:
    path = rambling.with_name("f16.gguf")
    result = run_program("convert_model.py", "--model", rambling, "--converter", CONVERTER,
                         "--settings", LINEAGE, "--output", path)  # fmt: skip
    assert result.returncode == 0, result.stdout
    with LlamaModel(path, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def pytorch(rambling: Path) -> torch.nn.Module:
    return load_model(rambling, attention=ATTENTION, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """More than the places of a context, of a common start and different lengths."""
    random = np.random.default_rng(3)
    return [START + list(map(int, random.integers(10, 500, n % 9 + 1))) for n in range(21)]


# Every ninth token ends an answer, so that answers end at different times, and some do not.
ENDS = frozenset(range(0, 512, 9))


def generate(llama: LlamaModel, prompts: list[list[int]], **options: Any) -> list[Generation]:
    told: dict[str, Any] = {"ends": ENDS, "max_tokens": 12}
    return list(generation.generate(llama, prompts, **(told | options)))


def assert_near(
    one: list[Generation], other: list[Generation], llama: LlamaModel, prompts: list[list[int]]
) -> None:
    """Answers are equal, or part where the two tokens are as likely but for rounding."""
    assert len(one) == len(other) == len(prompts)
    equal = [a.ids == b.ids and a.ended == b.ended for a, b in zip(one, other, strict=True)]
    assert sum(equal) > 0.8 * len(equal)
    for a, b, prompt in zip(one, other, prompts, strict=True):
        if a.ids == b.ids and a.ended == b.ended:
            assert a.log_probability == pytest.approx(b.log_probability, abs=NEAR)
            continue
        shared = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), min(len(a.ids), len(b.ids)))  # fmt: skip
        (logits,) = generation.answer_logits(llama, [[*prompt, *a.ids[:shared]]], [[0]])
        best, second = np.sort(logits[0])[:-3:-1]
        assert best - second < NEAR, (a, b)


def test_many_at_once_are_each_alone(llama: LlamaModel, prompts: list[list[int]]) -> None:
    alone = [generate(llama, [prompt])[0] for prompt in prompts]
    ended = [answer.ended for answer in alone]
    assert 5 < sum(ended) < 20 and len({tuple(a.ids) for a in alone}) > 15, "a test of something"
    assert len({len(a.ids) for a in alone}) > 4
    for parallel in (1, 3, 16):
        assert_near(generate(llama, prompts, parallel=parallel), alone, llama, prompts)


def test_the_same_bytes_twice(llama: LlamaModel, prompts: list[list[int]]) -> None:
    assert generate(llama, prompts, parallel=5) == generate(llama, prompts, parallel=5)


def test_pytorch_says_the_same(
    llama: LlamaModel, pytorch: torch.nn.Module, prompts: list[list[int]]
) -> None:
    said = list(generation_pytorch.generate(pytorch, prompts, ends=ENDS, max_tokens=12))
    assert_near(generate(llama, prompts), said, llama, prompts)
    alone = [
        answer
        for prompt in prompts
        for answer in generation_pytorch.generate(pytorch, [prompt], ends=ENDS, max_tokens=12)
    ]
    assert [(a.ids, a.ended) for a in said] == [(a.ids, a.ended) for a in alone]
    assert pytorch.config._attn_implementation == ATTENTION, "left as it was"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2"])
def test_pytorch_says_what_it_says_without_a_cache(kind: str, tmp_path: Path) -> None:
    """Padded prompts where some layers keep a window's keys only, and where positions are learned."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.3}  # fmt: skip
    if kind == "gemma3_text":
        shape |= {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
                  "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
    config = AutoConfig.for_model(kind, **shape, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model: Any = load_model(tmp_path, attention=ATTENTION, dtype=torch.float32).eval()
    prompts = [[5, 6, *range(10, 10 + n)] for n in (1, 4, 12, 7)]
    said = list(generation_pytorch.generate(model, prompts, ends=(), max_tokens=8))
    with torch.inference_mode(), generation_pytorch._attention(model, "eager"):
        for prompt, answer in zip(prompts, said, strict=True):
            tokens = torch.tensor([[*prompt, *answer.ids]])
            likeliest = model(input_ids=tokens, use_cache=False).logits[0].argmax(dim=-1)
            assert answer.ids == likeliest[len(prompt) - 1 : -1].tolist()
    assert len({tuple(answer.ids) for answer in said}) == len(prompts), "a test of something"


def test_log_probabilities_are_those_of_the_answer(
    llama: LlamaModel, prompts: list[list[int]]
) -> None:
    answers = generate(llama, prompts)
    ended = [(p, a) for p, a in zip(prompts, answers, strict=True) if not a.ended]
    scored = generation.answer_logits(llama, [p for p, _ in ended], [a.ids for _, a in ended])
    for (_, answer), logits in zip(ended, scored, strict=True):
        exact = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
        total = sum(exact[i, token] for i, token in enumerate(answer.ids))
        assert answer.log_probability == pytest.approx(total, abs=NEAR)
        assert log_probability(logits[0], 17) == pytest.approx(exact[0, 17], abs=1e-5)


@pytest.mark.parametrize("of", ["llama", "pytorch"])
def test_limits_of_an_answer(of: str, llama: LlamaModel, pytorch: torch.nn.Module) -> None:
    def ask(prompts: list[list[int]], **options: Any) -> list[Generation]:
        if of == "llama":
            return list(generation.generate(llama, prompts, **options))
        return list(generation_pytorch.generate(pytorch, prompts, **options))

    prompt = [*START, 300]
    (free,) = ask([prompt], ends=(), max_tokens=9)
    assert len(free.ids) == 9 and not free.ended
    third = free.ids[2]
    assert third not in free.ids[:2], "a test of something"
    (ended,) = ask([prompt], ends=[third], max_tokens=9)
    assert (ended.ids, ended.ended) == (free.ids[:2], True), "without the token that ended it"
    (just,) = ask([prompt], ends=[third], max_tokens=3)
    assert just.ended, "the end is one of max_tokens"
    (short,) = ask([prompt], ends=[third], max_tokens=2)
    assert (short.ids, short.ended) == (free.ids[:2], False)
    (empty,) = ask([prompt], ends=free.ids[:1], max_tokens=3)
    assert (empty.ids, empty.ended) == ([], True)
    # Where the context is full, the answer is over.
    long = [[*START, *range(10, 10 + n)] for n in (CONTEXT - 7, 3)]
    assert [len(a.ids) for a in ask(long, ends=(), max_tokens=9)] == [3, 9]
    assert ask([], ends=(), max_tokens=9) == []
    with pytest.raises(UserError, match="too long for the 160 tokens that the model takes: prompt 1 with its answer 161"):  # fmt: skip
        ask([prompt, [9] * CONTEXT], ends=(), max_tokens=9)
    with pytest.raises(UserError, match="prompts without a token: 1"):
        ask([prompt, []], ends=(), max_tokens=9)


def test_prompts_longer_than_a_batch_and_too_many_for_the_memory(
    llama: LlamaModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(4)
    longer = [p + list(map(int, random.integers(10, 500, 40))) for p in prompts]
    plain = generate(llama, longer)
    monkeypatch.setattr(generation, "TOKENS_A_BATCH", 19)  # less than a prompt; 16 answer at once
    monkeypatch.setattr(generation, "TOKENS_HELD", 150)  # room for two
    seen: set[int] = set()
    decode = generation.Context.decode

    def watch(self: generation.Context, parts: Any, wanted: Any = None) -> list[int]:
        assert sum(len(tokens) for *_, tokens in parts) <= 19
        seen.add(len(parts))
        return decode(self, parts, wanted)

    monkeypatch.setattr(generation.Context, "decode", watch)
    assert_near(generate(llama, longer), plain, llama, longer)
    assert max(seen) == 2, "two prompts at a time"


def test_a_finished_answer_makes_way_for_a_waiting_prompt(
    llama: LlamaModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[tuple[int, int]]] = []
    decode = generation.Context.decode

    def watch(self: generation.Context, parts: Any, wanted: Any = None) -> list[int]:
        batches.append([(start, len(tokens)) for _, start, tokens in parts])
        return decode(self, parts, wanted)

    monkeypatch.setattr(generation.Context, "decode", watch)
    answers = generate(llama, prompts, parallel=4)
    start, *others = batches
    assert start == [(0, len(START))], "the common start once"
    assert all(begin >= len(START) for batch in others for begin, _ in batch)
    prompt_tokens = sum(map(len, prompts)) - len(START) * len(prompts)
    answered = sum(len(a.ids) if a.ended else len(a.ids) - 1 for a in answers)
    assert sum(n for batch in others for _, n in batch) == prompt_tokens + answered
    # No place stays empty while a prompt waits.
    assert {len(batch) for batch in others[: len(others) // 2]} == {4}
    mixed = [batch for batch in others if {begin == len(START) for begin, _ in batch} == {True, False}]  # fmt: skip
    assert mixed, "prompts and single tokens in one batch"


def test_a_grammar_makes_every_answer_valid(llama: LlamaModel, prompts: list[list[int]]) -> None:
    form = re.compile(
        "(?:正面|负面)：[a-z房间很干净]{1,4}(?:\n(?:正面|负面)：[a-z房间很干净]{1,4}){0,2}"
    )
    # <|im_end|>, that llama.cpp knows as an end; and 300, that it takes for text.
    for end in (2, 300):
        options = {"ends": [end], "max_tokens": 60, "parallel": 4}
        free = generate(llama, prompts, **options)
        bound = generate(llama, prompts, **options, grammar=LINES)
        assert not any(form.fullmatch(as_text(llama, a.ids)) for a in free)
        texts = [as_text(llama, answer.ids) for answer in bound]
        assert all(answer.ended for answer in bound)
        assert not [text for text in texts if not form.fullmatch(text)]
        assert len(set(texts)) > 10, "a test of something"
        assert generate(llama, prompts, **options, grammar=LINES) == bound


def test_the_likeliest_that_a_grammar_allows(llama: LlamaModel, rambling: Path) -> None:
    tokenizer = load_tokenizer(rambling)
    ids = {text: tokenizer(text)["input_ids"][0] for text in ("a", "b", "房")}
    grammar = Grammar(llama, 'root ::= "a" [^a]', [2])
    logits = np.linspace(1, 2, 512, dtype=np.float32)
    assert grammar.likeliest(logits) == ids["a"], "however unlikely"
    grammar.accept(ids["a"])
    logits[[ids["a"], ids["b"], 2]] = 9, 5, 8
    assert grammar.likeliest(logits) == ids["b"]
    grammar.accept(ids["b"])
    logits[0] = 99  # <|endoftext|> ends an answer, but is none of the ends asked for
    assert grammar.likeliest(logits) == 2, "nothing else may follow"
    grammar.reset()
    assert grammar.likeliest(logits) == ids["a"]
    grammar.close()
    for broken in ("root ::= (", 'start ::= "a"', 'root ::= root "a"'):
        with pytest.raises(UserError, match=r"grammar: llama\.cpp cannot read it"):
            generate(llama, [[5, 6]], grammar=broken)


@pytest.mark.parametrize("size", [1, 64, 65, 300, 5000])
def test_candidates_come_in_the_order_of_all(size: int) -> None:
    """Each set asked about is a start of the whole vocabulary in order, equal ones by their number."""
    logits = np.random.default_rng(size).integers(0, 40, size).astype(np.float32)
    *starts, everything = candidates(logits)
    assert everything.tolist() == sorted(range(size), key=lambda i: (-logits[i], i))
    counts = [1, *(count for count in ASKED if count < size)]
    for start, count in zip(starts, counts, strict=True):
        assert len(start) >= count
        assert start.tolist() == everything[: len(start)].tolist()


def test_logits_of_given_answers_are_pytorchs(
    llama: LlamaModel, pytorch: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(5)
    answers = [list(map(int, random.integers(10, 500, n % 6 + 1))) for n in range(len(prompts))]
    expected = []
    with torch.inference_mode(), generation_pytorch._attention(pytorch, "eager"):
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = pytorch(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits
            expected.append(logits[0, len(prompt) - 1 : -1].numpy())
    sequences = [[*p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)]
    places = [range(len(p) - 1, len(s)) for p, s in zip(prompts, sequences, strict=True)]
    packed = list(packing.logits_at(pytorch, sequences, places))
    together = list(generation.answer_logits(llama, prompts, answers))
    # Sequences that go on in the next batch, and more rows than a batch may ask for.
    monkeypatch.setattr(generation, "TOKENS_A_BATCH", 19)
    monkeypatch.setattr(generation, "LOGITS_HELD", 0)
    monkeypatch.setattr(packing, "ROWS_A_PASS", 8)
    cut = list(generation.answer_logits(llama, prompts, answers))
    apart = list(packing.logits_at(pytorch, sequences, places))
    for got, bound in ((packed, 1e-4), (apart, 1e-4), (together, NEAR), (cut, NEAR)):
        assert [a.shape for a in got] == [(len(answer), 512) for answer in answers]
        assert max(np.abs(a - b).max() for a, b in zip(got, expected, strict=True)) < bound
        assert all(a.dtype == np.float32 for a in got)
    assert list(generation.answer_logits(llama, [], [])) == []
    with pytest.raises(UserError, match="prompt 0 with its answer 163"):
        generation.answer_logits(llama, [[5] * 100], [[6] * 64])


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=40), st.integers(16, 40)
)
def test_batches_hold_every_token_once(sizes: list[tuple[int, int]], outputs: int) -> None:
    lengths = [max(pair) for pair in sizes]
    counts = [min(pair) for pair in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "TOKENS_A_BATCH", 50)
        batches = list(generation.cut_batches(lengths, counts, outputs))
    for batch in batches:
        assert sum(end - begin for _, begin, end, _ in batch) <= 50
        assert sum(wanted for *_, wanted in batch) <= outputs
        assert 0 < len(batch) <= generation.PROMPTS_A_BATCH
    parts = [part for batch in batches for part in batch]
    rows = {n: [i for m, b, e, _ in parts if m == n for i in range(b, e)] for n, *_ in parts}
    assert list(rows.values()) == [list(range(length)) for length in lengths]
    for number, count in enumerate(counts):
        wanted = [i for m, _, e, w in parts if m == number for i in range(e - w, e)]
        assert wanted == list(range(lengths[number] - count, lengths[number]))


def test_parallel_has_a_limit(llama: LlamaModel) -> None:
    with pytest.raises(
        UserError, match=r"parallel: 300 prompts at once; llama\.cpp takes 1 to 255"
    ):
        generate(llama, [[5]], parallel=300)
