"""The evidence store, on SQLite and on a real PostgreSQL server."""

import json
import math
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
import sqlalchemy

from bitladder.errors import BadInput, OutputError
from bitladder.files.folders import data_folder
from bitladder.records.fidelity import Fidelity
from bitladder.records.reading import from_json
from bitladder.store import Evidence, connect
from bitladder.store.evidence import canonical
from bitladder.store.location import store_url
from bitladder.store.migrations import MIGRATIONS, migrate
from ladder_examples import fidelity

KEY = {"source": "ab" * 32, "level": "Q4_K_M", "text": "t1"}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """A store's address: an empty one for every test."""
    if request.param == "sqlite":
        return str(tmp_path / "folder" / "evidence.sqlite")
    server = request.getfixturevalue("postgres").url
    engine = sqlalchemy.create_engine(store_url(server))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS evidence, claims, bitladder_schema")
    engine.dispose()
    return server


def test_what_was_put_is_got(url):
    measured = fidelity("Q4_K_M")
    with Evidence.open(url) as store:
        assert store.get("fidelity", KEY) is None
        store.put("fidelity", KEY, measured)
        again = dict(reversed(KEY.items()))
        assert from_json(Fidelity, store.get("fidelity", again)) == measured
        assert store.get("speed", KEY) is None
        assert store.get("fidelity", KEY | {"text": "t2"}) is None


def test_it_outlives_the_process(url):
    with Evidence.open(url) as store:
        store.put("machine", {"id": 1}, {"cores": 2})
    with Evidence.open(url) as store:
        assert store.get("machine", {"id": 1}) == {"cores": 2}


def test_putting_again_replaces(url):
    with Evidence.open(url) as store:
        store.put("speed", KEY, {"decode": 1.5})
        store.put("speed", KEY, {"decode": 2.5})
        assert [row.value for row in store.find("speed")] == [{"decode": 2.5}]


def test_undefined_is_stored_as_null_not_zero(url):
    with Evidence.open(url) as store:
        store.put("speed", KEY, {"decode": math.nan})
        assert store.get("speed", KEY) == {"decode": None}


def test_find_by_parts_of_the_key_newest_first(url):
    with Evidence.open(url) as store:
        for level in ("Q8_0", "Q6_K", "Q4_K_M"):
            store.put("fidelity", KEY | {"level": level}, {"of": level})
        store.put("fidelity", {"source": "other", "level": "Q6_K"}, {})
        assert [row.key["level"] for row in store.find("fidelity", source=KEY["source"])] == [
            "Q4_K_M",
            "Q6_K",
            "Q8_0",
        ]
        assert [row.value for row in store.find("fidelity", level="Q6_K", text="t1")] == [{"of": "Q6_K"}]
        assert store.find("fidelity", level="Q2_K") == []
        (row,) = store.find("fidelity", level="Q8_0")
        assert row.bitladder
        assert row.host["python"]


def test_many_rows_are_found_in_order_and_counted(url, monkeypatch):
    monkeypatch.setattr("bitladder.store.evidence._AT_ONCE", 3)
    with Evidence.open(url) as store:
        for n in range(10):
            store.put("answer", {"n": n, "even": n % 2 == 0}, n)
        assert [row.value for row in store.find("answer")] == list(reversed(range(10)))
        assert [row.value for row in store.find("answer", even=True)] == [8, 6, 4, 2, 0]
        assert store.count()["answer"] == 10
        assert store.count()["speed"] == 0


def test_an_unknown_kind_is_our_mistake(url):
    with Evidence.open(url) as store, pytest.raises(ValueError, match="kind must be one of"):
        store.put("gossip", {}, {})


