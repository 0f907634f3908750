"""Hostile forms of every kind of input, in this process: each ends in our error or a right result, soon, and small.

For each kind there is a sound example, and ways to damage it that know its structure: values of JSON are exchanged,
lines and marks of texts are moved, numbers of binary headers are made large. What is drawn depends on the seed alone.

    python tests/fuzz/inputs.py --minutes 5 --seed 1 --only workload

Prints what was found, with the file that did it, and ends with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import numpy as np

import gguf_bytes
from bitladder.describe.cache import cache_bytes, layer_caches
from bitladder.describe.criteria import KINDS, judge
from bitladder.describe.numbers import numbers
from bitladder.describe.repetition import loop_start
from bitladder.describe.structured import read_yaml
from bitladder.describe.thoughts import parted
from bitladder.describe.tool_calls import judged_calls
from bitladder.describe.workload import Criterion, Input
from bitladder.engines.base import Chat
from bitladder.engines.chat_api import ChatRequest, send_chat
from bitladder.errors import BitladderError
from bitladder.files.checkpoint import read_checkpoint
from bitladder.files.companions import companions_of_folder
from bitladder.files.describe_source import describe
from bitladder.files.imatrix import read_imatrix
from bitladder.files.texts import read_texts
from bitladder.files.workloads import import_workload, load_reference, load_workload
from bitladder.levels import LADDER
from bitladder.plan.cost import level_size
from bitladder.plan.memory import compute_buffers
from bitladder.records.evaluation import ToolCall
from bitladder.report.reading import read_run
from bitladder.stages.inspect import inspect_file
from bitladder.store.evidence import Evidence

MOST_S = 2.0
"""Of processor time for one input."""
MOST_MIB = 300
"""That the process may grow by."""
_HANG_S = 60
"""After which an input is given up, whatever it does."""

MARKS = [
    "\u2028",
    "\u2029",
    "\x85",
    "\ufeff",
    "\r",
    "\n",
    "\r\n",
    "\0",
    "\x1b[31m",
    "\x0b",
    "\t",
    "\u202e",
    "\u0301" * 99,
    "\U0001f600",
    "’",
    "。",
    "９",
    '"',
    "'",
    "`",
    "```json\n",
    "\\",
    "\\ud83d",
    "\\u0000",
    "{",
    "}",
    "[",
    "]",
    "[" * 300,
    "{" * 300,
    '{"a":' * 99,
    "(" * 300,
    ":",
    ": ",
    "- ",
    ",",
    "#",
    "&a ",
    "*a",
    "<<: *a\n",
    "!!int ",
    "!!float ",
    "!!python/object ",
    "!!binary ",
    "!!set ",
    "| \n",
    "> \n",
    "? ",
    "---\n",
    "%YAML 9.9\n",
    "{{",
    "}}",
    "{{x}}",
    "{% x %}",
    "null",
    "~",
    "true",
    "NaN",
    "-Infinity",
    "1e999",
    "-0",
    "0x1F",
    "9" * 400,
    "9" * 5000,
    "1_0",
    ".5",
    "1,5",
    "yes",
    "2026-01-01",
    "file://a.txt",
    "file://../x",
    "^(a+)+$",
    "a{9}{9}{9}",
    "(?<=a)",
    "(?P<a>",
    "\\p{L}",
    "data:",
    "data: [DONE]\n\n",
    "error:",
    "event: x\n",
    ": \n",
    "id: 1\n",
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    2**70,
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "0",
    "1" * 300,
    "x" * 10_000,
    "\ud83d",
    "\0",
    "\u2028",
    "../x",
    "/etc/passwd",
    [],
    {},
    [[]],
    [{}],
    {"a": {}},
    [None],
    [0],
    ["x"],
    {"": 1},
    ["x"] * 300,
    {"a": {"a": {"a": {"a": [[[[1]]]]}}}},
    "\x1b[31m",
]


class Kind(NamedTuple):
    """A kind of input: makes a damaged one in a folder, and reads it as the program does."""

    make: Callable[[random.Random, Path], Path]
    read: Callable[[Path, random.Random], object]


# ---- damage


def damaged_text(text: str, chance: random.Random) -> str:
    """A text with marks put in, parts taken out, doubled or moved."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        end = min(end, at + chance.choice((1, 3, 30, 300)))
        action = chance.randrange(5)
        if action == 0:
            text = text[:at] + chance.choice(MARKS) + text[at:]
        elif action == 1:
            text = text[:at] + text[end:]
        elif action == 2:
            text = text[:end] + text[at:end] * chance.choice((1, 9)) + text[end:]
        elif action == 3:
            text = text[:at] + chance.choice(MARKS) + text[end:]
        else:
            text = text[at:] + text[:at] if chance.random() < 0.1 else text[: max(at, 1)]
    return text


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes turned over, numbers made large, parts taken out or cut off."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if not found:
            break
        at = chance.randrange(len(found))
        action = chance.randrange(5)
        if action == 0:
            found[at] = chance.randrange(256)
        elif action == 1:
            width = chance.choice((4, 8))
            value = chance.choice((0, 1, 2, 3, 5, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            found[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif action == 2:
            found[at : at + chance.choice((0, 1, 4, 8))] = chance.randbytes(chance.choice((0, 1, 4, 8)))
        elif action == 3:
            del found[at : at + chance.choice((1, 8, 100))]
        else:
            del found[max(at, 1) :]
    return bytes(found)


def damaged_value(value: Any, chance: random.Random) -> Any:
    """A value of JSON with some of what it holds exchanged, left out or put under another name."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(chance.choice(VALUES))
        holder, name = chance.choice(places)
        action = chance.randrange(7)
        if action > 3:
            holder[name] = _of_its_kind(holder[name], chance)
        elif action == 0 and isinstance(holder, dict):
            holder[chance.choice(MARKS)] = holder.pop(name)
        elif action == 1:
            del holder[name]
        elif action == 2:
            at, key = chance.choice(places)
            other = at[key]
            holder[name] = copy.deepcopy(other)
        else:
            holder[name] = copy.deepcopy(chance.choice(VALUES))
    return value


def _of_its_kind(value: Any, chance: random.Random) -> Any:
    """Another value of the same kind."""
    if isinstance(value, str):
        return damaged_text(value, chance)
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return chance.choice((0, 1, -1, 2, 3, 64, 2**20, 2**40, 0.5, value + 1, value * 2))
    if isinstance(value, list):
        more = [copy.deepcopy(chance.choice(VALUES))] if chance.random() < 0.5 else copy.deepcopy(value[:1])
        return value + more * chance.choice((1, 1, 40))
    return value | {chance.choice(("x", "id", "type", "value", "prompt", "")): copy.deepcopy(chance.choice(VALUES))}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    listed = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in listed:
        yield value, name
        yield from _places(child)


def damaged_json(value: Any, chance: random.Random) -> str:
    """A document with damaged values, or a damaged document, or now and then a sound one."""
    if chance.random() < 0.15:
        return json.dumps(value, ensure_ascii=False)
    if chance.random() < 0.8:
        return json.dumps(damaged_value(value, chance), ensure_ascii=chance.random() < 0.5)
    return damaged_text(json.dumps(value), chance)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


# ---- files of models


NAMES = ("token_embd.weight", "blk.0.ffn_down.weight")


def gguf_file(
    chance: random.Random, folder: Path, keys: tuple[bytes, ...] = (), names: tuple[str, ...] = NAMES
) -> bytes:
    chance_of = np.random.default_rng(0)
    weights = {
        name: chance_of.standard_normal(shape).astype(np.float16)
        for name, shape in zip(names, ((32, 32), (32, 64)), strict=False)
    }
    tokens = gguf_bytes.strings("tokenizer.ggml.tokens", ["a", "b"] * 16)
    more = [
        *gguf_bytes.LLAMA_KEYS,
        tokens,
        gguf_bytes.flag("x.flag", value=True),
        gguf_bytes.ints("x.ints", [1, 2]),
        *keys,
    ]
    path = gguf_bytes.write_model(folder / "sound.gguf", weights, keys=more)
    data = path.read_bytes()
    path.unlink()
    if chance.random() < 0.3:
        return data
    head = 900
    return damaged_bytes(data[:head], chance) + data[head:] if chance.random() < 0.9 else damaged_bytes(data, chance)


def make_gguf(chance: random.Random, folder: Path) -> Path:
    return written(folder / "model-Q8_0.gguf", gguf_file(chance, folder))


def make_split(chance: random.Random, folder: Path) -> Path:
    for number in (1, 2):
        split = struct.pack("<H", number - 1), struct.pack("<H", 2), struct.pack("<i", 3)
        keys = (
            gguf_bytes.key("split.no", 2, split[0]),
            gguf_bytes.key("split.count", 2, split[1]),
            gguf_bytes.key("split.tensors.count", 5, split[2]),
        )
        names = NAMES if number == 1 else ("output_norm.weight",)
        written(folder / f"model-0000{number}-of-00002.gguf", gguf_file(chance, folder, keys, names))
    return folder / "model-00001-of-00002.gguf"


def read_gguf(path: Path, chance: random.Random) -> None:
    del chance
    with contextlib.suppress(BitladderError):
        inspect_file(path)
    model = describe(str(path)).model
    for level in list(LADDER)[:3]:
        assert level_size(model, level).bpw >= 0
    assert compute_buffers(model, 512).total >= 0
    assert cache_bytes(layer_caches(model), 512).total >= 0


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": [1, 2],
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64},
}
TENSORS = {
    "model.embed_tokens.weight": {"dtype": "BF16", "shape": [128, 64], "data_offsets": [0, 16384]},
    "model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [16384, 16640]},
    "__metadata__": {"format": "pt"},
}
TOKENIZER = {
    "version": "1.0",
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    "added_tokens": [{"id": 1, "content": "<s>"}],
}
INDEX = {"metadata": {"total_size": 16640}, "weight_map": dict.fromkeys(list(TENSORS)[:2], "model.safetensors")}


def make_folder(chance: random.Random, folder: Path) -> Path:
    """A checkpoint folder of which one file is damaged."""
    which = chance.choice(("config", "tensors", "index", "tokenizer", "tokenizer_config"))

    def text(name: str, value: Any) -> str:
        return damaged_json(value, chance) if name == which else json.dumps(value)

    raw = text("tensors", TENSORS).encode("utf-8", "surrogatepass")
    data = struct.pack("<Q", len(raw)) + raw + bytes(16640)
    written(folder / "model.safetensors", damaged_bytes(data, chance) if chance.random() < 0.1 else data)
    if chance.random() < 0.5 or which == "index":
        written(folder / "model.safetensors.index.json", text("index", INDEX))
    config = {name: value for name, value in CONFIG.items() if chance.random() < 0.9}
    written(folder / "config.json", text("config", config))
    written(folder / "tokenizer.json", text("tokenizer", TOKENIZER))
    written(
        folder / "tokenizer_config.json",
        text("tokenizer_config", {"chat_template": "{{ messages }}", "auto_map": {"a": "b"}}),
    )
    return folder


def read_folder(path: Path, chance: random.Random) -> None:
    del chance
    for read in (read_checkpoint, companions_of_folder):
        with contextlib.suppress(BitladderError):
            read(path)
    model = describe(str(path)).model
    for level in list(LADDER)[:2]:
        level_size(model, level)


def make_imatrix(chance: random.Random, folder: Path) -> Path:
    if chance.random() < 0.5:
        entry = b"blk.0.x"
        body = struct.pack("<i", 1) + struct.pack("<i", len(entry)) + entry + struct.pack("<ii4f", 3, 4, 1, 2, 3, 4)
        data = body + struct.pack("<i", 2) + struct.pack("<i", 4) + b"text"
        return written(folder / "imatrix.dat", damaged_bytes(data, chance))
    arrays = {"blk.0.x.in_sum2": np.ones((1, 4), np.float32), "blk.0.x.counts": np.ones((1, 1), np.float32)}
    keys = [
        gguf_bytes.string("general.type", "imatrix"),
        gguf_bytes.strings("imatrix.datasets", ["a"]),
        gguf_bytes.u32("imatrix.chunk_count", 3),
    ]
    sound = gguf_bytes.write_model(folder / "sound.gguf", arrays, keys=keys)
    return written(folder / "imatrix.gguf", damaged_bytes(sound.read_bytes(), chance))


# ---- texts of people and other tools

INPUTS: list[dict[str, Any]] = [
    {
        "id": "a",
        "prompt": "Say {{x}}",
        "variables": {"x": "1,250"},
        "tags": ["t"],
        "weight": 2,
        "max_tokens": 8,
        "expect": {"number": {"value": 5, "which": "any", "locale": "de"}, "max_words": 9},
    },
    {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "expect": {"contains_all": [{"text": "a", "within_words": True}, "b"], "regex": r"^(\w+\s?)+\.$"},
    },
    {
        "prompt": "p",
        "files": {"x": "a.txt"},
        "system": "b",
        "expect": {
            "json_schema": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/d"}},
                "$defs": {"d": {"pattern": "(a+)+$"}},
            },
            "one_of": ["x", "y"],
        },
    },
    {
        "prompt": "p",
        "expect": {
            "set_recall": {"items": [["a", "b"], "c"], "at_least": 0.5},
            "judge": {"rubric": "r", "examples": [{"answer": "a", "passes": True}]},
        },
    },
    {
        "prompt": "p",
        "expect": {
            "similarity": {"to": "a", "at_least": 0.5, "metric": "rouge_l"},
            "exact": "x",
            "contains_none": "y",
            "contains_any": ["z"],
            "agrees_with_reference": True,
        },
    },
]
WORKLOAD = {"name": "w", "system": "s", "max_tokens": 9, "temperature": 0.5, "samples": 2, "inputs": INPUTS}
YAML = """\
name: w
base: &a {max_tokens: 8}
inputs:
  - id: a  # a remark
    prompt: "List: {{x}}"
    variables: {x: 'b'}
    tags: [t, u]
    expect:
      set_recall: [[a, b], c]
      number: {value: 5, tolerance: 0.5}
      regex: '\\d+'
  - {<<: *a, prompt: |
      several
      lines
    , expect: {exact: "a", max_words: 3}}
"""
PROMPTFOO = {
    "prompts": ["Say {{x}} {{y}}", '[{"role": "user", "content": "{{x}}"}]', {"raw": "r", "label": "l"}],
    "providers": ["a"],
    "defaultTest": {"vars": {"y": ["1", 2]}, "assert": [{"type": "contains", "value": "a"}]},
    "tests": [
        {
            "description": "d",
            "vars": {"x": "tea", "z": True},
            "assert": [{"type": "icontains-any", "value": "a, b"}, {"type": "regex", "value": "a+"}],
            "options": {},
            "metadata": {"a": 1},
        },
        {
            "vars": {"x": ["a", "b"], "f": "file://a.txt"},
            "assert": [
                {"type": "is-json", "value": {"type": "object"}},
                {"type": "equals", "value": 3, "weight": 1, "metric": "m"},
            ],
        },
    ],
}
CSV = 'id,prompt,expected,number,tags,weight\na,"Capital\nof ""x""?",Paris|paris,,facts;geo,2\nb,2 + 2?,,4,,\n'
ROWS: list[dict[str, Any]] = [
    {"prompt": "a {{x}}", "expected": ["b"]},
    {"input": [{"role": "user", "content": "c"}], "ideal": "d"},
    {"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]},
    {"prompt": "p", "expect": {"number": 3}},
    {
        "doc_id": 1,
        "target": "x #### 5",
        "arguments": {"gen_args_0": {"arg_0": "q", "arg_1": {"until": ["\n"], "max_gen_toks": 9}}},
    },
    {"doc_id": 2, "target": ["a"], "arguments": [['[{"role": "user", "content": "q"}]', {"temperature": 0}]]},
]
ANSWERS = [
    "",
    "5",
    '{"a": "aaaaaaaaaaaaaaaaaaaaaaaaaaaa!"}',
    "yes " * 60,
    "北京是。",
    "a b c 1,250.5 3/4 - 5",
    "```json\n[1, NaN]\n```",
]


ASSISTANT = (Path(__file__).parents[2] / "examples" / "assistant" / "assistant.yaml").read_text(encoding="utf-8")


def beside(folder: Path) -> Path:
    written(folder / "a.txt", "contents")
    return folder


def make_workload(chance: random.Random, folder: Path) -> Path:
    folder = beside(folder)
    kind = chance.randrange(6)
    if kind == 0:
        return written(folder / "w.yaml", damaged_text(YAML, chance))
    if kind > 3:
        damaged = damaged_text(ASSISTANT, chance) if kind == 4 else damaged_json(read_yaml(ASSISTANT).plain, chance)
        return written(folder / ("w.yaml" if kind == 4 else "w.json"), damaged)
    if kind == 1:
        lines = [json.dumps(one, ensure_ascii=False) for one in INPUTS]
        lines[chance.randrange(len(lines))] = damaged_json(chance.choice(INPUTS), chance)
        return written(folder / "w.jsonl", "\n".join(lines))
    text = damaged_json(WORKLOAD, chance)
    return written(folder / ("w.json" if kind == 2 else "w.yaml"), text)


def read_workload(path: Path, chance: random.Random) -> None:
    workload = load_workload(path)
    assert len(workload.hash) == 64
    for one in workload.inputs:
        own = tuple(criterion for criterion in one.criteria if KINDS[criterion.kind].check)
        said = parted(damaged_text(f"<think>{chance.choice(ANSWERS)}</think>{chance.choice(ANSWERS)}", chance))
        assert loop_start(said.thought) is None or len(said.thought) > 30
        judge(Input(one.id, one.messages, own), said.answer)
        for criterion in one.every_criterion:
            if criterion.kind == "tool_call":
                made = [ToolCall("book_room", damaged_text('{"nights": 3, "guests": [1e9, null]}', chance))]
                assert judged_calls(criterion.value, made, one.tools).detail


def make_import(chance: random.Random, folder: Path) -> Path:
    folder = beside(folder)
    kind = chance.randrange(5)
    if kind == 0:
        return written(folder / "rows.csv", damaged_text(CSV, chance))
    if kind == 1:
        return written(folder / "rows.json", damaged_json(ROWS, chance))
    if kind == 2:
        return written(folder / "rows.jsonl", "\n".join(damaged_json(one, chance) for one in ROWS))
    return written(folder / f"promptfoo.{chance.choice(('yaml', 'json'))}", damaged_json(PROMPTFOO, chance))


def read_import(path: Path, chance: random.Random) -> None:
    """What is imported must be what is read back."""
    del chance
    text, _ = import_workload(path)
    made = written(path.with_name("made.yaml"), text)
    assert load_workload(made).inputs


def make_answers(chance: random.Random, folder: Path) -> Path:
    lines = [{"id": "input-1", "text": "x\u2028y"}, {"id": "input-2", "text": "z"}]
    return written(folder / "answers.jsonl", "\n".join(damaged_json(one, chance) for one in lines))


def read_answers(path: Path, chance: random.Random) -> None:
    del chance
    rows = '{"prompt": "p", "expect": {"exact": "a"}}\n' * 2
    load_reference(path, load_workload(written(path.with_name("w.jsonl"), rows)))


def make_documents(chance: random.Random, folder: Path) -> Path:
    if chance.random() < 0.3:
        return written(folder / "t.txt", damaged_bytes("A text.\u2028More.\n".encode() * 9, chance))
    return written(folder / "t.jsonl", "\n".join(damaged_json({"text": "a\u2028b " * 9}, chance) for _ in range(3)))


def read_documents(path: Path, chance: random.Random) -> None:
    del chance
    for document in read_texts([path]):
        document.text.encode()
        numbers(document.text)


def make_evidence(chance: random.Random, folder: Path) -> Path:
    row = {
        "kind": "speed",
        "key": {"source": "a", "n": 1},
        "value": {"decode": 1.5, "text": "é"},
        "created": "2026-01-01T00:00:00",
        "bitladder": "0.1",
        "host": {"cores": 2},
    }
    head = {"format": "bitladder-evidence", "version": 1, "bitladder": "0.1"}
    lines = [json.dumps(head), *(damaged_json(row, chance) for _ in range(2))]
    return written(
        folder / "e.jsonl", "\n".join(lines) if chance.random() < 0.8 else damaged_text("\n".join(lines), chance)
    )


def read_evidence(path: Path, chance: random.Random) -> None:
    del chance
    with Evidence.open(str(path.with_name("store.sqlite"))) as store:
        store.import_(path)
        store.find("speed")
        list(store.lines())


def make_record(chance: random.Random, folder: Path) -> Path:
    fields = {
        "source": {"name": "m"},
        "levels": [],
        "decision": {"verdicts": [], "quality": "Q8_0"},
        "answers": [],
        "inputs": [],
    }
    return written(folder / "run.json", damaged_json(fields, chance))


# ---- replies


def _chunk(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta, **more}]}


def make_reply(chance: random.Random, folder: Path) -> Path:
    logprobs = {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": [{"token": "b", "logprob": -2.0}]}]}
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    timings = {"prompt_n": 5, "prompt_ms": 3.0, "predicted_n": 2, "predicted_ms": 4.5}
    if chance.random() < 0.3:
        message = {"role": "assistant", "content": [{"type": "text", "text": "a\u2028b"}]}
        whole = {
            "model": "m",
            "choices": [{"message": message, "finish_reason": "stop", "logprobs": logprobs}],
            "usage": usage,
        }
        return written(folder / "reply.json", damaged_json(whole | {"timings": timings}, chance))
    events = [
        _chunk({"role": "assistant"}),
        _chunk({"content": "a\u2028"}, logprobs=logprobs),
        _chunk({}, finish_reason="stop"),
        {"choices": [], "usage": usage, "timings": timings},
    ]
    which = chance.randrange(len(events))
    lines = [
        damaged_json(one, chance) if number == which else json.dumps(one, ensure_ascii=False)
        for number, one in enumerate(events)
    ]
    ends = chance.choice(("\n\n", "\r\n\r\n"))
    text = "".join(f"data: {line}{ends}" for line in [*lines, "[DONE]"])
    text = damaged_text(text, chance) if chance.random() < 0.4 else text
    raw = text.encode("utf-8", "surrogatepass")
    return written(folder / "reply.sse", damaged_bytes(raw, chance) if chance.random() < 0.2 else raw)


def read_reply(path: Path, chance: random.Random) -> None:
    raw = path.read_bytes()
    status = chance.choice((200, 200, 200, 200, 400, 500))
    kind = "application/json" if path.suffix == ".json" else "text/event-stream"
    cuts = sorted(chance.randrange(len(raw) + 1) for _ in range(3))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]

    def reply(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            status,
            headers={"content-type": kind, "retry-after": chance.choice(("3", "x", "-1", "9" * 99))},
            content=iter(pieces),
        )

    with httpx.Client(transport=httpx.MockTransport(reply)) as client:
        done = send_chat(client, "http://engine/v1/chat/completions", ChatRequest("m", Chat.of("q", 8)))
    done.text.encode()
    assert done.prompt_tokens >= 0 and done.completion_tokens >= 0


def make_criterion(chance: random.Random, folder: Path) -> Path:
    """A criterion that is sound, and an answer that is not."""
    one = chance.choice(INPUTS)
    kind, value = chance.choice([pair for pair in one["expect"].items() if KINDS[pair[0]].check])
    answer = damaged_text(chance.choice(ANSWERS) * chance.choice((1, 1, 30)), chance)
    return written(folder / "pair.json", json.dumps([kind, value, answer]))


def read_criterion(path: Path, chance: random.Random) -> None:
    del chance
    kind, value, answer = json.loads(path.read_bytes())
    judge(Input("i", (), (Criterion(kind, KINDS[kind].parse(value)),)), answer)


FUZZED: dict[str, Kind] = {
    "gguf": Kind(make_gguf, read_gguf),
    "split": Kind(make_split, read_gguf),
    "checkpoint": Kind(make_folder, read_folder),
    "imatrix": Kind(make_imatrix, lambda path, _: read_imatrix(path)),
    "workload": Kind(make_workload, read_workload),
    "import": Kind(make_import, read_import),
    "answers": Kind(make_answers, read_answers),
    "documents": Kind(make_documents, read_documents),
    "evidence": Kind(make_evidence, read_evidence),
    "record": Kind(make_record, lambda path, _: read_run(path)),
    "reply": Kind(make_reply, read_reply),
    "criterion": Kind(make_criterion, read_criterion),
}


# ---- trying


class Finding(NamedTuple):
    """An input that did what it must not."""

    kind: str
    seed: int
    what: str


class _Hangs(BaseException):
    """An input took too long to be waited for."""


def _alarm(*_: object) -> None:
    raise _Hangs


def tried(kind: str, seed: int, folder: Path) -> Finding | None:
    """Make and read one input; None when it ends as it should. The folder must be empty, and holds the input after."""
    chance = random.Random(f"{kind} {seed}")
    path = FUZZED[kind].make(chance, folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(_HANG_S)
    began = time.process_time()
    try:
        # An empty cache: without a converter nothing leaves this process.
        empty = {"BITLADDER_CACHE": str(folder / "cache"), "BITLADDER_CONVERTER": ""}
        with mock.patch.dict(os.environ, empty), contextlib.redirect_stdout(io.StringIO()):
            FUZZED[kind].read(path, chance)
    except BitladderError as error:
        if not error.found.strip():
            return Finding(kind, seed, "an error without words")
    except _Hangs:
        return Finding(kind, seed, f"not done after {_HANG_S} s")
    except (Exception, RecursionError):
        return Finding(kind, seed, traceback.format_exc(limit=-4))
    finally:
        signal.alarm(0)
    taken = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if taken > MOST_S:
        return Finding(kind, seed, f"took {taken:.1f} s of the processor")
    return Finding(kind, seed, f"grew by {grown:.0f} MiB") if grown > MOST_MIB else None


def rounds(kinds: list[str], seed: int, until: Callable[[int], bool], keep: Path | None = None) -> Iterator[Finding]:
    """Try the kinds in turn, from a seed on, until ``until(number of rounds)``; inputs of findings are kept."""
    number = 0
    while not until(number):
        for kind in kinds:
            folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
            found = tried(kind, seed + number, folder)
            if found and keep:
                shutil.copytree(folder, keep / f"{kind}-{found.seed}", dirs_exist_ok=True)
            shutil.rmtree(folder)
            if found:
                yield found
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FUZZED, action="append", help="a kind; several may be named")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where inputs of findings are kept")
    given = parser.parse_args()
    kinds = given.only or list(FUZZED)
    for kind in kinds:  # what is imported or compiled at the first time is no input's fault
        next(rounds([kind], -1, lambda number: number == 1), None)
    ends = time.monotonic() + 60 * given.minutes
    count = 0

    def until(number: int) -> bool:
        nonlocal count
        count = number
        return time.monotonic() > ends

    found = list(rounds(kinds, given.seed, until, given.keep))
    for one in found:
        print(f"== {one.kind} {one.seed}\n{one.what}")
    print(json.dumps({"rounds": count, "kinds": len(kinds), "findings": len(found), "next_seed": given.seed + count}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
