"""The hash that follows a reader: right, never ahead of it, and gone when nobody wants it."""

import hashlib
import time

import pytest

from bitladder.errors import BadInput
from bitladder.files import following
from bitladder.files.following import FollowingHash
from bitladder.files.hashing import file_sha256, recall


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(following, "_CHUNK", 64)
    paths = [tmp_path / name for name in "abc"]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(range(number, number + 200)))
    return paths


def digests(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_hashes_are_right_however_one_advances(files):
    follower = FollowingHash(files)
    for goal in [(0, 10), (0, 150), (0, 20), (1, 1), (2, 199)]:
        follower.advance(*goal)
    assert follower.result() == digests(files)
    assert [recall(path) for path in files] == digests(files)


def test_what_a_reader_gives_is_not_read_again(files, monkeypatch):
    """Pieces with gaps between them, another file's bytes in their places: only what was left out is read."""
    wanted = digests(files)
    contents = [path.read_bytes() for path in files]
    read = FollowingHash._next
    asked = []

    def noted(self, number, at):
        found = read(self, number, at)
        if isinstance(found, int):
            asked.append((number, at))
        return found

    monkeypatch.setattr(FollowingHash, "_next", noted)
    monkeypatch.setattr(following, "_HELD", 2)
    follower = FollowingHash(files)
    for number, content in enumerate(contents):
        for start, end in [(16, 80), (80, 100), (130, 200)]:
            follower.feed(number, start, memoryview(content)[start:end])
        follower.advance(number + 1, 0)
    assert follower.result() == wanted
    gaps = [(number, at) for number in range(3) for at in (0, 100, 200)]
    assert asked == gaps
    known = FollowingHash(files)
    for _ in range(10):
        known.feed(0, 0, memoryview(b"of a known file"))
    assert known.result() == wanted


def test_a_reader_does_not_wait_for_who_has_given_up(files, monkeypatch):
    monkeypatch.setattr(following, "_HELD", 1)
    follower = FollowingHash(files)
    files[1].unlink()
    for _ in range(5):
        follower.feed(2, 0, memoryview(bytes(10)))
    with pytest.raises(BadInput):
        follower.result()


def test_what_is_known_is_not_read_again(files, monkeypatch):
    wanted = FollowingHash(files).result()
    monkeypatch.setattr(FollowingHash, "_hash", lambda *_: pytest.fail("a known file is hashed"))
    assert FollowingHash(files).result() == wanted


def test_it_stays_behind_the_reader(files):
    follower = FollowingHash(files)
    follower.advance(0, 100)
    time.sleep(0.05)
    assert follower._next(0, 90) == 10
    assert recall(files[0]) is None
    follower.advance(1, 1)
    deadline = time.monotonic() + 10
    while recall(files[0]) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert recall(files[1]) is None
    follower.abandon()
    assert recall(files[1]) is None


def test_a_file_that_cannot_be_read(files):
    follower = FollowingHash(files)
    files[1].unlink()
    with pytest.raises(BadInput, match="The source cannot be read"):
        follower.result()


def test_a_file_that_changes_meanwhile_is_not_remembered(files):
    """By neither of both who hash: what they have read of it may be gone."""
    follower = FollowingHash(files)
    files[1].write_bytes(bytes(200))
    with pytest.raises(BadInput, match="changed while it was read"):
        follower.result()
    assert [recall(path) is not None for path in files] == [True, False, True]

    files[1].write_bytes(bytes(range(200)))

    def meddle(*_):
        files[1].write_bytes(bytes(200))

    found = file_sha256(files[1], meddle)
    assert found == hashlib.sha256(bytes(range(200))).hexdigest()
    assert recall(files[1]) is None
    assert file_sha256(files[1]) == hashlib.sha256(bytes(200)).hexdigest() == recall(files[1])
