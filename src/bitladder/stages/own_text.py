"""Calibration text that the model writes itself, sampled in the engine and kept.

Each text is kept as soon as it is written, under a key over the model, the seeds, the settings and the engine's build,
so a killed call goes on where it was and a model writes once. Several texts are written at a time, and sums of such
batches differ in their last bits, so another machine may get other words; what is fitted to them depends on the words
(``text_hash``) and not on the key.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder import unicode
from bitladder.describe.seed import Seed
from bitladder.describe.text import Document
from bitladder.errors import EngineError
from bitladder.plan.own_text import LEAST_TOKENS, MIN_P, MOST_TOKENS, TEMPERATURE, TOP_P, refusal, sound_part
from bitladder.records import to_json
from bitladder.records.own_text import OwnText, OwnTextReport, OwnTexts
from bitladder.records.reading import read_json
from bitladder.stages.job import Job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitladder.describe.model import Model
    from bitladder.engines.llama import LlamaServer
    from bitladder.plan.preflight import JobNeed

_AT_A_TIME = 8
"""Texts: a processor reads the weights once for all of them."""
_CONTEXT = 1024
"""Tokens of a chat: question and answers."""
_SAMPLING = {"temperature": TEMPERATURE, "top_p": TOP_P, "min_p": MIN_P, "top_k": 0}
_DECODING = 1.5
"""By which an operation takes longer for a few tokens at a time than for a prompt, until it was measured."""
_REVISION = 1
"""Of all that a text depends on and the key does not see."""


def own_documents(job: Job) -> list[Document]:
    """What the model wrote, those of before among them; none, with a warning, where too little of it is fit for use.

    Raises:
        EngineError: the engine does not run this model.
        NothingFits: too little memory for it.
        OutputError: no room to keep them.
    """
    found = own_texts(job)
    job.journal.own_text = found.report
    for line in own_text_lines(found.report):
        job.journal.say(line)
    if found.refused:
        job.journal.warn(f"The model's own text is not calibrated on: {found.refused}.")
        return []
    return [Document(one.name, one.text) for one in found.kept]


def own_texts(job: Job) -> OwnTexts:
    """The same as a record, with what was dropped, and why. Raises as ``own_documents``."""
    from bitladder.files.texts import shipped_seeds

    seeds = shipped_seeds()
    plain = not has_template(job.source.model)
    folder = _folder(job, seeds, plain=plain)
    known = {seed.name: one for seed in seeds if (one := _read(folder, seed.name))}
    missing = [seed for seed in seeds if seed.name not in known]
    if missing:
        known |= _written(job, missing, folder, len(seeds), plain=plain)
    texts = tuple(known[seed.name] for seed in seeds)
    return OwnTexts(texts, plain, refusal(sum(not one.dropped for one in texts), len(texts)))


def has_template(model: Model) -> bool:
    """Whether a chat can be put to the model as it was trained for."""
    return bool(str(model.metadata.get("tokenizer.chat_template", "")).strip())


def _folder(job: Job, seeds: Sequence[Seed], *, plain: bool) -> Path:
    from bitladder.files.engine_package import engine_version
    from bitladder.files.folders import cache_folder, cache_key

    settings = json.dumps([_REVISION, plain, MOST_TOKENS, _CONTEXT, _SAMPLING, [to_json(seed) for seed in seeds]])
    key = cache_key("own text", job.source.sha256, engine_version() or "", settings)
    return cache_folder("own-text", key[:32])


def _read(folder: Path, name: str) -> OwnText | None:
    """What was kept of a seed; None where there is none, or one that cannot be read: it is written again."""
    try:
        found = read_json(OwnText, (folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.name == name else None


def _written(job: Job, seeds: Sequence[Seed], folder: Path, total: int, *, plain: bool) -> dict[str, OwnText]:
    """Texts of these seeds, each kept as it comes."""
    from bitladder.engines.base import Launch
    from bitladder.engines.llama import LlamaServer
    from bitladder.files.atomic import write_whole
    from bitladder.stages.forecast import forecast

    n_ctx = job.source.model.dims.context(_CONTEXT)
    launch = Launch(job.source.path, n_ctx=n_ctx, n_parallel=_AT_A_TIME, threads=job.threads, chats=not plain)
    found: dict[str, OwnText] = {}
    done = total - len(seeds)
    what = "the model writes its calibration text"
    with forecast(_need(job, n_ctx, len(seeds)), job.journal):
        job.progress(what, done, total)
        with _told_what_to_do(), LlamaServer(launch) as server:
            tools = not plain and server.takes_tools() is not False
            pool = ThreadPoolExecutor(_AT_A_TIME)
            try:
                tasks = [pool.submit(_one, server, seed, n_ctx, plain=plain, tools=tools) for seed in seeds]
                for task in as_completed(tasks):
                    one = task.result()
                    write_whole(folder / f"{one.name}.json", json.dumps(to_json(one)), do="Make room in the cache.")
                    found[one.name] = one
                    job.progress(what, done + len(found), total)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # the engine's end ends what still waits for it
    return found


def _one(server: LlamaServer, seed: Seed, n_ctx: int, *, plain: bool, tools: bool) -> OwnText:
    """What the model makes of one seed."""
    if plain:
        return _answered(server, seed, seed.begin, n_ctx)[0]
    messages = [{"role": "system", "content": seed.system}] if seed.system else []
    before = 0
    for turn, asked in enumerate(seed.ask[:-1], start=1):
        messages.append({"role": "user", "content": asked})
        prompt = server.render(messages, seed.tools if tools else ())
        written, answer = _answered(server, seed, prompt, n_ctx, turns=len(seed.ask) - turn + 1, least=1)
        if written.dropped:
            return written
        before += written.tokens
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": seed.ask[-1]})
    prompt = server.render(messages, seed.tools if tools else ())
    last, _ = _answered(server, seed, prompt, n_ctx, least=max(1, LEAST_TOKENS - before))
    return last if last.dropped else replace(last, tokens=before + last.tokens)


def _answered(
    server: LlamaServer, seed: Seed, prompt: str, n_ctx: int, *, turns: int = 1, least: int = LEAST_TOKENS
) -> tuple[OwnText, str]:
    """A text that begins with ``prompt``, as far as it is sound, and the answer in it without the token that ends it;
    ``turns`` that share what the context has left."""
    asked = server.tokenize(prompt, add_special=True)
    most = min(MOST_TOKENS, (n_ctx - len(asked)) // turns - 1)
    if most < 1:
        return OwnText(seed.name, "", 0, f"no room for an answer in {n_ctx} tokens"), ""
    ids, ended = server.sample(asked, max_tokens=most, seed=_seed_number(seed.name), sampling=_SAMPLING)
    sound = sound_part(ids, server.detokenize(ids), seed, least=least)
    if sound.reason:
        return OwnText(seed.name, "", 0, sound.reason), ""
    used = ids[: sound.tokens]
    text, answer = (
        unicode.mended(server.detokenize(part)).rstrip("\ufffd")  # cut within a character
        for part in (used, used[:-1] if ended and len(used) == len(ids) else used)
    )
    return OwnText(seed.name, prompt + text, sound.tokens), answer.strip()


def _seed_number(name: str) -> int:
    """Of the engine's random numbers: another for each text, the same on each machine."""
    return zlib.crc32(name.encode())


