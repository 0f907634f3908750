"""The texts that ship: enough of them, and nothing to calibrate on that is measured on."""

from importlib import resources

from bitladder.files.texts import shipped_texts


def runs(text: str, n: int = 6) -> set[tuple[str, ...]]:
    """Every run of n words."""
    words = text.split()
    return {tuple(words[at : at + n]) for at in range(len(words) - n + 1)}


def test_no_run_of_words_is_both_measured_and_calibrated_on():
    measured = set().union(*(runs(document.text) for document in shipped_texts("texts")))
    for folder, least in (("calibration", 4000), ("calibration/wide", 20000)):
        fitted = set().union(*(runs(document.text) for document in shipped_texts(folder)))
        assert len(measured) > 4000
        assert len(fitted) > least
        assert not measured & fitted
    wide = shipped_texts("calibration/wide")
    assert not {one.name for one in wide} & {one.name for one in shipped_texts("calibration")}
    assert all(2000 < len(one.text.encode()) < 4000 for one in wide)


def test_measuring_text_has_documents_enough_for_intervals():
    documents = shipped_texts("texts")
    assert len(documents) == 12
    assert all(len(document.text) > 1500 for document in documents)


def test_each_folder_says_where_its_texts_come_from():
    for folder in ("texts", "calibration"):
        readme = (resources.files("bitladder") / "data" / folder / "README.md").read_text(encoding="utf-8")
        assert "Apache-2.0" in readme
