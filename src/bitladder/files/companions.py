"""What a checkpoint folder needs beside its weights: configuration, tokenizer, chat template.

From a checkpoint folder they are copied byte for byte. From a GGUF file transformers makes them.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitladder.errors import BadInput
from bitladder.files.checkpoint import read_json

_COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


_GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2_SPLIT]},
}
"""How text is split before byte pairs are merged, by ``tokenizer.ggml.pre``: where transformers loses it in a GGUF."""


@dataclass(frozen=True)
class Companions:
    """``config`` without any quantization, and the other files by name."""

    config: dict[str, Any]
    files: dict[str, bytes]


def companions_of_folder(folder: Path) -> Companions:
    """The companions of a checkpoint, as they are.

    Raises:
        BadInput: no config.json, or no tokenizer.
        BadFile: config.json is no JSON object.
    """
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    files = {
        path.name: path.read_bytes() for pattern in _COPIED for path in sorted(folder.glob(pattern)) if path.is_file()
    }
    if not any(name.startswith("tokenizer") or name.endswith((".model", ".tiktoken")) for name in files):
        raise BadInput(
            f"{folder} has no tokenizer.",
            means="Only part of the checkpoint was copied; a model without its tokenizer cannot be served.",
            do="Copy tokenizer.json and tokenizer_config.json (or tokenizer.model) into it.",
        )
    return Companions(config, files)


def companions_of_gguf(path: Path, *, pre: str, tied: bool) -> Companions:
    """Configuration and tokenizer that transformers makes of a GGUF file's header.

    Args:
        path: The file.
        pre: Its ``tokenizer.ggml.pre``.
        tied: The model has no output matrix of its own.

    Raises:
        BadInput: transformers cannot read this architecture or tokenizer from GGUF.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_diff_dict()
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise BadInput(
            f"transformers cannot make a checkpoint of {path.name}: {error}",
            means="It reads fewer architectures and tokenizers from GGUF than llama.cpp does.",
            do="Give the model's original checkpoint folder or hf:org/name; GGUF levels work from this file as it is.",
        ) from error
    if pre in _PRE_TOKENIZERS and "tokenizer.json" in files:
        tokenizer_json = json.loads(files["tokenizer.json"])
        tokenizer_json["pre_tokenizer"] = _PRE_TOKENIZERS[pre]
        files["tokenizer.json"] = json.dumps(tokenizer_json, ensure_ascii=False).encode()
    # Keys of transformers' own book-keeping, and with them the path that the file lay at, are nobody's
    # business.
    config = {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}
    config["architectures"] = config.get("architectures") or [_causal_class(config["model_type"])]
    config["tie_word_embeddings"] = tied
    return Companions(json.loads(json.dumps(config, default=str)), files)


def _causal_class(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return found if isinstance(found, str) else found[0]


def tokenizer_differences(
    folder: Path, prompts: Mapping[str, Sequence[int]], *, checkpoint: Path | None = None, template: str | None = None
) -> list[str]:
    """How a written folder reads text differently from its source, a phrase for each difference.

    Args:
        folder: The written checkpoint.
        prompts: Texts, and their ids by the source's own tokenizer; without any nothing is compared.
        checkpoint: The source's folder: its tokenizer and template then count, not the ids.
        template: Without ``checkpoint``: the source's chat template.
    """
    if not prompts:
        return []
    made = _tokenizer(folder)
    original = _tokenizer(checkpoint) if checkpoint is not None else None
    if made is None:  # transformers may not know the source's tokenizer either: the files are equal at least
        return [] if original is None and checkpoint is not None else ["it cannot be loaded"]
    wrong = []
    for prompt, ids in prompts.items():
        expected = list(ids) if original is None else original(prompt)["input_ids"]
        found = made(prompt)["input_ids"]
        if found != expected:
            at = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
            wrong.append(f"token {at} of {_start(prompt)!r} ({len(found)} tokens, {len(expected)} expected)")
        elif original is not None and original.chat_template:
            chat = [{"role": "user", "content": prompt}]
            if made.apply_chat_template(chat, tokenize=False) != original.apply_chat_template(chat, tokenize=False):
                wrong.append(f"the chat template turns {_start(prompt)!r} into other text")
    if original is None and template and made.chat_template != template:
        wrong.append("its chat template is another")
    return wrong


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer in transformers; None where that cannot read it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception:  # whatever a tokenizer's own code raises
        return None


def _start(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
