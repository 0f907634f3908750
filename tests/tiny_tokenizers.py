"""Small tokenizers of tiny checkpoints, trained on the text of the licence, of the two kinds that converters read."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bitladder.files.converter import find_converter

TEXT = Path(__file__).parents[1] / "LICENSE"
N_TOKENS = 512
N_RESERVED = 3
"""<unk>, <s>, </s>; then 256 bytes, in a tokenizer of sentencepiece."""
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen 2's tokenizer splits a text."""


def write_bytes(folder: Path, added: Sequence[str] = ()) -> int:
    """A byte-level ``tokenizer.json`` that splits as Qwen 2's does; returns how many tokens there are.

    No converter knows its tokens: see ``converter_that_knows``. ``added``: control tokens after the vocabulary.
    """
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_QWEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS, initial_alphabet=alphabet, special_tokens=[*control], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.read_text().splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([*added])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {tokenizer.token_to_id(token): token for token in (*control, *added)}
    _write_settings(
        folder, special, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": control[1], "eos_token": control[2]}
    )
    return tokenizer.get_vocab_size()


def write_pieces(folder: Path, added: Sequence[str] = ()) -> int:
    """``tokenizer.model``, and ``tokenizer.json`` with the same tokens and merges; returns how many tokens there are.

    ``added``: control tokens after the vocabulary.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.read_text().splitlines()), model_writer=model, model_type="bpe", num_threads=1,
        vocab_size=N_TOKENS, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
    control = {**dict(enumerate(pieces[:N_RESERVED])), **dict(enumerate(added, len(pieces)))}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": text, **_FLAGS} for token, text in control.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: token for token, text in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    _write_settings(
        folder,
        control,
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
    return len(pieces) + len(added)


def _write_settings(folder: Path, special: Mapping[int, str], settings: Mapping[str, Any]) -> None:
    decoder = {str(token): {"content": text, **_FLAGS} for token, text in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": decoder}))


def _merges(pieces: Sequence[str]) -> list[list[str]]:
    """Pairs of tokens that make another one; pieces that were learnt first come first."""
    known = {piece: token for token, piece in enumerate(pieces) if token >= N_RESERVED + 256}
    pairs = []
    for piece in known:
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        whole = [pair for pair in halves if all(half in known for half in pair)]
        pairs += sorted(whole, key=lambda pair: (known[pair[0]], known[pair[1]]))
    return [list(pair) for pair in pairs]


def converter_that_knows(folder: Path) -> Path:
    """A copy of the engine's converter in ``folder`` that takes byte-level tokenizers it does not know for Qwen 2's.

    Converters know such a tokenizer by a hash over the tokens of a text, so that no other vocabulary than a released
    one, of 50,000 tokens and more, would be known.
    """
    shutil.copytree(find_converter().folder, folder)
    base = folder / "conversion" / "base.py"
    before, after = "        res = None\n", '        res = "qwen2"\n'
    text = base.read_text()
    assert text.count(before) == 1
    base.write_text(text.replace(before, after))
    return folder
