"""What a checkpoint folder needs beside its weights: configuration, tokenizer, chat template.

From a checkpoint folder they are cleaned copies (``files/staging.py``). From a GGUF file transformers makes them.
Transformers reads what is not ours in a process behind a fence alone (``files/fence.py``), and there only a folder that
holds nothing but cleaned copies, or nothing but the GGUF file.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitladder.errors import BadFile, BadInput
from bitladder.files.fence import ended_after, environment, fenced, memory_bound, package_folders
from bitladder.files.regular import MAX_TEXT, read_regular
from bitladder.files.staging import PIECES, VOCABULARIES, clean_bytes, clean_json, data_files, stage_tokenizer
from bitladder.system import refer_to
from bitladder.units import GiB

_NOT_BESIDE = frozenset({"config.json", "hf_quant_config.json", "README.md"})
"""Files of a checkpoint that a level has of its own, or that speak of the source alone."""
_TOKENIZERS = frozenset({*VOCABULARIES, *PIECES, "tokenizer_config.json", "vocab.txt", "rwkv_vocab_v20230424.txt"}) - {
    "added_tokens.json"
}
_PLAIN_TEXT = re.compile(r"(?:[\w-]+\.tiktoken|vocab\.bpe|(?:LICENSE|NOTICE)(?:[_-][\w-]+)?(?:\.txt|\.md)?)")
"""Further names that are copied byte for byte: nothing reads them as anything but text."""
_SECONDS = 600
"""The longest that transformers may take to read a tokenizer; imports alone take ten on a busy machine."""


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
    """The companions of a checkpoint: files of known names, without what names code.

    Raises:
        BadInput: no config.json, or no tokenizer.
        BadFile: a file is not what its name says.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} has no config.json.", do="Give the folder that holds it.")
    config = clean_json(folder / "config.json")
    if not isinstance(config, dict):
        raise BadFile(f"{folder / 'config.json'} holds a {type(config).__name__}, not an object.")
    config.pop("quantization_config", None)
    config.pop("quantization", None)
    files = {}
    for path in data_files(folder):
        content = None if path.name in _NOT_BESIDE else clean_bytes(path)
        if content is not None:
            files[path.name] = content
    for path in sorted(folder.iterdir()):
        if _PLAIN_TEXT.fullmatch(path.name) and path.is_file():
            files[path.name] = read_regular(path)
    if not any(name in _TOKENIZERS or name.endswith(".tiktoken") for name in files):
        raise BadInput(
            f"{folder} has no tokenizer.",
            means="Only part of the checkpoint was copied; a model without its tokenizer cannot be served.",
            do="Copy tokenizer.json and tokenizer_config.json (or tokenizer.model) into it.",
        )
    return Companions(config, files)


def companions_of_gguf(path: Path, *, pre: str, tied: bool) -> Companions:
    """Configuration and tokenizer that transformers makes of a GGUF file's header, and of nothing beside it.

    Args:
        path: The file.
        pre: Its ``tokenizer.ggml.pre``.
        tied: The model has no output matrix of its own.

    Raises:
        BadInput: transformers cannot read this architecture or tokenizer from GGUF.
    """
    with tempfile.TemporaryDirectory(prefix="bitladder-") as held:
        alone, work = Path(held, "gguf"), Path(held, "work")
        alone.mkdir()
        refer_to(path.resolve(), alone / "model.gguf")
        output = _fenced("from_gguf", work, [str(alone), str(work / "made")])
        made = work / "made"
        if output is not None or not (made / "config.json").is_file():
            raise _not_from_gguf(path, output or "")
        config = clean_json(made / "config.json")
        files = {file.name: clean_bytes(file) for file in data_files(made) if file.name not in _NOT_BESIDE}
    kept = {name: content for name, content in files.items() if content is not None}
    if pre in _PRE_TOKENIZERS and "tokenizer.json" in kept:
        tokenizer_json = json.loads(kept["tokenizer.json"])
        tokenizer_json["pre_tokenizer"] = _PRE_TOKENIZERS[pre]
        kept["tokenizer.json"] = json.dumps(tokenizer_json, ensure_ascii=False).encode()
    # Keys of transformers' own book-keeping, and with them the path that the file lay at, are nobody's
    # business.
    config = {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}
    config["architectures"] = config.get("architectures") or [_causal_class(path, config.get("model_type"))]
    config["tie_word_embeddings"] = tied
    return Companions(config, kept)