def test_export_and_import(url, tmp_path):
    path = tmp_path / "out.jsonl"
    with Evidence.open(url) as store:
        store.put("fidelity", KEY, {"kl": 0.1, "note": "ü\n"})
        store.put("speed", KEY, {"decode": 9})
        assert store.export(path) == 2
    with Evidence.open(str(tmp_path / "other.sqlite")) as other:
        assert other.import_(path) == 2
        assert other.import_(path) == 2
        (row,) = other.find("fidelity")
        assert (row.key, row.value) == (KEY, {"kl": 0.1, "note": "ü\n"})
        other.put("fidelity", KEY, {"kl": 0.2})
        other.import_(path)
        assert other.get("fidelity", KEY) == {"kl": 0.2}, "an older row must not replace a newer one"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("not json", "Line 1 of"),
        ('{"format": "other"}', "Line 1 of"),
        ('{"format": "bitladder-evidence"}\n{"kind": "gossip"}', "Line 2 of"),
    ],
)
def test_a_bad_export_takes_nothing_in(tmp_path, text, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with Evidence.open(str(tmp_path / "e.sqlite")) as store:
        with pytest.raises(BadInput, match=said):
            store.import_(path)
        assert store.find("fidelity") == []


WRITER = """
import sys
from bitladder.store import Evidence
with Evidence.open(sys.argv[1]) as store:
    for n in range(150):
        store.put("speed", {"who": sys.argv[2], "n": n}, {"from": sys.argv[2]})
        store.put("speed", {"who": "both", "n": n}, {"from": sys.argv[2]})
"""


def test_two_processes_writing_at_once_lose_nothing(url):
    """Both make the schema, both write their own rows and the same rows."""
    command = [sys.executable, "-c", WRITER, url]
    writers = [subprocess.Popen([*command, who], stderr=subprocess.PIPE, text=True) for who in ("a", "b")]
    for writer in writers:
        _, stderr = writer.communicate(timeout=60)
        assert writer.returncode == 0, stderr
    with Evidence.open(url) as store:
        for who in ("a", "b", "both"):
            assert {row.key["n"] for row in store.find("speed", who=who)} == set(range(150))
        assert len(store.find("speed")) == 450


def test_first_runs_on_a_server_take_turns(postgres):
    """While one program makes the tables, another that opens the store waits."""
    server = sqlalchemy.create_engine(store_url(postgres.url))
    opened = threading.Thread(target=lambda: Evidence.open(postgres.url).close())
    with server.begin() as connection:
        connect.one_at_a_time(connection)
        opened.start()
        opened.join(timeout=0.5)
        assert opened.is_alive()
    opened.join(timeout=10)
    assert not opened.is_alive()
    server.dispose()


# ---- the schema's history


def oldest_store(url):
    """A database as its first version left it, with a row."""
    engine = sqlalchemy.create_engine(store_url(url))
    with engine.begin() as connection:
        assert migrate(connection, upto=1) == 1
        connection.exec_driver_sql(
            "INSERT INTO evidence (kind, key_hash, key, value, created) VALUES ('speed', "
            "'44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a', '{}', "
            "'{\"decode\": 3}', '2025-01-01')"
        )
    engine.dispose()


def test_the_oldest_schema_is_brought_up_to_date_with_its_data(url, tmp_path):
    (tmp_path / "folder").mkdir()
    oldest_store(url)
    with Evidence.open(url) as store:
        assert store.get("speed", {}) == {"decode": 3}
        (row,) = store.find("speed")
        assert (row.bitladder, row.host) == ("", {})
        store.put("speed", {}, {"decode": 4})
        assert store.get("speed", {}) == {"decode": 4}


def test_from_blank_and_from_oldest_end_in_the_same_schema(tmp_path):
    oldest_store(str(tmp_path / "old.sqlite"))
    schemas = []
    for name in ("old", "new"):
        Evidence.open(str(tmp_path / f"{name}.sqlite")).close()
        with sqlite3.connect(tmp_path / f"{name}.sqlite") as raw:
            schemas.append(raw.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall())
        raw.close()
    assert schemas[0] == schemas[1]


def test_released_migrations_are_never_edited_or_reordered():
    names = ["create_evidence", "add_provenance", "index_by_time", "create_claims"]
    assert [step.__name__ for step in MIGRATIONS] == names


def test_a_store_from_the_future_is_left_alone(url):
    Evidence.open(url).close()
    engine = sqlalchemy.create_engine(store_url(url))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE bitladder_schema SET number = 99")
    engine.dispose()
    with pytest.raises(BadInput, match="schema 99 is newer than 4"):
        Evidence.open(url)


# ---- what can be wrong with a database


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "evidence.sqlite"
    path.write_bytes(b"this is a letter, not a database" * 64)
    with pytest.raises(BadInput, match="is not an evidence store"):
        Evidence.open(str(path))


def test_a_damaged_database(tmp_path):
    path = tmp_path / "evidence.sqlite"
    with Evidence.open(str(path)) as store:
        for n in range(300):
            store.put("speed", {"n": n}, {"text": "x" * 400})
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw.close()
    data = bytearray(path.read_bytes())
    data[4096 : len(data) - 4096] = b"\xff" * (len(data) - 8192)
    path.write_bytes(bytes(data))
    with pytest.raises(BadInput, match="is not an evidence store"), Evidence.open(str(path)) as store:
        store.find("speed")


@pytest.mark.parametrize("column", ["key", "value", "host"])
@pytest.mark.parametrize("text", ["{", "[" * 100_000, "NaN", ""])
def test_a_damaged_measurement(tmp_path, column, text):
    path = tmp_path / "evidence.sqlite"
    with Evidence.open(str(path)) as store:
        store.put("speed", {"n": 1}, {"decode": 1})
    with sqlite3.connect(path) as raw:
        raw.execute(f"UPDATE evidence SET {column} = ?", (text,))
    raw.close()
    with Evidence.open(str(path)) as store:
        with pytest.raises(BadInput, match="holds a measurement that is no JSON"):
            store.find("speed")
        with pytest.raises(BadInput, match="holds a measurement that is no JSON"):
            list(store.lines())
        if column == "value":
            with pytest.raises(BadInput, match="holds a measurement that is no JSON"):
                store.get("speed", {"n": 1})


ROW = {"kind": "speed", "key": {"n": 1}, "value": {}, "created": "2026", "bitladder": "0", "host": {}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting"),
        ("3", "it is no object"),
        ("{}", "'kind' is missing"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(ROW | {"value": "\ud800"}), "half of a surrogate pair"),
        (json.dumps(ROW | {"key": {"\udfff": 1}}), "half of a surrogate pair"),
        (json.dumps(ROW | {"value": math.nan}), "NaN is no JSON"),
        (json.dumps(ROW | {"kind": "mood"}), "kind must be one of"),
    ],
)
def test_an_export_that_is_none(tmp_path, line, message):
    path = tmp_path / "export.jsonl"
    path.write_text(json.dumps({"format": "bitladder-evidence"}) + "\n" + line + "\n")
    with Evidence.open(str(tmp_path / "e.sqlite")) as store, pytest.raises(BadInput, match=rf"Line 2 .*{message}"):
        store.import_(path)


