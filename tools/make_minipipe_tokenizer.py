"""Write the MiniPipe model directory: tokenizer, chat template, model configuration, and initial weights.

    python tools/make_minipipe_tokenizer.py [--out megatron_sdpo/data/minipipe-base] [--seed 0] [--weights]

The tokenizer and configuration are the same at every call. ``--weights`` also writes *untrained*
weights, the start of pretraining; without it an existing model.safetensors is left alone.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from megatron_sdpo.tasks.minipipe_language import MESSAGES, OPERATIONS
from megatron_sdpo.teacher_context import ELLIPSIS

DEFAULT_FOLDER = Path(__file__).parents[1] / "megatron_sdpo" / "data" / "minipipe-base"

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
MARKS = ("<q>", "<sol>", "<fb>", "<again>", "<a>", "<att>")
VOCABULARY_SIZE = 104
WIDTH = 96

# The last alternative keeps what nothing else matches, as <unk>: no character is dropped unseen.
WORD = r"<[a-z]+>|[A-Za-z_]+|\d|[^\w\s]|\w"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '<q> ' + message['content'] + ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<a> ' + message['content'] + ' ' + eos_token + ' ' -}}
    {%- else -%}
        {{- message['content'] + ' ' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<a>' -}}
{%- endif -%}
"""


def vocabulary() -> dict[str, int]:
    """Every word of MiniPipe's questions, programs and feedback, in a fixed order, filled up to 104 entries."""
    texts = [*MESSAGES, "0123456789 [,] |"]
    for operation in OPERATIONS.values():
        texts += [operation.english, *operation.names]
    words = {word for text in texts for word in re.findall(WORD, re.sub(r"\{\w+\}", " ", text))}
    entries = [PAD, EOS, UNKNOWN, *MARKS, ELLIPSIS.strip(), *sorted(words)]
    # No text spells a reserved word: a model that samples one has made a syntax error.
    entries += [f"<reserved_{i}>" for i in range(VOCABULARY_SIZE - len(entries))]
    assert len(entries) == VOCABULARY_SIZE, f"{len(entries)} words do not fit {VOCABULARY_SIZE} entries"
    return {word: id for id, word in enumerate(entries)}


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, its configuration and the chat template, for transformers, SGLang and chat.Chat."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)  # pyright: ignore[reportAttributeAccessIssue]
    special = [AddedToken(text, special=True, normalized=False) for text in (PAD, EOS)]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": EOS, "pad_token": PAD}
    _write_json(folder / "special_tokens_map.json", named)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "model_max_length": model_config()["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def model_config(width: int = WIDTH) -> dict[str, Any]:
    """The Hugging Face configuration of the base model: a Llama, of 0.37M parameters in its usual width.

    Other widths make a ladder of sizes (recipes/minipipe_ladder.py); heads and depth stay.
    """
    if width % 16:
        raise ValueError(f"a width of {width} does not divide among four heads of an even size; take a multiple of 16")
    ids = vocabulary()
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": width,
        "intermediate_size": 8 * round(width * 11 / 48),
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": width // 4,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": ids[EOS],
        "pad_token_id": ids[PAD],
        "torch_dtype": "float32",
    }


def write_config(folder: Path, width: int = WIDTH) -> None:
    """config.json and generation_config.json."""
    config = model_config(width)
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 1.0, **ids})


def write_initial_weights(path: Path, seed: int, width: int = WIDTH) -> None:
    """Untrained weights, fp32, under Hugging Face names, to the file ``path``.

    The scales matter: with the usual small embedding, token identity drowns in the first blocks'
    outputs and the model does not learn to copy in any budget of minutes.
    """
    config, rng = model_config(width), np.random.default_rng(seed)
    hidden, inner, entries = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    linears = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

    def drawn(shape: tuple[int, int], std: float) -> np.ndarray:
        return (rng.standard_normal(shape) * std).astype(np.float32)

    weights = {"model.embed_tokens.weight": drawn((entries, hidden), 1.0)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in linears.items():
            writes_residual = name.endswith(("o_proj", "down_proj"))
            weights[f"{prefix}{name}.weight"] = drawn(shape, 0.02 if writes_residual else shape[1] ** -0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = np.ones(hidden, np.float32)
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    weights["lm_head.weight"] = drawn((entries, hidden), 0.02)
    path.write_bytes(save(weights, metadata={"format": "pt"}))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the MiniPipe model directory.")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the model, a multiple of 16")
    parser.add_argument("--weights", action="store_true", help="write untrained weights, too")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(arguments.out)
    write_config(arguments.out, arguments.width)
    if arguments.weights:
        write_initial_weights(arguments.out / "model.safetensors", arguments.seed, arguments.width)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