def _not_from_gguf(path: Path, reason: str) -> BadInput:
    return BadInput(
        f"transformers cannot make a checkpoint of {path.name}: {reason}",
        means="It reads fewer architectures and tokenizers from GGUF than llama.cpp does.",
        do="Give the model's original checkpoint folder or hf:org/name; GGUF levels work from this file as it is.",
    )


def _causal_class(path: Path, model_type: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    if found is None:
        raise _not_from_gguf(path, f"it has no causal language model of type {model_type!r}")
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

    Raises:
        BadInput: the process that reads the tokenizers was ended: at the fence, at its bounds.
        BadFile: a file of a tokenizer is not what its name says.
    """
    if not prompts:
        return []
    texts = list(prompts)
    made, *others = _readings([folder] if checkpoint is None else [folder, checkpoint], texts)
    original = others[0] if others else None
    if made is None:  # transformers may not know the source's tokenizer either: the files are equal at least
        return [] if original is None and checkpoint is not None else ["it cannot be loaded"]
    wrong = []
    for number, prompt in enumerate(texts):
        expected = list(prompts[prompt]) if original is None else original["ids"][number]
        found = made["ids"][number]
        if found != expected:
            at = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
            wrong.append(f"token {at} of {_start(prompt)!r} ({len(found)} tokens, {len(expected)} expected)")
        elif original is not None and original["chats"][number] != made["chats"][number]:
            wrong.append(f"the chat template turns {_start(prompt)!r} into other text")
    if original is None and template and made["template"] != template:
        wrong.append("its chat template is another")
    return wrong


def token_ids(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts by a checkpoint's own tokenizer in transformers, special tokens added as it adds them.

    Raises:
        BadInput: transformers cannot read the tokenizer, or was ended at it.
        BadFile: a file of the tokenizer is not what its name says.
    """
    (made,) = _readings([folder], list(texts))
    if made is None:
        raise BadInput(
            f"transformers cannot read the tokenizer of {folder}.",
            means="It is of a kind that needs code of its own, which never runs here, or a file of it is missing.",
            do="Put the tokenizer.json of the model's original release beside it.",
        )
    found = [[int(token) for token in ids] for ids in made["ids"]]
    if len(found) != len(texts) or any(token < 0 for ids in found for token in ids):
        raise BadInput(f"The tokenizer of {folder} gives what are no tokens.", do="Fetch its files again.")
    return found


def _readings(folders: Sequence[Path], texts: list[str]) -> list[dict[str, Any] | None]:
    """What each folder's tokenizer in transformers makes of the texts; None where transformers cannot read it."""
    with tempfile.TemporaryDirectory(prefix="bitladder-") as held:
        work = Path(held, "work")
        stages = [Path(held, f"stage{number}") for number in range(len(folders))]
        for folder, stage in zip(folders, stages, strict=True):
            stage_tokenizer(folder, stage)
        asked, found = Path(held, "texts.json"), work / "found.json"
        asked.write_text(json.dumps(texts))
        output = _fenced("tokenizers", work, [str(asked), str(found), *map(str, stages)])
        if output is not None or not found.is_file():
            raise BadInput(
                f"The tokenizer of {folders[-1]} cannot be read: {output or 'transformers ended without a result'}",
                means="It needs code of its own, which never runs here, asks for absurdly much, or is an attack.",
                do="Compare the tokenizer files with the model's original release.",
            )
        readings: list[dict[str, Any] | None] = json.loads(read_regular(found))
        return readings


def _fenced(task: str, work: Path, arguments: list[str]) -> str | None:
    """Run a task behind the fence, in ``work``, which must not exist; None, or its last words when it failed."""
    work.mkdir()
    bounds = {"data_bytes": memory_bound(8 * GiB), "file_bytes": MAX_TEXT, "cpu_seconds": 2 * _SECONDS}
    job: Any = {
        "converter": [], "packages": package_folders(), "work": str(work), "task": task, "arguments": arguments,
        "without_mtp": False, **bounds,
    }  # fmt: skip
    last = ""
    with fenced(job, environment(work), work) as child, ended_after(child, _SECONDS) as late:
        for line in child.stdout or ():
            last = line.strip()[:400] or last
        code = child.wait()
        in_time = late.is_alive()
    if not in_time:
        return f"ended after {_SECONDS} seconds without a result"
    return None if code == 0 else last or f"exit code {code}"


def _start(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