def test_texts_of_any_characters_go_through_an_export(tmp_path):
    value = {"text": "a\u2028b\x85c\u2029 \U0001f600 \x1b[31m\x0b\x1c"}
    with Evidence.open(str(tmp_path / "a.sqlite")) as store:
        store.put("answer", {"n": 1}, value)
        assert store.export(tmp_path / "export.jsonl") == 1
    with Evidence.open(str(tmp_path / "b.sqlite")) as store:
        assert store.import_(tmp_path / "export.jsonl") == 1
        assert store.get("answer", {"n": 1}) == value
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            store.put("answer", {"n": 2}, {"text": "\ud800"})


def test_a_loop_of_links(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((BadInput, OutputError)):
        Evidence.open(str(tmp_path / "loop"))


def test_a_database_that_stays_locked(tmp_path, monkeypatch):
    path = tmp_path / "evidence.sqlite"
    Evidence.open(str(path)).close()
    monkeypatch.setattr(connect, "BUSY_SECONDS", 0.2)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(OutputError, match=r"stayed locked for 0\.2 seconds"):
            Evidence.open(str(path))
    finally:
        holder.close()


def test_a_read_only_database_can_be_read_and_says_so_on_writing(tmp_path):
    path = tmp_path / "evidence.sqlite"
    with Evidence.open(str(path)) as store:
        store.put("speed", {}, {"decode": 1})
    with Evidence.open(f"sqlite:///file:{path}?mode=ro&uri=true") as store:
        assert store.get("speed", {}) == {"decode": 1}
        with pytest.raises(OutputError, match="cannot be written"):
            store.put("speed", {}, {"decode": 2})


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        Evidence.open(str(tmp_path / "file" / "evidence.sqlite"))


def test_a_server_that_does_not_answer(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(BadInput, match="does not answer") as caught:
        Evidence.open(f"postgresql://someone:hunter2@/db?host={tmp_path}")
    assert "hunter2" not in str(caught.value)


def test_an_address_of_another_kind():
    with pytest.raises(BadInput, match="is no place for evidence"):
        Evidence.open("mysql://host/db")


# ---- where it is kept


def test_the_environment_names_folder_and_store(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_DATA", str(tmp_path / "mine"))
    assert data_folder() == tmp_path / "mine"
    assert store_url() == f"sqlite:///{tmp_path / 'mine' / 'evidence.sqlite'}"
    monkeypatch.setenv("BITLADDER_STORE", "postgres://u@h/d")
    assert store_url() == "postgresql+psycopg://u@h/d"
    assert store_url("/x/y.sqlite") == "sqlite:////x/y.sqlite"


def test_canonical_keys():
    assert canonical({"b": 1, "a": [1.0, "é"]}) == '{"a":[1.0,"é"],"b":1}'
    assert canonical({"a": math.inf}) == '{"a":null}'
    assert json.loads(canonical({})) == {}


# ---- claims


def test_one_of_many_gets_a_claim_and_another_when_it_is_given_back(url):
    with Evidence.open(url) as store:
        claims = store.claims()
        taken: list = []
        threads = [threading.Thread(target=lambda: taken.append(claims.take("job"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (lease,) = [one for one in taken if one is not None]
        assert claims.take("other") is not None
        assert claims.held(["job", "other", "third"]) == {"job", "other"}
        claims.release(lease)
        assert claims.held(["job", "other"]) == {"other"}
        assert claims.take("job") is not None


def test_a_claim_of_one_who_died_is_free_when_its_lease_ends_and_is_not_given_back_by_the_dead(url):
    with Evidence.open(url) as store:
        claims = store.claims(lease_s=0.3)
        dead = claims.take("job")
        assert claims.take("job") is None
        time.sleep(0.4)
        assert claims.held(["job"]) == set()
        heir = claims.take("job")
        assert heir is not None
        assert not claims.renew(dead)
        claims.release(dead)
        assert claims.take("job") is None
        assert claims.renew(heir)


def test_who_works_for_longer_than_a_lease_keeps_the_claim(url):
    with Evidence.open(url) as store:
        claims = store.claims(lease_s=0.6)
        with claims.holding("job") as lease:
            assert lease is not None
            for _ in range(6):
                time.sleep(0.2)
                with claims.holding("job") as other:
                    assert other is None
            assert not lease.lost.is_set()
        assert claims.held(["job"]) == set()
        with pytest.raises(KeyError), claims.holding("job"):
            raise KeyError
        assert claims.take("job") is not None
