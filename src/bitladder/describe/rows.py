"""Rows of a table or of JSON as inputs of a workload: CSV files, lists of objects, samples of lm-evaluation-harness."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bitladder import json_text
from bitladder.describe.document import line_of, shortened
from bitladder.describe.numbers import numbers
from bitladder.describe.promptfoo import Imported
from bitladder.describe.structured import Fault, Read

_TEXTS = ("exact", "regex")
_LISTS = ("one_of", "contains_all", "contains_any", "contains_none")
_COLUMNS = ("prompt", "id", "tags", "weight", "system", "expected", "number", "max_words", *_TEXTS, *_LISTS)
_FIELD = re.compile(r"\{\{\s*[\w.-]+\s*\}\}")
_DELIMITERS = ",;\t|"
_LONGEST_TARGET = 200


def from_csv(text: str) -> Imported:
    """Inputs from a table with a header, parted by commas, semicolons or tabs.

    Column ``prompt`` is asked; ``id``, ``system``, ``tags`` (parted by ``;``) and ``weight`` are optional; every column
    named like a criterion of plain text is one (lists parted by ``|``), ``expected`` means ``one_of``.

    Raises:
        Fault: a column or a row cannot be used.
    """
    made = Imported()
    rows = _csv_rows(text)
    _, columns = next(rows, (1, []))
    if "prompt" not in columns:
        found = f"there is no column 'prompt'; the columns are {shortened(', '.join(columns))}."
        raise Fault(found, 1)
    for place, column in enumerate(columns):
        if column not in _COLUMNS:
            raise Fault(f"the column '{shortened(column)}' means nothing here.", 1, f"Columns: {', '.join(_COLUMNS)}.")
        if column in columns[:place]:
            raise Fault(f"there are two columns '{column}'.", 1)
    for line, cells in rows:
        if not any(cells):
            continue
        if len(cells) > len(columns):
            found = f"{len(cells)} cells, the header has {len(columns)} columns."
            raise Fault(found, line, "Put texts that hold the separator in quotes.")
        made.add(_csv_input(line, {name: cell for name, cell in zip(columns, cells, strict=False) if cell}), line)
    return made


def _csv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line where each begins.

    The csv module allows one length of cells to the whole process: it is raised for this reading alone, all of which is
    done before the first row is handed out.
    """
    header = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS[:3], key=header.count)
    found: list[tuple[int, list[str]]] = []
    line = 1
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, len(text)))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                break
            found.append((line, [cell.strip() for cell in cells] if line == 1 else cells))
    except csv.Error as error:
        raise Fault(f"this is no row of a table: {error}.", line) from error
    finally:
        csv.field_size_limit(before)
    return iter(found)


def _csv_input(line: int, row: dict[str, str]) -> dict[str, Any]:
    if "prompt" not in row:
        raise Fault("this row has no prompt.", line)
    one: dict[str, Any] = {name: row[name] for name in ("id", "system") if name in row} | _asked(row["prompt"])
    if "tags" in row:
        one["tags"] = [tag.strip() for tag in row["tags"].split(";") if tag.strip()]
    expect: dict[str, Any] = {name: row[name] for name in _TEXTS if name in row}
    expect |= {name: row[name].split("|") for name in _LISTS if name in row}
    if "expected" in row:
        if "one_of" in expect:
            raise Fault("this row has both 'expected' and 'one_of', which mean the same.", line)
        expect["one_of"] = row["expected"].split("|")
    for name, section in (("weight", one), ("number", expect), ("max_words", expect)):
        if name in row:
            section[name] = _number(name, row[name], line)
    return one | {"expect": expect}


