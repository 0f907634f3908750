"""Names of files that are given by their paths."""

from pathlib import Path

from bitladder.files.names_apart import names_apart


def test_the_shortest_end_of_a_path_that_tells_it_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model-1.5").mkdir()
    given = ["p/a/x.gguf", "p/b/x.gguf", "y.gguf", "y.txt", "q/a/x.gguf", "./y.gguf", "Q8_0.gguf", "model-1.5"]
    assert names_apart(map(Path, given), ["Q8_0"]) == {
        "p/a/x.gguf": Path("p/a/x.gguf"),
        "b/x.gguf": Path("p/b/x.gguf"),
        "y.gguf": Path("y.gguf"),
        "y.txt": Path("y.txt"),
        "q/a/x.gguf": Path("q/a/x.gguf"),
        "Q8_0.gguf": Path("Q8_0.gguf"),
        "model-1.5": Path("model-1.5"),
    }
    assert names_apart([]) == {}
