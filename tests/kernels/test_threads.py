"""Loops over few rows run in one thread, and those after them in as many as before."""

import numba
import pytest

from bitladder.kernels.threads import one_thread


def test_one_thread_inside_and_as_many_as_before_afterwards():
    before = numba.get_num_threads()
    with pytest.raises(ValueError, match="ended"), one_thread():
        assert numba.get_num_threads() == 1
        raise ValueError("ended")
    assert numba.get_num_threads() == before


def test_predicted_losses_of_schemes_are_counted_in_one_thread(monkeypatch):
    from bitladder.stages import schemes

    seen = []
    monkeypatch.setattr(schemes.GPTQ, "apply", lambda *_: seen.append(numba.get_num_threads()) or _Nothing())
    schemes.SchemeChoices([], schemes.Linears((), {}), ["W4A16-g32"]).fed(0, "W4A16-g32", None, _Nothing())
    assert seen == [1]


class _Nothing:
    decoded = prepared = 0

    def costs(self, wrong):
        return wrong
