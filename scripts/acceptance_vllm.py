"""The two sides of scripts/acceptance-vllm.

``expect`` runs in Bitladder's environment: it builds levels of the demo model, decodes each folder with the reader of
``files/checkpoint_check.py`` (which the tests hold against an independent one), puts the weights into transformers'
model in f32, which rounds its inputs where engines round them, and keeps, for every prompt, the most likely
next tokens with their log-probabilities and the greedy answer. ``serve`` runs in vLLM's environment, where Bitladder
is not installed: it loads the folder, asks the same token ids and compares. With ``--refused`` it expects vLLM not to
load the folder, and that the level's notes say so. vLLM computes in bfloat16, so a log-probability may differ by
``TOLERANCE`` on average, or by twice what bfloat16 in transformers moves it: where inputs are rounded to 8
bits, bfloat16 tips many codes. A wrong zero point or nibble order gives differences of many nats.
"""

import argparse
import json
import sys
from pathlib import Path

PROMPTS = (
    "The capital of France is",
    "Water freezes at a temperature of",
    "def add(a, b):\n    return",
    "Once upon a time, in a small village by the sea, there lived",
    "Question: What is 7 + 5? Answer:",
    "Photosynthesis is the process by which plants",
)
TOP, ANSWER, TOLERANCE = 5, 12, 0.15


def expect(folder: Path, levels: list[str]) -> int:
    """Build the levels, and write what transformers says of each into ``folder/LEVEL.json``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from bitladder.describe.windows import text_windows
    from bitladder.files.checkpoint_check import CheckpointReader
    from bitladder.files.demo import fetch_demo
    from bitladder.files.gguf import GgufFile
    from bitladder.files.texts import shipped_texts
    from bitladder.levels.checkpoints import parse_checkpoint
    from bitladder.stages.calibrate import Calibration, Reading

    path = fetch_demo()
    with GgufFile.open(path) as source:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        texts = shipped_texts("calibration")
        windows = text_windows(texts, lambda text: tokenizer(text)["input_ids"], source.model)
        wanted = [parse_checkpoint(level) for level in levels]
        reports = Calibration(source, wanted, Reading(windows[:4]), out_dir=folder, name="demo").run().checkpoints
    for report in reports:
        made = Path(report.path)
        reader = CheckpointReader(made, parse_checkpoint(report.level).format)
        config = AutoConfig.from_pretrained(made)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        names = [name for name in model.state_dict() if "lm_head" not in name]  # the head is the embedding
        weights = {name: torch.from_numpy(reader.weights(name).copy()) for name in names}
        model.load_state_dict(weights, strict=False)
        model.tie_weights()
        for linear in reader.linears():
            if (rounds := reader.input_rounding(linear)) is not None:
                model.get_submodule(linear).register_forward_pre_hook(
                    lambda _, x, rounds=rounds: rounds(x[0].float()).to(x[0].dtype)
                )
        own = AutoTokenizer.from_pretrained(made)
        asked = []
        for prompt in PROMPTS:
            ids = own(prompt)["input_ids"]
            with torch.inference_mode():
                scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(TOP)
                answer = model.generate(torch.tensor([ids]), max_new_tokens=ANSWER, do_sample=False)[0, len(ids) :]
            top = dict(zip(scores.indices.tolist(), scores.values.tolist(), strict=True))
            asked.append({"ids": ids, "top": top, "answer": answer.tolist()})
        model.bfloat16()
        moved = []
        for one in asked:
            with torch.inference_mode():
                scores = model(torch.tensor([one["ids"]])).logits[0, -1].float().log_softmax(-1)
            moved += [abs(float(scores[token]) - value) for token, value in one["top"].items()]
        kept = {
            "path": str(made), "asked": asked, "notes": parse_checkpoint(report.level).format.notes(),
            "bfloat16": sum(moved) / len(moved),
        }  # fmt: skip
        (folder / f"{report.level}.json").write_text(json.dumps(kept))
    return 0


def serve(folder: Path, level: str) -> int:
    """Ask vLLM the same, print the differences; 1 where they are larger than rounding explains."""
    import torch
    from vllm import LLM, SamplingParams, _custom_ops  # noqa: F401 - which loads the kernels for this processor

    if level.startswith(("GPTQ-4", "AWQ-4", "W4")) and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        print(f"{level}: not served: vLLM's build has no 4-bit kernels for this processor; they want AVX-512")
        return 0
    expected = json.loads((folder / f"{level}.json").read_text())
    engine = LLM(model=expected["path"], dtype="bfloat16", enforce_eager=True, max_model_len=640)
    settings = SamplingParams(temperature=0, max_tokens=ANSWER, logprobs=2 * TOP)
    prompts = [{"prompt_token_ids": one["ids"]} for one in expected["asked"]]
    differences, same_first, same_answer = [], 0, 0
    for one, found in zip(expected["asked"], engine.generate(prompts, settings), strict=True):
        served = {token: entry.logprob for token, entry in found.outputs[0].logprobs[0].items()}
        top = {int(token): value for token, value in one["top"].items()}
        differences += [abs(served[token] - top[token]) for token in top if token in served]
        differences += [1.0 for token in top if token not in served]
        same_first += found.outputs[0].token_ids[0] == max(top, key=lambda token: top[token])
        same_answer += list(found.outputs[0].token_ids) == one["answer"][: len(found.outputs[0].token_ids)]
    mean, count = sum(differences) / len(differences), len(prompts)
    allowed = max(TOLERANCE, 2 * expected["bfloat16"])
    print(
        f"{level}: log-probabilities of the {TOP} likeliest next tokens differ by {mean:.3f} on average "
        f"({expected['bfloat16']:.3f} by bfloat16 alone, {allowed:.3f} allowed), "
        f"first token equal for {same_first} of {count} prompts, {ANSWER} tokens for {same_answer}"
    )
    return int(mean > allowed)


def refused(folder: Path, level: str) -> int:
    """Whether vLLM refuses the level, as its notes say; 0 if both."""
    from vllm import LLM

    expected = json.loads((folder / f"{level}.json").read_text())
    try:
        LLM(model=expected["path"], dtype="bfloat16", enforce_eager=True, max_model_len=640)
    except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        warned = any("vLLM" in note for note in expected["notes"])
        said = str(error).strip().splitlines()
        reason = next((line.strip() for line in said if "Value error" in line), said[0])
        print(f"{level}: refused ({reason[:200]}); its notes {'say so' if warned else 'DO NOT SAY SO'}")
        return int(not warned)
    print(f"{level}: loads, although its notes say: {' '.join(expected['notes']) or 'nothing'}")
    return 1


def main() -> int:
    """The command line; the status is that of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=("expect", "serve"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--levels", required=True)
    parser.add_argument("--refused", action="store_true")
    options = parser.parse_args()
    if options.side == "expect":
        return expect(options.folder, options.levels.split(","))
    return (refused if options.refused else serve)(options.folder, options.levels)


if __name__ == "__main__":
    sys.exit(main())
