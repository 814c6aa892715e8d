"""Tiny random models of many architectures, as benchmarks/models.py takes them through the workflow.

Two layers, 256 wide, so that K-quants are really used; all else is as transformers' own
configuration of the architecture has it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from common import program
from generated import CHAT_TEMPLATE, train_tokenizer, write_tokenizer_config

VOCABULARY = 640
ENDS = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32,
             "original_max_position_embeddings": 4096, "factor": 4.0}  # fmt: skip
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 256}


NOTHING: Mapping[str, Any] = MappingProxyType({})


class Architecture(NamedTuple):
    """A line of docs/models.md."""

    name: str
    kind: str  # transformers' model_type
    changes: Mapping[str, Any] = NOTHING
    sentencepiece: bool = False  # where the converter takes no other tokenizer
    # What config.json has on the hub and transformers does not save.
    published: Mapping[str, Any] = NOTHING


ARCHITECTURES = (
    Architecture("Qwen2, Qwen2.5", "qwen2", {"tie_word_embeddings": True}),
    Architecture("Qwen3", "qwen3", {"tie_word_embeddings": True}),
    Architecture("Qwen3.5 (text)", "qwen3_5_text"),
    Architecture("Llama 3.1, 3.2", "llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    Architecture("Llama 2, TinyLlama", "llama", sentencepiece=True),
    Architecture("SmolLM, SmolLM2", "llama", {"tie_word_embeddings": True}),
    Architecture("SmolLM3", "smollm3", {"num_hidden_layers": 4}),
    Architecture("Gemma", "gemma", sentencepiece=True),
    Architecture("Gemma 2", "gemma2", {"sliding_window": 32, "query_pre_attn_scalar": 64}, sentencepiece=True),
    Architecture("Gemma 3", "gemma3_text", {"sliding_window": 32, "query_pre_attn_scalar": 64}, sentencepiece=True),
    Architecture("Phi-3", "phi3", {"sliding_window": None}, sentencepiece=True),
    Architecture("Phi-3, Phi-4-mini (longrope)", "phi3", {"rope_parameters": LONG_ROPE, "sliding_window": None,
                 "max_position_embeddings": 16384, "original_max_position_embeddings": 4096}, sentencepiece=True),
    Architecture("Mistral", "mistral"),
    Architecture("Ministral", "ministral", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    Architecture("Ministral 3", "ministral3"),
    Architecture("OLMo 2", "olmo2"),
    Architecture("OLMo 3", "olmo3", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    Architecture("Granite 3", "granite", {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
                 "residual_multiplier": 0.22, "logits_scaling": 8.0}),
    Architecture("Granite 4 hybrid", "granitemoehybrid", {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8,
                 "mamba_d_head": 64, "mamba_expand": 2, "num_local_experts": 0}),
    Architecture("ERNIE 4.5", "ernie4_5", sentencepiece=True),
    Architecture("Hunyuan (dense)", "hunyuan_v1_dense", {"eod_token_id": 2}),
    Architecture("InternLM3", "internlm3", sentencepiece=True),
    Architecture("Helium", "helium"),
    Architecture("MiniCPM3", "minicpm3", {"q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
                 "qk_rope_head_dim": 32, "v_head_dim": 64, "num_key_value_heads": 4}, sentencepiece=True),
    Architecture("Arcee", "arcee"),
    Architecture("Apertus", "apertus"),
    Architecture("Seed-OSS", "seed_oss"),
    Architecture("EXAONE 4 (no windows)", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    Architecture("Cohere 2", "cohere2", {"sliding_window": 32, "num_hidden_layers": 4}, published={"rotary_pct": 1.0}),
    Architecture("StarCoder 2", "starcoder2", {"sliding_window": None}),
    Architecture("GPT-2", "gpt2", GPT2, published={"n_ctx": 2048}),
    Architecture("GPT-NeoX, Pythia", "gpt_neox", published={"rotary_pct": 0.25}),
    Architecture("StableLM", "stablelm"),
    Architecture("Nemotron", "nemotron", sentencepiece=True),
    Architecture("Nemotron-H", "nemotron_h"),
    Architecture("Falcon-H1", "falcon_h1", {"mamba_d_ssm": 256, "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 64}),
    Architecture("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"]}),
    Architecture("BLOOM", "bloom", {"n_layer": 2, "n_head": 4}),
    Architecture("OPT", "opt", {"ffn_dim": 512, "word_embed_proj_dim": 256}),
    Architecture("gpt-oss", "gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
)  # fmt: skip


def make_tiny(architecture: Architecture, texts: list[str], folder: Path) -> None:
    """Write a random model of the architecture with a tokenizer that its converter takes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    if architecture.sentencepiece:
        rows, bos, eos = write_sentencepiece(texts, folder, prefix="gemma" not in architecture.kind)
    else:
        tokenizer = train_tokenizer(texts, VOCABULARY)
        tokenizer.save(str(folder / "tokenizer.json"))
        write_tokenizer_config(folder / "tokenizer_config.json")
        rows, bos, eos = tokenizer.get_vocab_size(), 0, 2
    common = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048, "vocab_size": rows,
        "pad_token_id": 0, "bos_token_id": bos, "eos_token_id": eos, "initializer_range": 0.06,
    }  # fmt: skip
    torch.manual_seed(0)
    shape = AutoConfig.for_model(architecture.kind, **{**common, **architecture.changes})
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    with torch.no_grad():  # no two vectors alike, so that a misplaced one shows
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.half().save_pretrained(folder)
    config = program.read_json(folder / "config.json")
    program.write_json(folder / "config.json", {**config, **architecture.published})
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_sentencepiece(texts: Iterable[str], folder: Path, prefix: bool) -> tuple[int, int, int]:
    """Write tokenizer.model and the tokenizer.json of the same tokens.

    With `prefix` a space is put before a text, as all but Gemma have it.
    Returns how many tokens it has, and the ids of BOS and EOS.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    control = ["<|im_start|>", "<|im_end|>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=VOCABULARY, byte_fallback=True, control_symbols=control, unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, normalization_rule_name="identity", add_dummy_prefix=prefix,
        remove_extra_whitespaces=False, required_chars="▁", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    ids = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    scores = {piece: pieces.get_score(i) for piece, i in ids.items()}
    special = [*ENDS.values(), *control]
    merges = generate_merges(ids, scores, skip_tokens=special)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # fmt: skip
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": None,
        "unk_token": "<unk>", "add_bos_token": False, "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {str(ids[t]): {"content": t, "special": True} for t in special},
    }  # fmt: skip
    program.write_json(folder / "tokenizer_config.json", config)
    return len(json.loads(tokenizer.to_str())["model"]["vocab"]), ids["<s>"], ids["<|im_end|>"]
