"""GPTQ as the paper writes it (arXiv:2210.17323, algorithm 1, without blocks): the Cholesky factor of the
inverse, float64, slow.

Independent of bitladder.kernels.gptq, which never inverts: the two must choose the same codes.
"""

import numpy as np


def textbook_gptq(weights, hessian, scales, zeros, bits, damp, act_order):
    """Codes int[rows, columns] for one group per row."""
    weights = weights.astype(np.float64).copy()
    hessian = hessian.astype(np.float64).copy()
    columns = weights.shape[1]
    hessian[np.diag_indices(columns)] += damp * np.diagonal(hessian).mean()
    order = np.argsort(-np.diagonal(hessian), kind="stable") if act_order else np.arange(columns)
    weights, hessian = weights[:, order], hessian[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    scale, zero = scales[:, 0].astype(np.float64), zeros[:, 0]
    codes = np.empty(weights.shape, np.int64)
    for k in range(columns):
        code = np.clip(np.rint(weights[:, k] / scale) + zero, 0, 2**bits - 1)
        error = (weights[:, k] - (code - zero) * scale) / upper[k, k]
        weights[:, k:] -= np.outer(error, upper[k, k:])
        codes[:, k] = code
    back = np.empty_like(codes)
    back[:, order] = codes
    return back
