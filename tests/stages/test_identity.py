"""What is served is what was measured: files are known by their hashes, whatever verb comes after whatever verb."""

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.describe.text import Document
from bitladder.files.gguf import GgufFile
from bitladder.records import evaluation
from bitladder.records.level_file import FileStanding, Making, StoredFile
from bitladder.serve.app import build_app
from bitladder.serve.deploy import deployed
from bitladder.serve.settings import ServeSettings
from bitladder.stages.write_levels import quantize_levels
from bitladder.store.evidence import Evidence
from bitladder.store.recorded import Recorded, Subject
from engine_model import TEXT, WORKLOAD, write_engine_model
from upstreams import CHAT, chat

LEVELS = ("Q8_0", "Q4_K_M")
SMALL = ("--ctx", "512", "--threads", "1")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class World:
    """A folder in which a user works, and what `serve` was about to start."""

    home: Path
    served: list[ServeSettings] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.home / "m-F16.gguf"

    @property
    def out(self) -> Path:
        return self.home / "demo"

    def __call__(self, verb: str, *arguments: str | Path, code: int | None = 0):
        done = CliRunner().invoke(app, [verb, *map(str, arguments)])
        assert code is None or done.exit_code == code, (verb, done.output, done.exception)
        return done

    def run(self, *options: str | Path, out: Path | None = None, levels: str = ",".join(LEVELS)):
        return self(
            "run", self.model, "--levels", levels, "--workload", self.home / "w.yaml", "--text", self.home / "t.txt",
            "--bar", "kl < 9", "--full", "--out", out or self.out, *SMALL, *options,
        )  # fmt: skip

    def gate(self, *options: str | Path):
        return self(
            "gate", self.model, "--levels", "Q8_0,Q4_K_M", "--workload", self.home / "w.yaml", "--text",
            self.home / "t.txt", "--bar", "kl < 9", *SMALL, *options, code=None,
        )  # fmt: skip

    def record(self, out: Path | None = None) -> dict:
        return json.loads(((out or self.out) / "run.json").read_text())

    def file(self, level: str) -> Path:
        """The file of the run's record."""
        return Path(next(one["path"] for one in self.record()["files"] if one["level"] == level))

    def measured(self) -> dict[Path, str]:
        """Every file that evidence points to, with its hash as stored."""
        with Evidence.open() as store:
            return {Path(row.value["path"]): row.value["sha256"] for row in store.find("file")}

    def serve(self, *options: str | Path) -> ServeSettings:
        self.said = self("serve", self.model, "--ctx", "512", *options).stderr
        return self.served[-1]

    def export(self, *options: str | Path) -> list[Path]:
        """The files that the exported configuration names."""
        done = self("export", self.model, "--ctx", "512", "--to", "llama-swap", *options)
        self.said = done.stderr
        commands = [shlex.split(one["cmd"]) for one in yaml.safe_load(done.stdout)["models"].values()]
        return [Path(command[command.index("--model") + 1]) for command in commands]