def _number(name: str, cell: str, line: int) -> float | int:
    if not re.fullmatch(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?\s*", cell) or not math.isfinite(float(cell)):
        raise Fault(f"{name} needs a number, got '{shortened(cell)}'.", line)
    return int(cell) if name == "max_words" and cell.strip().isdecimal() else float(cell)


def _asked(prompt: str) -> dict[str, Any]:
    """A prompt that is asked as it is, whatever looks like a variable in it."""
    if _FIELD.search(prompt):
        return {"prompt": "{{prompt}}", "variables": {"prompt": prompt}}
    return {"prompt": prompt}


def from_objects(read: Read) -> Imported:
    """Inputs from a list of objects: those of a workload itself, rows as in CSV files, OpenAI's evals
    (``input``, ``ideal``), chats for fine-tuning (the assistant's last message is expected), and lm-eval's samples.

    Raises:
        Fault: an object is none of these.
    """
    made = Imported()
    listed = read.plain
    if isinstance(listed, dict) and isinstance(listed.get("samples"), dict):
        listed = [one for samples in listed["samples"].values() if isinstance(samples, list) for one in samples]
    if not isinstance(listed, list) or not listed:
        raise Fault("a list of objects is needed, or lm-eval's samples.", 1)
    seen: set[Any] = set()
    for place, plain in enumerate(listed):
        line = line_of(read.lines, (place,))
        if not isinstance(plain, dict):
            raise Fault(f"this is no object: {shortened(repr(plain))}.", line)
        if "arguments" in plain and "target" in plain:
            if _repeated(plain, seen, made):
                continue
            made.add(_lm_eval_input(plain, line, made), line)
        else:
            made.add(_object_input(plain, line, made), line)
    return made


def _object_input(plain: Mapping[str, Any], line: int, made: Imported) -> dict[str, Any]:
    """One object that is no sample of lm-eval."""
    if "expect" in plain:
        return dict(plain)
    kept = {name: plain[name] for name in ("id", "tags", "weight", "system", "max_tokens") if name in plain}
    asked, wanted = "", ""
    for asked, wanted in (("input", "ideal"), ("messages", ""), ("prompt", "completion"), ("prompt", "expected")):
        if asked in plain and (not wanted or wanted in plain):
            break
    else:
        names = shortened(", ".join(map(str, plain)))
        raise Fault(
            f"an object with the fields {names} means nothing here.",
            line,
            "Give 'prompt' and 'expected', or 'expect' with criteria as in a workload.",
        )
    for name in plain:
        if name not in kept and name not in (asked, wanted):
            raise Fault(f"the field '{shortened(str(name))}' means nothing here.", line)
    question = plain[asked]
    if asked == "messages":
        if not isinstance(question, list) or len(question) < 2 or not _is_reply(question[-1]):
            raise Fault("a chat must end with what the assistant should say.", line)
        answer, question = question[-1]["content"], question[:-1]
    else:
        answer = plain[wanted]
    answers = answer if isinstance(answer, list) else [answer]
    if not all(isinstance(one, str) and one.strip() for one in answers):
        raise Fault(f"what is expected must be a text or a list of texts, got {shortened(repr(answer))}.", line)
    made.remark("what is expected became one_of: case, quotes and a final full stop do not count")
    fields = (
        {"messages": question}
        if isinstance(question, list)
        else _asked(question)
        if isinstance(question, str)
        else None
    )
    if fields is None:
        raise Fault(f"'{asked}' is no text and no list of messages.", line)
    return kept | _literal(fields) | {"expect": {"one_of": answers}}


def _is_reply(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant" and isinstance(message.get("content"), str)


def _literal(fields: dict[str, Any]) -> dict[str, Any]:
    """Messages whose braces stay what they are."""
    messages = fields.get("messages")
    if not isinstance(messages, list):
        return fields
    variables: dict[str, str] = {}
    filled = []
    for place, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str) and _FIELD.search(content):
            variables[f"message-{place + 1}"] = content
            message = {**message, "content": f"{{{{message-{place + 1}}}}}"}  # noqa: PLW2901 - the same message, quoted
        filled.append(message)
    return {"messages": filled} | ({"variables": variables} if variables else {})


def _repeated(sample: Mapping[str, Any], seen: set[Any], made: Imported) -> bool:
    """Whether a document came already, with another filter: lm-eval writes a line for each."""
    key = (str(sample.get("doc_id")), str(sample.get("doc_hash")), str(sample.get("prompt_hash")))
    if sample.get("doc_id") is None or key not in seen:
        seen.add(key)
        return False
    made.remark("samples that differ in their filter only were taken once")
    return True


def _lm_eval_input(sample: Mapping[str, Any], line: int, made: Imported) -> dict[str, Any]:
    """A sample of a task that generates text. Requests are a list of lists in older releases, named in newer ones."""
    requests = sample["arguments"]
    if isinstance(requests, dict):
        requests = [list(one.values()) if isinstance(one, dict) else one for one in requests.values()]
    if (
        not isinstance(requests, list)
        or not requests
        or not all(isinstance(one, Sequence) and len(one) == 2 for one in requests)
    ):
        raise Fault("'arguments' are not requests as lm-eval writes them.", line)
    if len(requests) > 1 or isinstance(requests[0][1], str):
        raise Fault(
            "this task compares likelihoods of given answers, which has no counterpart here.",
            line,
            "Import the samples of a task that generates text (generate_until).",
        )
    context, settings = requests[0]
    if not isinstance(context, str) or not isinstance(settings, dict):
        raise Fault("'arguments' are not requests as lm-eval writes them.", line)
    one: dict[str, Any] = {"id": f"doc-{sample['doc_id']}"} if sample.get("doc_id") is not None else {}
    one |= _lm_eval_asked(context)
    if isinstance(settings.get("max_gen_toks"), int):
        one["max_tokens"] = settings["max_gen_toks"]
    if settings.get("until"):
        made.remark("stop sequences ('until') are not imported: answers may go on after them")
    if settings.get("temperature"):
        raise Fault("this task samples; temperature is one for a whole workload here.", line, "Set it there by hand.")
    return one | {"expect": _lm_eval_expected(sample["target"], line, made)}


def _lm_eval_asked(context: str) -> dict[str, Any]:
    if context.lstrip().startswith("[{"):
        try:
            messages = json_text.read(context)
        except ValueError:
            messages = None
        if isinstance(messages, list):
            chat = [
                {name: one[name] for name in ("role", "content") if name in one}
                for one in messages
                if isinstance(one, dict)
            ]
            return _literal({"messages": chat})
    return _asked(context)


def _lm_eval_expected(target: Any, line: int, made: Imported) -> dict[str, Any]:
    """What a sample's target asks for: the number after ``####`` or of a number alone, else the text."""
    targets = target if isinstance(target, list) else [target]
    texts = [str(one) if isinstance(one, int | float) and not isinstance(one, bool) else one for one in targets]
    if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
        raise Fault(f"a target is a text or a list of texts, got {shortened(repr(target))}.", line)
    final = [one.rsplit("####", 1)[-1].strip() for one in texts]
    values = numbers(final[0]) if len(final) == 1 and re.fullmatch(r"[-+$\d.,%\s]+", final[0]) else []
    if len(values) == 1:
        made.remark(
            "a target that is a number is looked for as the last number of the answer, whatever the task's filter"
        )
        return {"number": values[0]}
    if any(len(one) > _LONGEST_TARGET for one in final):
        raise Fault(f"a target of more than {_LONGEST_TARGET} characters has no counterpart here.", line)
    made.remark(
        "a target that is a text is compared with the whole answer (one_of), whatever the task's filter and metric"
    )
    return {"one_of": final}
