"""Claim: queries and keys whose rows make up for one another's errors, head by head, lose less.

    .venv/bin/python benchmarks/head_feedback.py --model model-f16.gguf --calibrate wikitext2-valid.txt
        --text wikitext2-test.txt [--level Q3_K_M] [--fit-tokens 12288] [--documents 48] [--other texts.txt]

Both files have llama.cpp's types of a level and are fitted to the same tokens, with error feedback across columns; one
also across the rows of each head. Types are not chosen anew, so this is what codes alone are worth. Prints mean KL on
held-out text and shares with paired 95% intervals over documents.
"""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from level_texts import Side, compare, fitting_windows, measuring_texts, parsed, parser_of

from bitladder.describe.windows import WINDOW
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile
from bitladder.files.texts import read_texts
from bitladder.stages import feedback
from bitladder.stages.curvature import kept_curvatures
from bitladder.stages.fidelity import file_candidate
from bitladder.stages.recipe import named_recipe
from bitladder.walk.feedback import FeedbackSettings
from bitladder.walk.sensitivity import Curvatures


def columns_alone(*given: object, **named: object) -> Curvatures:
    """The embedding's curvature, and nothing of heads."""
    return replace(kept_curvatures(*given, **named), heads={})  # type: ignore[arg-type]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--level", default="Q3_K_M")
    parser.add_argument("--fit-tokens", type=int, default=12288)
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--keep", type=Path, default=Path("head-feedback"), help="folder for the files made")
    options = parsed(parser)
    other = read_texts([options.other]) if options.other else ()
    with GgufFile.open(options.model) as source, ExitStack() as stack:
        with LlamaServer(Launch(options.model, n_ctx=WINDOW, threads=1)) as server:
            fitting = fitting_windows(server, source, options.calibrate, options.fit_tokens, 0)
            texts = measuring_texts(server, source, options, other)
        recipe, settings = named_recipe(source, options.level), FeedbackSettings(threads=options.threads)
        sides = []
        for side, found in {"columns alone": columns_alone, "columns and heads": kept_curvatures}.items():
            with patch.object(feedback, "kept_curvatures", found):
                out = options.keep / side.replace(" ", "-")
                made = feedback.write_with_feedback(source, recipe, out, fitting, settings=settings)
            opened = stack.enter_context(GgufFile.open(made.file.path))
            sides.append(Side({"codes": side}, file_candidate(source, opened, threads=options.threads), 0))
        for name, windows in texts.items():
            compare(
                source, sides, windows, name, (18,), of="columns alone", threads=options.threads,
                keep=options.keep / "walks",
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