def _world(home: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(home)
    home.mkdir(exist_ok=True)
    monkeypatch.chdir(home)
    monkeypatch.setenv("BITLADDER_DATA", str(home / "data"))
    monkeypatch.setattr(evaluation, "MOST_OTHERS_SHARE", 1.0)  # whatever else this machine does, speeds are reused
    monkeypatch.setattr("bitladder.serve.app.serve", lambda settings, on_ready=None: world.served.append(settings))
    return world


@pytest.fixture(scope="module")
def measured_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data and cache after a run whose folder is gone: measurements, the importance matrix, and no file."""
    root = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITLADDER_CACHE", str(root / "cache"))
        world = _world(root / "home", patch)
        write_engine_model(world.model)
        (world.home / "w.yaml").write_text(WORKLOAD)
        (world.home / "t.txt").write_text(TEXT * 20)
        world.run()
        shutil.rmtree(world.out)
    return root


@pytest.fixture
def world(measured_elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A user's folder with the model, before any run; measurements are reused where nothing changes them."""
    shutil.copytree(measured_elsewhere / "home", tmp_path / "home")
    monkeypatch.setenv("BITLADDER_CACHE", str(measured_elsewhere / "cache"))
    return _world(tmp_path / "home", monkeypatch)


# ---------------------------------------------------------------- each verb after each verb

VERBS = {
    "run": lambda world: world.run(),
    "run otherwise": lambda world: world.run("--imatrix", "none"),
    "quantize otherwise": lambda world: world(
        "quantize", world.model, "--to", ",".join(LEVELS), "--out", world.out, "--effort", "fast", "--imatrix", "none"
    ),
    "gate": lambda world: world.gate("--out", world.out, "--imatrix", "none"),
    "smallest": lambda world: world(
        "smallest", world.model, "--workload", world.home / "w.yaml", "--levels", "Q8_0,Q4_K_M", "--out", world.out,
        "--bar", "passes >= reference - 90 points", *SMALL, code=None,
    ),
    "serve": lambda world: world.serve("--quality", "Q8_0", "--speed", "Q4_K_M"),
    "serve what was chosen": lambda world: world.serve(),
    "export": lambda world: world.export("--quality", "Q8_0", "--speed", "Q4_K_M"),
}  # fmt: skip
LOOKING = {
    "plan": lambda world: world("plan", world.model, "--ctx", "512"),
    "measure": lambda world: world(
        "measure", world.model, "--levels", "Q4_K_M", "--file", world.file("Q4_K_M"), "--text", world.home / "t.txt",
        "--threads", "1",
    ),
    "inspect": lambda world: world("inspect", world.file("Q4_K_M")),
    "report": lambda world: world("report", world.out / "run.json", "--out", world.home / "copy.html"),
    "compare": lambda world: world(
        "compare", world.file("Q8_0"), "Q4_K_M", "Hello", "--of", world.model, "--max-tokens", "2", "--threads", "1"
    ),
}  # fmt: skip


def each_after_each(names: list[str]) -> list[str]:
    """The shortest order in which every name follows every name, itself included (de Bruijn)."""
    left = {name: [*names] for name in names}
    order, stack = [], [names[0]]
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            order.append(stack.pop())
    return order[::-1]


def test_the_order_has_every_verb_after_every_verb():
    order = each_after_each([*VERBS])
    assert set(itertools.pairwise(order)) == {(a, b) for a in VERBS for b in VERBS}


@dataclass
class Watch:
    """Hashes and times of everything that must stay."""

    files: dict[Path, str]
    run: dict[Path, tuple[str, int]]

    @classmethod
    def of(cls, world: World) -> "Watch":
        kept = [world.out / "run.json", world.out / "report.html"]
        return cls(world.measured(), {path: (sha256(path), path.stat().st_mtime_ns) for path in kept})

    def check(self, world: World, verb: str, *, runs: bool) -> None:
        for path, digest in self.files.items():
            if path.is_relative_to(world.home):
                assert sha256(path) == digest, f"{verb} replaced {path}"
        if not runs:
            assert Watch.of(world).run == self.run, f"{verb} wrote over the run's record"


def assert_served_is_measured(world: World, found: list[tuple[str, Path]]) -> None:
    decided = world.record()["decision"]["files"]
    for level, path in found:
        assert sha256(path) == decided[level]
        assert path.parent == world.out


def test_each_verb_after_each_verb_leaves_measured_files_alone(world):
    world.run()
    for verb in each_after_each([*VERBS]):
        before = Watch.of(world)
        result = VERBS[verb](world)
        before.check(world, verb, runs=verb.startswith("run"))
        if verb.startswith("serve"):
            tiers = [tier for tier in (result.quality, result.speed) if tier is not None]
            assert_served_is_measured(world, [(tier.level, tier.path) for tier in tiers])
            assert {tier.standing for tier in tiers} == {FileStanding.MEASURED}
            assert result.run_json == world.out / "run.json"
        if verb == "export":
            assert_served_is_measured(world, list(zip(("Q8_0", "Q4_K_M"), result, strict=True)))
    assert not (world.home / "m-F16-ladder").exists()


def test_verbs_that_look_change_nothing(world):
    world.run()
    for verb, do in LOOKING.items():
        before = Watch.of(world)
        files = {path: path.stat().st_mtime_ns for path in world.out.iterdir()}
        do(world)
        before.check(world, verb, runs=False)
        assert {path: path.stat().st_mtime_ns for path in world.out.iterdir()} == files, verb
    assert world.serve().run_json == world.out / "run.json"


# ---------------------------------------------------------------- a gate changes nothing


def test_a_gate_finds_the_files_of_a_run_and_leaves_its_record_alone(world):
    world.run()
    before = Watch.of(world)
    listed = sorted(path.name for path in world.out.iterdir())
    done = world.gate()
    assert done.exit_code == 0
    assert "Reused: files of Q8_0, Q4_K_M" in done.stderr
    before.check(world, "gate", runs=False)
    assert sorted(path.name for path in world.out.iterdir()) == listed
    assert not list(world.home.glob("m-F16-ladder/*"))

    world.gate("--out", world.out, "--imatrix", "none")
    before.check(world, "gate", runs=False)
    chosen = world.serve()
    assert chosen.quality.sha256 == world.record()["decision"]["files"][chosen.quality.level]


def test_serve_says_which_run_it_took_and_when_it_was_made(world):
    world.run()
    world.run("--imatrix", "none", "--bar", "kl < 8", out=world.home / "second")
    newest = world.record(world.home / "second")
    chosen = world.serve()
    assert chosen.run_json == world.home / "second" / "run.json"
    assert newest["created"] in world.said
    assert str(world.home / "second" / "run.json") in world.said
    assert chosen.quality.sha256 == newest["decision"]["files"][chosen.quality.level]


# ---------------------------------------------------------------- files that were moved, edited, deleted


@pytest.mark.parametrize("to", ["demo/prod.gguf", "elsewhere/m-Q4_K_M.gguf"])
def test_a_file_that_was_renamed_or_moved_beside_another_is_found(world, to):
    world.run()
    world.run(out=world.home / "elsewhere", levels="Q8_0")  # a second folder that evidence knows
    measured, digest = world.file("Q4_K_M"), sha256(world.file("Q4_K_M"))
    measured.rename(world.home / to)
    found = world.serve("--quality", "Q4_K_M").quality
    assert (found.path, found.sha256, found.standing) == (world.home / to, digest, FileStanding.MEASURED)
    assert "quantiz" not in world.said
    done = world.gate("--levels", "Q4_K_M")
    assert "Reused: files of Q4_K_M" in done.stderr
    assert not measured.exists()


def edit(path: Path) -> None:
    """The last weights of a file, which no header tells of."""
    data = bytearray(path.read_bytes())
    data[-600:] = bytes(600)
    path.write_bytes(data)


def test_an_edited_file_is_served_with_a_clear_notice_and_without_the_runs_evidence(world):
    world.run()
    edit(world.file("Q4_K_M"))
    measured = world.record()["decision"]["files"]["Q4_K_M"]
    settings = world.serve("--quality", "Q8_0", "--speed", "Q4_K_M")
    speed = settings.speed
    assert speed is not None
    assert (speed.path, speed.standing) == (world.file("Q4_K_M"), FileStanding.CHANGED)
    assert speed.sha256 == sha256(speed.path) != measured
    assert speed.note.count(measured[:12]) == 1
    assert settings.shadow.bar == 0 and not settings.auto.tags and not settings.auto.fixed
    assert settings.quality.standing is FileStanding.MEASURED

    named = world.serve("--quality", world.file("Q4_K_M")).quality
    assert named.standing is FileStanding.CHANGED


def test_a_replaced_file_of_the_same_size_and_time_is_not_the_measured_one(world):
    """As rsync and archives leave it: nothing but the bytes, and what no program can set, has changed."""
    world.run()
    served = world.file("Q4_K_M")
    before, other = served.stat(), served.with_suffix(".other")
    other.write_bytes(served.read_bytes()[:-1] + bytes([served.read_bytes()[-1] ^ 1]))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(served)
    settings = world.serve("--quality", "Q4_K_M")
    assert (settings.quality.sha256, settings.quality.standing) == (sha256(served), FileStanding.CHANGED)
    world.export("--quality", "Q4_K_M")
    assert "is not the file that was measured" in world.said


def test_a_run_measures_an_edited_file_as_a_file_of_its_own(world):
    world.run()
    before = world.record()
    edit(world.file("Q4_K_M"))
    done = world.run()
    after = world.record()
    assert "is not the file that was measured" in done.stderr
    assert after["decision"]["files"]["Q4_K_M"] == sha256(world.file("Q4_K_M"))
    kl = [
        next(one["kl_mean"] for one in record["fidelities"] if one["level"] == "Q4_K_M") for record in (before, after)
    ]
    assert kl[0] != kl[1]
    assert world.serve("--quality", "Q4_K_M").quality.standing is FileStanding.MEASURED
    world.file("Q4_K_M").unlink()
    world.run()  # made again, it is the first one again, with that one's measurements
    assert world.record()["decision"]["files"] == before["decision"]["files"]


@pytest.mark.parametrize("imatrix", ["auto", "none", "FILE"])
def test_a_deleted_run_is_built_again_byte_for_byte(world, imatrix):
    choice = imatrix
    if imatrix == "FILE":
        choice = world.home / "given.gguf"
        world("imatrix", world.model, "--out", choice, "--text", world.home / "t.txt", "--threads", "1")
    world.run("--imatrix", choice)
    decided = world.record()["decision"]
    shutil.rmtree(world.out)
    if imatrix == "FILE":
        choice.unlink()
    settings = world.serve("--quality", "Q4_K_M", "--speed", "Q8_0")
    assert settings.speed is not None
    for tier in (settings.quality, settings.speed):
        assert sha256(tier.path) == tier.sha256 == decided["files"][tier.level]
        assert tier.standing is FileStanding.MEASURED
    assert settings.run_json is None
    assert "record is gone" in world.said
    assert world.serve().quality.sha256 == decided["files"][decided["quality"]]
    assert "quantiz" not in world.said  # found where it was built


def test_a_fitted_level_of_a_run_is_found_and_built_again(world, monkeypatch):
    documents = [Document(f"t{number}", f"{number} {TEXT}" * 8) for number in range(12)]
    monkeypatch.setattr("bitladder.stages.weighing.calibration_texts", lambda job, texts: documents)
    world.run(levels="GPTQ-Q4_0")
    decided = world.record()["decision"]
    assert decided["quality"] == "GPTQ-Q4_0"
    lay = world.file("GPTQ-Q4_0")
    assert world.serve().quality.path == lay
    shutil.rmtree(world.out)
    again = world.serve("--quality", "gptq-q4_0").quality
    assert (again.sha256, again.standing) == (decided["files"]["GPTQ-Q4_0"], FileStanding.MEASURED)
    assert again.path != lay


def test_a_level_that_cannot_be_built_as_it_was_is_not_built_otherwise(world):
    given = world.home / "given.gguf"
    world("imatrix", world.model, "--out", given, "--text", world.home / "t.txt", "--threads", "1")
    world.run("--imatrix", given)
    shutil.rmtree(world.out)
    shutil.rmtree(world.home / "data" / "importance")
    given.unlink()
    done = world("serve", world.model, "--ctx", "512", "--quality", "Q4_K_M", code=2)
    assert "importance matrix" in done.stderr and "is gone" in re.sub(r"\s+", " ", done.stderr)
    assert not list(world.home.glob("**/*-Q4_K_M*.gguf"))


def test_a_level_that_comes_out_otherwise_is_said_to(world, monkeypatch):
    world.run("--imatrix", "none")
    world.file("Q4_K_M").unlink()
    monkeypatch.setattr("bitladder.stages.write_levels.REVISION", "9999")
    tier = world.serve("--quality", "Q4_K_M").quality
    assert tier.standing is FileStanding.CHANGED
    assert "is not the file that was measured" in tier.note


def test_a_level_that_was_never_measured_is_marked(world):
    world.run()
    tier = world.serve("--quality", "Q5_K_M").quality
    assert tier.standing is FileStanding.UNMEASURED
    assert "never measured" in tier.note
    with GgufFile.open(tier.path) as made, GgufFile.open(world.file("Q4_K_M")) as run:
        assert made.metadata["bitladder.method"] == run.metadata["bitladder.method"], "made as a run makes it"
    changed = tier.path.stat().st_mtime_ns
    assert world.serve("--quality", "Q5_K_M").quality.path.stat().st_mtime_ns == changed


def test_the_users_own_file_of_an_unmeasured_level_is_taken_and_not_made_again(world):
    world.run()
    world("quantize", world.model, "--to", "Q5_K_S", "--out", world.out, "--imatrix", "none", "--effort", "fast")
    (own,) = world.out.glob("*Q5_K_S*")
    before = sha256(own)
    tier = world.serve("--quality", "Q5_K_S").quality
    assert (tier.path, tier.sha256, tier.standing) == (own, before, FileStanding.UNMEASURED)


def test_quantize_writes_beside_a_measured_file_and_finds_it_again(world):
    world.run()
    measured = world.file("Q4_K_M")
    command = ("quantize", world.model, "--to", "Q4_K_M", "--out", world.out, "--effort", "fast", "--imatrix", "none")
    first = world(*command, "--json")
    (file,) = json.loads(first.stdout)["files"]
    assert Path(file["path"]) != measured
    assert Path(file["path"]).name.startswith("m-Q4_K_M.")
    (again,) = json.loads(world(*command, "--json").stdout)["files"]
    assert (again["path"], again["reused"]) == (file["path"], True)
    assert sha256(measured) == world.record()["decision"]["files"]["Q4_K_M"]
    with GgufFile.open(Path(file["path"])) as opened:
        assert str(opened.metadata["bitladder.method"]).startswith("search fast")


def test_parts_of_a_split_model_are_kept_too(world):
    quantize = ("quantize", world.model, "--to", "Q4_K_M", "--out", world.home / "split", "--split-max-size", "300kB")
    world(*quantize, "--imatrix", "none")
    parts = sorted((world.home / "split").iterdir())
    world("measure", world.model, "--file", parts[0], "--text", world.home / "t.txt", "--threads", "1")
    before = [sha256(part) for part in parts]
    world(*quantize, "--imatrix", "none", "--effort", "fast")
    assert [sha256(part) for part in parts] == before
    assert len(list((world.home / "split").iterdir())) == 2 * len(parts)
    assert world.serve("--quality", parts[0]).quality.standing is FileStanding.MEASURED


def test_a_run_does_not_take_the_place_of_another_models(world):
    world.run()
    decided = world.record()["decision"]
    other = write_engine_model(world.home / "other" / "m-F16.gguf", seed=1)
    arguments = (
        "run", other, "--levels", "Q8_0", "--workload", world.home / "w.yaml", "--text", world.home / "t.txt", "--bar",
        "kl < 9", "--imatrix", "none", *SMALL, "--out",
    )  # fmt: skip
    assert "run.json exists" in world(*arguments, world.out, code=2).stderr
    world(*arguments, world.home / "theirs")
    for name in ("run.json", "m-Q8_0.gguf"):  # whatever is moved there, a decision names its own
        shutil.copy(world.home / "theirs" / name, world.out / name)
    settings = world.serve()
    assert settings.quality.level == decided["quality"]
    assert settings.run_json is None, "the record that lies there is of the other model"


def test_evidence_of_another_machine_names_files_that_are_built_here(world, monkeypatch):
    world.run()
    decided = world.record()["decision"]["files"]
    world("evidence", "export", world.home / "e.jsonl")
    shutil.rmtree(world.out)
    shutil.rmtree(world.home / "data")
    world("evidence", "import", world.home / "e.jsonl")
    monkeypatch.setattr("bitladder.files.measured.machine_key", lambda machine: "another")
    alone = world.serve()  # nothing was decided on this machine: the file by itself
    assert (Path(alone.quality.path), alone.speed) == (Path(world.model), None)
    tier = world.serve("--quality", "Q4_K_M").quality
    assert (tier.sha256, tier.standing) == (decided["Q4_K_M"], FileStanding.MEASURED)


def test_records_from_before_files_had_hashes_are_no_evidence_of_any_file(world):
    world.run()
    path = world.out / "run.json"
    record = json.loads(path.read_text())
    del record["decision"]["files"]
    with Evidence.open() as store:
        (source,) = {row.key["source"] for row in store.find("decision")}
    with contextlib.closing(sqlite3.connect(world.home / "data" / "evidence.sqlite")) as database:
        database.execute("DELETE FROM evidence WHERE kind IN ('file', 'decision')")
        database.commit()
    path.write_text(json.dumps(record))
    with Evidence.open() as store:
        store.put("decision", {"source": source, "bar": "kl < 9"}, {"decision": record["decision"], "run": str(path)})
    settings = world.serve()
    assert settings.run_json == path
    assert settings.quality.path.parent == world.out
    assert settings.quality.standing is FileStanding.UNMEASURED


# ---------------------------------------------------------------- where it is said


def test_headers_the_list_of_models_the_log_and_the_page_say_what_evidence_there_is(world, caplog):
    world.run()
    edit(world.file("Q4_K_M"))
    settings = world.serve("--quality", "Q8_0", "--speed", "Q4_K_M")

    async def upstream(*_arguments, **_options):
        raise AssertionError("nobody asks")

    async def ask():
        levels = dict.fromkeys(("Q8_0", "Q4_K_M"), upstream)
        async with deployed(settings, upstreams=levels) as deployment:
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                models = (await client.get("/v1/models")).json()["data"]
                live = (await client.get("/bitladder/api/live")).json()
                return deployment, models, live

    with caplog.at_level("WARNING", logger="bitladder.serve"):
        deployment, models, live = asyncio.run(ask())
    listed = {one["id"]: one["bitladder"]["evidence"] for one in models if "bitladder" in one}
    assert listed == {"quality": "measured", "Q8_0": "measured", "speed": "changed", "Q4_K_M": "changed"}
    assert {tier["level"]: tier["evidence"] for tier in live["tiers"]} == {"Q8_0": "measured", "Q4_K_M": "changed"}
    assert any("is not the file that was measured" in note for note in live["notes"])
    assert any("is not the file that was measured" in note for note in deployment.notes)
    assert any("is not the file that was measured" in line.getMessage() for line in caplog.records)
    said = [dict(tier.headers)[b"x-bitladder-evidence"] for tier in deployment.tiers]
    assert said == [b"measured", b"changed"]


@pytest.mark.model
def test_a_real_gateway_says_it_in_every_reply(world):
    world.run()
    settings = world.serve("--quality", "Q8_0")

    async def ask():
        async with deployed(settings) as deployment:
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
                return await client.post(CHAT, json=chat("quality") | {"max_tokens": 2})

    reply = asyncio.run(ask())
    assert reply.headers["x-bitladder-evidence"] == "measured"
    assert reply.headers["x-bitladder-file-sha256"] == world.record()["decision"]["files"]["Q8_0"]


@pytest.mark.model
def test_compare_asks_the_measured_files(world, monkeypatch):
    world.run()
    moved = world.file("Q4_K_M").rename(world.out / "renamed.gguf")
    asked = []
    monkeypatch.setattr("bitladder.cli.compare._engine", lambda what, *_: asked.append(Path(what)) or closing_nothing())
    monkeypatch.setattr("bitladder.serve.compare.compare", lambda *_, **__: {})
    said = world("compare", "q8_0", "Q4_K_M", "Hello", "--of", world.model, "--threads", "1", "--json").stderr
    assert asked == [world.file("Q8_0"), moved]
    assert "never measured" not in said
    assert "no level" in world("compare", "q8_0", "Q9", "Hello", "--of", world.model, code=2).stderr
    assert "--of MODEL" in world("compare", "q8_0", "Q4_K_M", "Hello", code=2).stderr


def closing_nothing() -> SimpleNamespace:
    return SimpleNamespace(close=lambda: None)


# ---------------------------------------------------------------- the store


def test_measured_means_that_something_was_measured_on_it(world):
    world.run()
    with Evidence.open() as store:
        recorded = Recorded(store)
        assert recorded.is_measured(sha256(world.file("Q4_K_M")))
        assert recorded.is_measured(sha256(world.model))
        assert not recorded.points_to("0" * 64)
        path = str(world.file("Q4_K_M").resolve())
        assert [file.path for file in recorded.files_at(Path(path))] == [path]


HOSTILE = (
    {"making": {"effort": "heroic"}},
    {"making": {"importance": "../../../etc/passwd"}},
    {"making": {"threads": 10**12}},
    {"making": []},
    {"bytes": "many"},
    {"path": "/etc/passwd"},
)


@pytest.mark.parametrize("lie", HOSTILE, ids=repr)
def test_rows_of_somebody_elses_that_are_no_files_are_none(tmp_path, lie):
    file = StoredFile(
        "a" * 64, "Q8_0", "b" * 64, "/tmp/x.gguf", 1, "search good", Making("good", "auto", "c" * 16, 2), "1"
    )
    with Evidence.open() as store:
        recorded = Recorded(store)
        recorded.keep_file(Subject("a" * 64, "Q8_0", made="search good"), file)
        assert recorded.files("a" * 64) == [file]
        (row,) = store.find("file")
        store.put("file", row.key, {**row.value, **lie})
        assert recorded.files("a" * 64) == []


def test_only_named_files_are_kept(tmp_path):
    """The stage itself keeps what it is told to keep, and finds files under other names where it is told to look."""
    model = write_engine_model(tmp_path / "m-F16.gguf")
    with GgufFile.open(model) as source:
        (first,) = quantize_levels(source, ["Q4_0"], tmp_path / "out")
        kept = quantize_levels(source, ["Q4_0"], tmp_path / "out", effort="fast", is_kept=lambda path: True)[0]
        assert kept.path != first.path
        assert first.path.is_file()
        moved = first.path.rename(tmp_path / "out" / "prod.gguf")
        (found,) = quantize_levels(source, ["Q4_0"], tmp_path / "new", folders=[tmp_path / "out"])
        assert (found.path, found.reused) == (moved, True)
        assert not (tmp_path / "new").exists()
