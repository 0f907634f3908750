"""Searching and fetching from the hub, against a server on this machine that speaks its API."""

import fcntl
import hashlib
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.cli.build import working
from bitladder.cli.compare import _compared as compared_path
from bitladder.describe.shapes import Shape
from bitladder.errors import BadInput, FetchError, NothingFits, UsageError
from bitladder.files.sources import resolve
from bitladder.files.stub_gguf import N_VOCAB, write_stub
from bitladder.progress import silent
from bitladder.report.hub import print_search
from bitladder.stages.hub import pull, search_models
from hub_server import running_hub

MB = b"\0" * 1_000_000


@pytest.fixture
def server(monkeypatch, tmp_path):
    with running_hub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        names = ("Q8_0", "Q4_K_M", "Q2_K")
        fake.repos["maker/Mistral-Large-GGUF"] = {
            f"large-{name}.gguf": MB * size for name, size in zip(names, (3, 2, 1), strict=True)
        }
        fake.repos["other/mistral-large-tiny-gguf"] = {"tiny-Q5_K_M.gguf": MB, "README.md": b""}
        fake.repos["closed/mistral-large-gguf"] = {"x-Q4_K_M.gguf": MB}
        fake.repos["maker/Mistral-Large"] = {"config.json": b"{}", "model.safetensors": MB}
        fake.repos["maker/Qwen-GGUF"] = {"q-Q4_K_M.gguf": MB}
        fake.downloads |= {"other/mistral-large-tiny-gguf": 5, "maker/Mistral-Large-GGUF": 70000}
        fake.licences["maker/Mistral-Large-GGUF"] = "mrl"
        fake.gated.add("closed/mistral-large-gguf")
        yield fake


def found(text, **options):
    return search_models(text, progress=silent, **options)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


