"""A model as the walk computes it, from token ids to logits."""

import numpy as np
import torch

import tiny_families
from bitladder.walk.layers import LayeredModel
from bitladder.walk.weights import FileWeights


def some_tokens(windows: int = 2, n: int = 21) -> np.ndarray:
    return np.random.default_rng(3).integers(0, tiny_families.N_VOCAB, (windows, n))


def logits_of(model: LayeredModel, weights: FileWeights, tokens: np.ndarray) -> torch.Tensor:
    """As the walk computes them."""
    states = model.embed(tokens, weights)
    for layer in range(model.n_layer):
        states = model.run(model.layer(layer, weights), layer, states)
    with torch.inference_mode():
        bias = None if model.head_bias is None else torch.from_numpy(model.head_bias)
        normed = model.norm(weights)(states)
        logits = torch.nn.functional.linear(normed, torch.from_numpy(weights(model.output)), bias)
        return torch.tanh(logits / model.logit_softcap) * model.logit_softcap if model.logit_softcap else logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor, share: float = 1e-4) -> None:
    assert float((found - wanted).abs().max()) <= share * float(wanted.abs().max())
