"""Whether a model's header alone says how its layers compute."""

from __future__ import annotations

from bitladder.describe.model import Model
from bitladder.errors import UnknownArchitecture
from bitladder.formats.families import family_of, walked
from bitladder.formats.families.family import Layers


def layers_of(model: Model) -> Layers:
    """The rows of the model's layers.

    Raises:
        UnknownArchitecture: its family has none.
    """
    layers = family_of(model.dims.architecture).layers_of(model.dims.n_expert)
    if layers is None:
        known = ", ".join(sorted(walked()))
        raise UnknownArchitecture(
            f"No layers are known for the architecture '{model.dims.architecture}'.",
            means="Layers of other families come from transformers, by the config.json that a GGUF file lacks. Without "
            f"it checkpoint levels, error feedback and recipes are made of: {known}. Plans, K-quants, importance, "
            "fidelity and workloads need no layers.",
            do="Give the model's checkpoint folder or hf:org/name instead of the file.",
        )
    return layers