def _need(job: Job, n_ctx: int, texts: int) -> JobNeed:
    from bitladder.files.probe import probe_machine
    from bitladder.plan.engine_need import context_bytes, engine_need
    from bitladder.stages.forecast import weights_used

    model, tokens = job.source.model, texts * MOST_TOKENS
    size = sum(header.path.stat().st_size for header in job.source.headers)
    context = context_bytes(model, n_ctx * _AT_A_TIME, 512)
    used = weights_used(model) + model.dims.n_vocab * model.dims.n_embd
    what = f"write {texts} calibration texts of up to {MOST_TOKENS} tokens in the engine"
    operations = 2 * used * tokens * _DECODING
    return engine_need(what, [size], context, [operations], probe_machine(), job.threads).named(what, "own text")


@contextmanager
def _told_what_to_do() -> Iterator[None]:
    """Calibrating on other text may work where the engine does not run the model."""
    try:
        yield
    except EngineError as error:
        error.do = f"{error.do} Or calibrate on other text: --calibrate shipped, or a file.".strip()
        raise


def own_text_lines(found: OwnTextReport) -> list[str]:
    """What came of it, for the terminal."""
    way = "in plain text, for it has no chat template" if found.plain else "through its chat template"
    lines = [f"Calibration text of the model's own, {way}: {found.texts} texts, {found.tokens:,} tokens written."]
    if found.dropped:
        lines.append("  dropped: " + ", ".join(f"{count} ({reason})" for reason, count in found.dropped.items()))
    return lines
