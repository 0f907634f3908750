"""Nothing of the user's is overwritten unasked, whatever verb writes and however the file is spelled."""

import ast
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.errors import OutputError, UsageError
from bitladder.files import atomic, vector_file
from bitladder.files.atomic import put_in_place, write_whole, written_aside
from bitladder.files.folders import cache_key
from bitladder.files.gguf import GgufFile
from bitladder.files.gguf_header import read_file_header
from bitladder.files.imatrix import ImportanceMatrix, made_from, write_imatrix
from bitladder.files.outputs import check_output, holding, same_text
from bitladder.files.vector_file import VectorFile
from bitladder.report import check_html, check_run, report_beside, write_html, write_run
from bitladder.serve.limits import add_key
from bitladder.stages.write_levels import quantize_levels
from bitladder.store.evidence import Evidence
from gguf_bytes import tiny_weights, write_model
from ladder_examples import run_record

PROMPTFOO = "prompts: ['Say {{x}}']\ntests:\n  - vars: {x: tea}\n    assert: [{type: contains, value: tea}]\n"
BY_HAND = "inputs:\n  - id: a\n    prompt: Hi\n    expect: {exact: hi}\n"


def bitladder(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    result = bitladder(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


# ---------------------------------------------------------------- the decision


def _plain(folder: Path, file: Path) -> Path:
    return file


def _symlink(folder: Path, file: Path) -> Path:
    (folder / "link").symlink_to(file)
    return folder / "link"


def _hard_link(folder: Path, file: Path) -> Path:
    os.link(file, folder / "hard")
    return folder / "hard"


def _roundabout(folder: Path, file: Path) -> Path:
    (folder / "sub").mkdir()
    return folder / "sub" / ".." / file.name


def _folder_link(folder: Path, file: Path) -> Path:
    (folder / "elsewhere").symlink_to(folder)
    return folder / "elsewhere" / file.name


@pytest.mark.parametrize("spelled", [_plain, _symlink, _hard_link, _roundabout, _folder_link])
@pytest.mark.parametrize("force", [None, False, True])
def test_an_input_is_never_an_output(tmp_path, spelled, force):
    source = tmp_path / "mine.yaml"
    source.write_text("mine")
    with pytest.raises(UsageError, match="over its own source"):
        check_output(spelled(tmp_path, source), "a workload", inputs=[source], ours=same_text("mine"), force=force)


def test_what_is_there_stays_unless_it_is_ours_or_given_up(tmp_path):
    there, new = tmp_path / "there.txt", tmp_path / "new" / "folder" / "file.txt"
    check_output(new, "a report", force=None)
    there.write_text("written by hand")
    with pytest.raises(UsageError, match="exists, and is not a report") as error:
        check_output(there, "a report", ours=holding("Bitladder"))
    assert "--force" not in str(error.value)
    with pytest.raises(UsageError, match="--force"):
        check_output(there, "a report", ours=holding("Bitladder", ""), force=False)
    check_output(there, "a report", force=True)
    check_output(there, "a report", ours=holding("by", "hand"))
    with pytest.raises(UsageError, match="is not a report"):
        check_output(there, "a report", ours=holding("by hand", ""))  # a source without a hash is no source


def test_folders_devices_links_to_nothing_and_standard_output(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path, "a report", force=True)
    with pytest.raises(UsageError, match="no ordinary file"):
        check_output(Path("/dev/null"), "a report", force=True)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UsageError, match="a link to something that is not there"):
        check_output(tmp_path / "dangling", "a report", force=False)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="a link to something"):
        check_output(tmp_path / "loop", "a report", inputs=[tmp_path / "dangling"])
    with pytest.raises(UsageError, match="standard output"):
        check_output(Path("-"), "a report")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="no folder"):
        check_output(tmp_path / "file" / "x", "a report")


# ---------------------------------------------------------------- the writing


def test_a_file_is_written_through_no_link_and_keeps_its_permissions(tmp_path, monkeypatch):
    secret, target = tmp_path / "secret", tmp_path / "out.txt"
    secret.write_text("secret")
    target.symlink_to(secret)
    write_whole(target, "new")
    assert (secret.read_text(), target.read_text(), target.is_symlink()) == ("secret", "new", False)
    target.chmod(0o600)
    write_whole(target, "newer")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    before = os.umask(0o027)
    write_whole(tmp_path / "fresh", "x")
    os.umask(before)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640
    # even if somebody guesses the name that it has while it grows
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".guessed.part").symlink_to(secret)
    with pytest.raises(OutputError):
        write_whole(target, "stolen")
    assert (secret.read_text(), target.read_text()) == ("secret", "newer")


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_aside(target) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.txt"]
    assert target.read_text() == "old"


