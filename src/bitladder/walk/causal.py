"""transformers' causal language model of a text configuration, also where transformers has it only inside a model that
sees or hears."""

from __future__ import annotations

from typing import Any

from torch import nn


def class_of(config: Any) -> Any:
    """transformers' class for the configuration: of the whole language model, or of all but its head; None where it has
    neither."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING)
    found = next((one[type(config)] for one in mappings if type(config) in one), None)
    return found[0] if isinstance(found, tuple) else found


def built(config: Any) -> Any:
    """The language model, on whatever device torch makes tensors on.

    Raises whatever transformers does where it has no such model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModel, AutoModelForCausalLM

    options = {"attn_implementation": config._attn_implementation, "trust_remote_code": False}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_MAPPING:
        return AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
    return _with_head(AutoModel.from_config(config, **options))  # type: ignore[no-untyped-call]


def _with_head(base: Any) -> Any:
    """A text model and a linear head on its states: what the classes that see have around it where there is no
    picture."""
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class TextOfLarger(PreTrainedModel):
        """The text model of a larger one, with the head that the larger one has."""

        config_class = type(base.config)
        _supports_sdpa = base._supports_sdpa

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = base
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()  # type: ignore[no-untyped-call]

        def _init_weights(self, module: nn.Module) -> None:
            base._init_weights(module)

        def forward(self, *arguments: Any, **options: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=self.lm_head(self.model(*arguments, **options)[0]))

    return TextOfLarger(base.config)
