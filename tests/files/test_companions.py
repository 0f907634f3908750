"""Tokenizer and configuration beside a checkpoint: copied from a folder, made from a GGUF."""

import json

import pytest

from bitladder.errors import BadInput
from bitladder.files.companions import companions_of_folder, companions_of_gguf, tokenizer_differences
from bitladder.files.gguf import GgufFile

TEXTS = [
    "In 1984 there were 12345 people.",
    "x  =  3.14159; // ok\n\n\tfoo_bar()",
    "Größe: 42 °C, naïve café, 你好",
    "<|im_start|>user\nHi<|im_end|>",
]


def test_a_folders_files_are_copied_without_its_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"bits": 4}}))
    with pytest.raises(BadInput, match="has no tokenizer"):
        companions_of_folder(tmp_path)
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors",
        "modeling_x.py",
    ):
        (tmp_path / name).write_text('{"auto_map": {"AutoTokenizer": "modeling_x.X"}, "kept": 1}')
    (tmp_path / "tokenizer_modeling.py").write_text("")
    found = companions_of_folder(tmp_path)
    assert found.config == {"model_type": "llama"}
    assert set(found.files) == {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    for name in ("tokenizer.json", "generation_config.json"):
        assert json.loads(found.files[name]) == {"kept": 1}


@pytest.mark.model
def test_a_made_tokenizer_splits_as_the_engine_does(demo_gguf, tmp_path):
    from tokenizers import Tokenizer

    from bitladder.engines.base import Launch
    from bitladder.engines.registry import start

    found = companions_of_gguf(demo_gguf, pre="smollm", tied=True)
    tokenizer = Tokenizer.from_str(found.files["tokenizer.json"].decode())
    with start(Launch(demo_gguf, n_ctx=64, threads=1)) as engine:
        ids = {text: list(engine.tokenize(text, add_special=True)) for text in TEXTS}
    with GgufFile.open(demo_gguf) as source:
        template = source.metadata["tokenizer.chat_template"]
    assert {text: tokenizer.encode(text).ids for text in TEXTS} == ids
    assert found.config["architectures"] == ["LlamaForCausalLM"]
    assert not [key for key in found.config if key.startswith("_")]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name, content in found.files.items():
            (tmp_path / folder / name).write_bytes(content)
        (tmp_path / folder / "config.json").write_text(json.dumps(found.config))
    one, two = tmp_path / "one", tmp_path / "two"
    assert tokenizer_differences(one, ids, template=template) == []
    assert tokenizer_differences(two, ids, checkpoint=one) == []
    (two / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert len(tokenizer_differences(two, ids, checkpoint=one)) == len(TEXTS)
    assert tokenizer_differences(two, ids, template=template) == ["its chat template is another"]
    ids["In 1984"] = [1, 2, 3]
    [wrong] = tokenizer_differences(one, ids)
    assert wrong.startswith("token 0 of 'In 1984'")
    (two / "tokenizer.json").write_text("{}")
    assert tokenizer_differences(two, ids, checkpoint=one) == ["it cannot be loaded"]
    assert tokenizer_differences(two, {}) == []