def _in_order(monkeypatch):
    """What is flushed and renamed from now on, by name, in order."""
    done, fsync, replace = [], os.fsync, Path.replace

    def flushed(handle):
        done.append(f"flush {Path(f'/proc/self/fd/{handle}').readlink().name}")
        fsync(handle)

    def renamed(self, target):
        done.append(f"rename {Path(target).name}")
        return replace(self, target)

    monkeypatch.setattr(atomic.os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    return done


def test_no_rename_outruns_the_contents_nor_is_lost(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "made" / "inner").mkdir(parents=True)
    for name in ("made/inner/a", "made/b", "old", "new"):
        (home / name).write_text(name)
    (home / "made" / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(home)
    done = _in_order(monkeypatch)
    put_in_place(home / "made", home / "folder")
    assert set(done[:-2]) == {"flush made", "flush inner", "flush a", "flush b"}
    assert done[-2:] == ["rename folder", "flush home"]
    done.clear()
    put_in_place(tmp_path / "link" / "new", tmp_path / "link" / "old")
    assert (done, (home / "old").read_text()) == (["flush new", "rename old", "flush home"], "new")
    done.clear()
    write_whole(home / "old", "newer")
    assert done[1:] == ["rename old", "flush home"]
    assert done[0].endswith(".part")
    with pytest.raises(OSError):
        put_in_place(home / "old", home / "folder")  # no file takes a folder's place
    assert (home / "folder" / "b").read_text() == "made/b"


def test_a_cached_things_name_changes_with_whatever_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path))
    parts = ("1", "ab", "c", b"\xff", "")
    others = [("1", "a", "bc", b"\xff", ""), parts[:-1], (*parts, ""), ("1", "c", "ab", b"\xff", ""), ("1", "abc")]
    assert cache_key(*parts) == cache_key(*parts)
    assert len({cache_key(*one) for one in (parts, *others)}) == 6
    names = {VectorFile(*("AWQ-Q4_K_M", "source", "text"), settings).target for settings in ("", "128")}
    monkeypatch.setattr(vector_file, "REVISION", "later")  # folds are found with the kernels' rounding
    names.add(VectorFile("AWQ-Q4_K_M", "source", "text").target)
    assert len(names) == 3


