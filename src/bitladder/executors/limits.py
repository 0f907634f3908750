"""How many threads a unit's arithmetic has: part of what its bytes follow from, so the same wherever it is computed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

_held: list[Limits] = []


@dataclass(frozen=True)
class Limits:
    """Of a process. Kernels of ours give the same bytes with any number of threads; products of matrices do not."""

    threads: int
    """Of torch."""
    blas: int
    """Of the library that numpy and scipy multiply with; 0 where nobody can tell."""

    @classmethod
    def here(cls) -> Limits:
        """Those of this process."""
        import numpy as np
        import torch

        np.linalg.norm(np.eye(2))  # the library is there from now on
        return cls(torch.get_num_threads(), _blas())

    def hold(self) -> None:
        """Make them this process's, which must not be anybody else's."""
        if _held == [self]:
            return
        import numba
        import torch

        torch.set_num_threads(self.threads)
        with suppress(ValueError):  # more than numba was started with
            numba.set_num_threads(self.threads)
        if self.blas and _blas() not in (0, self.blas):
            import threadpoolctl

            threadpoolctl.threadpool_limits(self.blas, user_api="blas")
        _held[:] = [self]


def _blas() -> int:
    """The most that any such library has."""
    try:
        import scipy.linalg  # noqa: F401
        import threadpoolctl
    except ImportError:
        return 0
    return max(
        (int(one["num_threads"]) for one in threadpoolctl.threadpool_info() if one["user_api"] == "blas"), default=0
    )
