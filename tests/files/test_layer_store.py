"""Layers of a result in the making: one process at a time, and what is said when they cannot be kept."""

import errno
import os

import pytest
import torch

from bitladder.errors import OutputError
from bitladder.files import layer_store
from bitladder.files.layer_store import LayerStore

LAYER = {"a": torch.ones(2)}


class Store(LayerStore):
    def is_complete(self) -> bool:
        return False


@pytest.mark.parametrize("other", ["made of this", "of something else"])
def test_two_writers_of_one_folder(tmp_path, other):
    first, second = Store(tmp_path / "x", "made of this"), Store(tmp_path / "x", other)
    first.put_layer(0, LAYER, [])
    for begin in (second.begin, lambda: second.put_layer(0, LAYER, [])):
        with pytest.raises(OutputError, match=r"x\.partial is being written by another process"):
            begin()
    assert [one.layer for one in first.finished()] == [0]
    first.close()
    second.begin()
    assert [one.layer for one in second.finished()] == [0] * (other == "made of this")
    assert second.layer_file(0).exists() == (other == "made of this")
    second.discard()
    assert not list(tmp_path.iterdir())
    first.begin()  # whoever lost the folder makes it anew
    first.close()


def test_why_layers_cannot_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        Store(tmp_path / "file" / "x", "made of this").begin()
    assert caught.value.found.endswith("file cannot be written: Not a directory.")
    assert "full" not in caught.value.means
    assert "kept" not in caught.value.do

    plain = layer_store._save

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = Store(tmp_path / "x", "made of this")
    for layer in range(2):
        monkeypatch.setattr(layer_store, "_save", full)
        with pytest.raises(OutputError, match=r"No space left on device\. .* are free there") as caught:
            store.put_layer(layer, LAYER, [])
        assert ("finished layers are kept" in caught.value.do) == (layer == 1)
        monkeypatch.setattr(layer_store, "_save", plain)
        store.put_layer(layer, LAYER, [])
    store.close()