class TestSearch:
    def test_level_size_downloads_licence_access_and_fit(self, server):
        rows = found("mistral large gguf", machine="16 GB laptop").levels
        assert [(row.repo, row.level, row.nbytes, row.fits, row.downloads, row.licence, row.gated) for row in rows] == [
            ("maker/Mistral-Large-GGUF", "Q4_K_M", 2_000_000, "RAM", 70000, "mrl", False),
            ("other/mistral-large-tiny-gguf", "Q5_K_M", 1_000_000, "RAM", 5, "apache-2.0", False),
            ("closed/mistral-large-gguf", "", 0, "", 0, "apache-2.0", True),
        ]
        assert rows[0].name == "hf:maker/Mistral-Large-GGUF:Q4_K_M"

    def test_other_levels_and_fewer_repositories(self, server):
        assert [row.level for row in found("mistral large", level="q2_k", limit=1).levels] == ["Q2_K"]
        assert found("nothing of the kind").levels == ()

    def test_all_levels_of_one_repository(self, server):
        rows = found("hf:maker/Mistral-Large-GGUF").levels
        assert [(row.level, row.nbytes) for row in rows] == [
            ("Q8_0", 3_000_000),
            ("Q4_K_M", 2_000_000),
            ("Q2_K", 1_000_000),
        ]
        with pytest.raises(BadInput, match="shows no model"):
            found("hf:maker/missing")

    @pytest.mark.parametrize(
        ("machine", "reserve", "fits"),
        [
            ("16 GB laptop", None, "RAM"),
            ("RTX 4090 + 64 GiB", None, "GPU"),
            ("16 GB laptop", 16 << 30, "no"),
        ],
    )
    def test_fit_follows_the_machine(self, server, machine, reserve, fits):
        assert found("qwen", machine=machine, reserve=reserve).levels[0].fits == fits

    @pytest.mark.parametrize("text", ["", "   ", "gguf", "GGUF gguf"])
    def test_no_words_is_an_error(self, server, text):
        with pytest.raises(UsageError, match="no words"):
            found(text)

    def test_hostile_answers(self, server):
        """Names that are no repositories are left out, escape sequences in file names shown and not sent."""
        server.repos["a/b/../c mistral"] = {"x.gguf": b""}
        server.repos["evil/mistral"] = {"\x1b[31m-Q4_K_M.gguf": b"x"}
        rows = found("mistral").levels
        assert "a/b/../c mistral" not in {row.repo for row in rows}
        assert "\x1b" not in run("search", "hf:evil/mistral").output

    def test_the_terminal_at_eighty_columns(self, server):
        answer = found("mistral large", machine="16 GB laptop")
        out = Console(file=io.StringIO(), width=80, highlight=False)
        print_search(answer.levels, answer.machine, answer.usable_bytes, out)
        text = out.file.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        assert re.search(r"maker/Mistral-Large-GGUF\s+Q4_K_M\s+0\.0\s+RAM\s+70,000", text)
        assert "closed/mistral-large-gguf." in text.replace("\n", " ")
        assert "bitladder pull hf:maker/Mistral-Large-GGUF:Q4_K_M" in text

    def test_the_verb(self, server):
        shown = run("search", "mistral large gguf", "--as", "16 GB laptop")
        assert shown.exit_code == 0
        assert "gated" in shown.output
        told = json.loads(run("search", "mistral large", "--json").stdout)
        assert told["levels"][0]["licence"] == "mrl"
        assert "no repository" in run("search", "nothing of the kind").output

    def test_no_hub(self, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
        with pytest.raises(FetchError, match="did not deliver the search for 'x'"):
            found("x")


class TestPull:
    def test_every_verb_finds_it_by_the_same_name(self, server):
        one = pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)[0]
        assert Path(one.path).read_bytes() == MB * 2
        assert (one.nbytes, Path(one.path).name) == (2_000_000, "large-Q4_K_M.gguf")
        asked = len(server.asked)
        assert pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)[0].path == one.path
        assert len(server.asked) == asked

    def test_several_at_once_with_progress(self, server):
        steps = []
        names = ["hf:maker/Mistral-Large-GGUF:Q4_K_M", "hf:maker/Mistral-Large-GGUF:Q8_0"]
        made = pull(names, lambda what, done, total: steps.append((what, done, total)))
        assert [Path(one.path).name for one in made] == ["large-Q4_K_M.gguf", "large-Q8_0.gguf"]
        assert any(0 < done <= total for _, done, total in steps)
        assert any("large-Q8_0.gguf" in what for what, _, _ in steps)

    def test_a_broken_download_goes_on_where_it_stopped(self, server, monkeypatch):
        """Within one command while bytes come, and in the next one after the line was dead."""
        monkeypatch.setattr("bitladder.files.hub_download.time.sleep", lambda seconds: None)
        server.cut_after, server.dead_after = 700_000, 2
        with pytest.raises(FetchError, match="what has arrived is kept"):
            pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)
        server.dead_after, server.sent = None, 0
        server.asked.clear()
        one = pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)[0]
        assert Path(one.path).read_bytes() == MB * 2
        assert server.asked == [("large-Q4_K_M.gguf", "bytes=1400000-1999999")]
        assert server.sent < 700_000
        assert [path.name for path in Path(one.path).resolve().parent.iterdir() if "part" in path.name] == []

    def test_a_server_without_ranges_begins_again(self, server, monkeypatch):
        monkeypatch.setattr("bitladder.files.hub_download.time.sleep", lambda seconds: None)
        server.cut_after, server.dead_after = 700_000, 1
        with pytest.raises(FetchError):
            pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)
        server.cut_after = server.dead_after = None
        server.ranges = False
        assert Path(pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)[0].path).read_bytes() == MB * 2

    def test_what_arrives_damaged_is_refused_and_removed(self, server, tmp_path):
        server.etags["large-Q4_K_M.gguf"] = "0" * 64
        with pytest.raises(FetchError, match="arrived with the hash"):
            pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)
        assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and path.stat().st_size > 1000]
        server.etags.clear()
        assert Path(pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)[0].path).read_bytes() == MB * 2

    @pytest.mark.parametrize("etag", ["../../../escaped", "a/b", "", "x" * 400])
    def test_a_hostile_name_of_a_blob_is_not_used(self, server, tmp_path, etag):
        server.etags["large-Q4_K_M.gguf"] = etag
        for size in (2, 0):  # large ones are fetched here, small ones by the client
            server.repos["maker/Mistral-Large-GGUF"] = {"large-Q4_K_M.gguf": MB * size or b"small"}
            with pytest.raises(FetchError, match=r"no hash|did not deliver"):
                pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)
        assert not (tmp_path / "escaped").exists()
        assert not list(tmp_path.glob("**/*.part"))

    def test_two_processes_do_not_write_one_file(self, server, tmp_path):
        server.cut_after, server.dead_after = 700_000, 1
        etag = hashlib.sha256(MB * 2).hexdigest()
        part = tmp_path / "hub" / "models--maker--Mistral-Large-GGUF" / "blobs" / f"{etag}.part"
        part.parent.mkdir(parents=True)
        with part.open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(FetchError, match="Another process"):
                pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)

    @pytest.mark.parametrize(
        ("name", "error", "match"),
        [
            ("maker/Mistral-Large-GGUF", UsageError, "hf:org/name"),
            ("hf:maker/Mistral-Large-GGUF", BadInput, "Q2_K, Q4_K_M, Q8_0"),
            ("hf:maker/Mistral-Large-GGUF:Q5_K_M", BadInput, "no GGUF files that match 'Q5_K_M'"),
            ("hf:maker/missing:Q4_K_M", BadInput, "shows no model"),
            ("hf:closed/mistral-large-gguf:Q4_K_M", BadInput, "gated"),
        ],
    )
    def test_what_cannot_be_fetched(self, server, name, error, match):
        with pytest.raises(error) as raised:
            pull([name], silent)
        assert match in str(raised.value)

    def test_nothing_is_fetched_when_one_of_several_is_wrong(self, server):
        with pytest.raises(BadInput):
            pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M", "hf:maker/missing"], silent)
        assert not server.asked

    def test_a_full_disk_is_told_before_the_download(self, server, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(NothingFits, match=r"takes 1\.91 MiB, and .* has 1000 B left"):
            pull(["hf:maker/Mistral-Large-GGUF:Q4_K_M"], silent)
        assert not server.asked

    def test_the_verb(self, server):
        shown = run("pull", "hf:maker/Mistral-Large-GGUF:Q2_K")
        assert shown.exit_code == 0
        assert "large-Q2_K.gguf" in shown.output
        failed = run("pull", "nonsense")
        assert failed.exit_code != 0


def test_the_advice_of_an_unknown_model_names_the_form(tmp_path):
    with pytest.raises(BadInput) as error:
        resolve(str(tmp_path / "nowhere.gguf"))
    assert "hf:org/name:Q4_K_M" in str(error.value)


def test_two_downloads_are_compared_by_their_names(server, tmp_path):
    """The files that a comparison starts engines for are fetched."""
    stub = tmp_path / "stub.gguf"
    write_stub(stub, Shape("tiny", "llama", 2, 64, 128, 4, 2, N_VOCAB, 2048, tied=True), "F16")
    server.repos["org/tiny"] = {"tiny-F16.gguf": stub.read_bytes()}
    with working(1, quiet=True) as work:
        path = compared_path(None, "hf:org/tiny:F16", None, work)
    assert Path(path).read_bytes() == stub.read_bytes()