def test_only_one_module_renames(tmp_path):
    """Whatever is kept takes its name in ``files/atomic.py``: every other `replace` is one of text, or of a record."""
    found = {}
    for path in Path(atomic.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name, owner = node.func.attr, ast.unparse(node.func.value)
                moves = name == "rename" or (name == "replace" and (len(node.args) == 1 or owner == "os"))
                if moves and not node.keywords:
                    found.setdefault(path.name, []).append(ast.unparse(node))
    assert found.pop("atomic.py") == ["made.replace(path)"]
    assert found.pop("checkpoint_folder.py") == [
        "self.target.replace(self.partial / 'replaced')",  # out of the way
        "self.layer_file(layer).replace(ready / name)",  # within the folder in the making
    ]
    found.pop("compiled.py", None)  # kernels see no files; what they keep has its own hash
    assert found == {}


@pytest.mark.parametrize("suffix", [".partial", ".partial.journal"])
@pytest.mark.parametrize("link", ["symbolic", "dangling", "hard"])
def test_a_level_in_the_making_is_written_through_no_link(tmp_path, suffix, link):
    model = write_model(tmp_path / "m-F16.gguf", tiny_weights())
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    trap = out / f"m-Q8_0.gguf{suffix}"
    if link != "dangling":
        victim.write_text("of the user")
    if link == "hard":
        os.link(victim, trap)
    else:
        trap.symlink_to(victim)
    with GgufFile.open(model) as source:
        if suffix == ".partial":
            with pytest.raises(OutputError, match="is a link"):
                quantize_levels(source, ["Q8_0"], out)
            assert os.path.lexists(trap)
        else:
            quantize_levels(source, ["Q8_0"], out)
    assert victim.exists() == (link != "dangling")
    assert link == "dangling" or victim.read_text() == "of the user"


# ---------------------------------------------------------------- verbs


def test_levels_of_another_source_stay(tmp_path):
    """Two files of one name from two folders, and a level that somebody downloaded."""
    mine = write_model(tmp_path / "a" / "m-F16.gguf", tiny_weights()) if (tmp_path / "a").mkdir() is None else None
    (tmp_path / "b").mkdir()
    other = write_model(tmp_path / "b" / "m-F16.gguf", tiny_weights(seed=1))
    quick = ("--imatrix", "none", "--effort", "fast", "--threads", "1")
    assert bitladder("quantize", mine, "--to", "Q8_0", "--out", tmp_path / "out", *quick).exit_code == 0
    made = tmp_path / "out" / "m-Q8_0.gguf"
    before = made.read_bytes()
    message = refused("quantize", other, "--to", "Q8_0", "--out", tmp_path / "out", *quick)
    assert "is not Q8_0 made from the same source" in message
    assert made.read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["m-Q8_0.gguf"]
    # its own file it may make again, by another method, too
    assert bitladder("quantize", mine, "--to", "Q8_0", "--out", tmp_path / "out", *quick[:2]).exit_code == 0
    assert bitladder("quantize", other, "--to", "Q8_0", "--out", tmp_path / "out", *quick, "--force").exit_code == 0
    assert made.read_bytes() != before
    # a level made of a level takes nobody's place: not the source's, not that of what its source was made from
    level = before
    (tmp_path / "a" / "m-Q8_0.gguf").write_bytes(level)
    kept = mine.read_bytes()
    for to in ("F16", "Q8_0"):
        refused("quantize", tmp_path / "a" / "m-Q8_0.gguf", "--to", to, "--out", tmp_path / "a", *quick)
    assert (mine.read_bytes(), (tmp_path / "a" / "m-Q8_0.gguf").read_bytes()) == (kept, level)


def test_parts_of_a_level_that_a_kill_left_are_made_again_and_others_stay(tmp_path):
    model = write_model(tmp_path / "m-F16.gguf", tiny_weights())
    out = tmp_path / "out"
    with GgufFile.open(model) as source:
        (made,) = quantize_levels(source, ["Q8_0"], out, split_max_bytes=30_000)
        parts = sorted(out.iterdir())
        assert len(parts) > 2
        whole = [part.read_bytes() for part in parts]
        made.path.unlink()  # the first part gets its name last
        quantize_levels(source, ["Q8_0"], out, split_max_bytes=30_000)
        assert [part.read_bytes() for part in parts] == whole
        made.path.unlink()
        parts[1].write_bytes(b"of the user")
        with pytest.raises(UsageError, match="00002-of"):
            quantize_levels(source, ["Q8_0"], out, split_max_bytes=30_000)
    assert parts[1].read_bytes() == b"of the user"


def test_imatrix_refuses_the_model_and_what_is_no_matrix_of_it(tmp_path):
    model = write_model(tmp_path / "m-F16.gguf", tiny_weights())
    before = model.read_bytes()
    text = tmp_path / "t.txt"
    text.write_text("The harbour was quiet, and a few boats lay at the pier. " * 30)
    os.link(model, tmp_path / "hard.gguf")
    for out in (model, tmp_path / "hard.gguf"):
        assert "over its own source" in refused("imatrix", model, "--out", out, "--text", text, "--force")
    assert "over its own source" in refused("imatrix", model, "--out", text, "--text", text)
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert "is not an importance matrix" in refused("imatrix", model, "--out", notes, "--text", text)
    matrix = ImportanceMatrix({"a": np.ones((1, 4), np.float32)}, {"a": np.ones(1, np.float32)})
    write_imatrix(tmp_path / "theirs.gguf", matrix)
    assert "--force" in refused("imatrix", model, "--out", tmp_path / "theirs.gguf", "--text", text)
    write_imatrix(tmp_path / "ours.gguf", matrix, source_sha256="ab")
    assert made_from(tmp_path / "ours.gguf", "ab")
    assert not made_from(tmp_path / "ours.gguf", "cd")
    assert not made_from(tmp_path / "theirs.gguf", "")
    assert not made_from(model, "ab")
    assert (model.read_bytes(), notes.read_text()) == (before, "mine")


def test_workload_import(tmp_path, monkeypatch):
    source, mine, new = tmp_path / "p.yaml", tmp_path / "workload.yaml", tmp_path / "new.yaml"
    source.write_text(PROMPTFOO)
    mine.write_text(BY_HAND)
    table = tmp_path / "w.csv"
    table.write_text("prompt,expected\nA?,b\n")
    monkeypatch.chdir(tmp_path)
    assert "over its own source" in refused("workload", "import", source, "--out", source)
    assert "over its own source" in refused("workload", "import", table, "--out", tmp_path / "." / "w.csv", "--force")
    assert "workload.yaml exists" in refused("workload", "import", source)
    assert (source.read_text(), mine.read_text()) == (PROMPTFOO, BY_HAND)
    for _ in range(2):  # the same again is no loss
        assert bitladder("workload", "import", source, "--out", new).exit_code == 0
    new.write_text(new.read_text() + "# my own remark\n")
    refused("workload", "import", source, "--out", new)
    assert bitladder("workload", "import", source, "--out", new, "--force").exit_code == 0
    assert "remark" not in new.read_text()


def test_evidence_export(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with Evidence.open() as store:
        store.put("file", {"a": 1}, {"b": 2})
        database = store.files()[0]
    assert "is not an export" in refused("evidence", "export", notes)
    assert "over its own source" in refused("evidence", "export", database, "--force")
    assert notes.read_text() == "mine"
    backup = tmp_path / "backup.jsonl"
    for _ in range(2):
        assert bitladder("evidence", "export", backup).exit_code == 0
    shown = bitladder("evidence", "export", "-")
    assert shown.stdout == backup.read_text()
    lines = backup.read_text().splitlines()
    other = json.loads(lines[1]) | {"key": {"a": 2}}
    backup.write_text("\n".join([*lines, json.dumps(other)]) + "\n")
    kept = backup.read_text()
    assert "is not an export" in refused("evidence", "export", backup)  # it holds what the store lacks
    assert backup.read_text() == kept
    assert bitladder("evidence", "export", backup, "--force").exit_code == 0


def test_reports_and_records(tmp_path):
    record = run_record()
    run_json = write_run(record, tmp_path / "run.json")
    assert bitladder("report", run_json).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["report.html", "run.json"]
    assert bitladder("report", run_json).exit_code == 0  # its own may be written again
    assert "over its own source" in refused("report", run_json, "--out", run_json)
    notes = tmp_path / "notes.html"
    notes.write_text("<!doctype html> my notes on Bitladder")
    assert "is not a report" in refused("report", run_json, "--out", notes)
    assert bitladder("report", run_json, "--out", notes, "--force").exit_code == 0
    assert report_beside(tmp_path / "mine.json") == tmp_path / "mine.html"
    sha = record.source.sha256
    check_run(run_json, source_sha256=lambda: sha)
    check_html(tmp_path / "report.html", source_sha256=lambda: sha)
    check_html(tmp_path / "report.html", source_sha256=lambda: sha, created=record.created)
    with pytest.raises(UsageError, match="is not a run's record"):
        check_run(run_json, source_sha256=lambda: "f" * 64)
    with pytest.raises(UsageError, match="is not a report"):
        check_html(tmp_path / "report.html", source_sha256=lambda: "f" * 64)
    with pytest.raises(UsageError, match="is not a report"):  # of a later run of the same model
        check_html(tmp_path / "report.html", source_sha256=lambda: sha, created="2031-01-01T00:00:00+00:00")


def test_run_refuses_another_models_folder_before_any_work(tmp_path):
    model = write_model(tmp_path / "m-F16.gguf", tiny_weights())
    out = tmp_path / "out"
    write_html(run_record(), out / "report.html")
    before = (out / "report.html").read_bytes()
    message = refused("run", model, "--levels", "Q8_0", "--out", out)
    assert "is not a report made from the same source" in message
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_bytes() == before


def test_a_gate_keeps_its_junit_document_from_what_is_the_users(tmp_path):
    notes = tmp_path / "notes.xml"
    notes.write_text("<notes/>")
    message = refused("gate", tmp_path / "m.gguf", "--levels", "Q8_0", "--junit", notes)
    assert "is not a JUnit document" in message


def test_a_key_file_behind_a_link_keeps_link_and_permissions(tmp_path):
    real, link = tmp_path / "real", tmp_path / "keys"
    link.symlink_to(real)
    add_key(link, "first")
    real.chmod(0o600)
    add_key(link, "second")
    assert link.is_symlink()
    assert len(real.read_text().splitlines()) == 2
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    (tmp_path / "notes").write_text("mine")
    refused("key", "me", "--file", tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_modelfiles(tmp_path):
    model = write_model(tmp_path / "m-F16.gguf", tiny_weights())
    both = ("--quality", model, "--ctx", "128", "--threads", "1", "--folder", tmp_path)
    for _ in range(2):
        result = bitladder("export", model, "--to", "ollama", *both)
        assert result.exit_code == 0, result.output
    (modelfile,) = tmp_path.glob("Modelfile-*")
    modelfile.write_text(modelfile.read_text() + "PARAMETER temperature 0\n")
    kept = modelfile.read_text()
    assert "--force" in refused("export", model, "--to", "ollama", *both)
    assert modelfile.read_text() == kept


def test_the_header_says_nothing_new_of_a_source_in_floats(tmp_path):
    model = write_model(tmp_path / "m-F16.gguf", tiny_weights())
    with GgufFile.open(model) as source:
        (made,) = quantize_levels(source, ["Q8_0"], tmp_path / "out")
    own = sorted(key for key in read_file_header(made.path).metadata if key.startswith("bitladder."))
    assert own == [f"bitladder.{key}" for key in ("method", "recipe", "source", "source_sha256", "version")]
