"""The commands whose products are golden: ``$S`` is the folder of sources, ``$O`` the command's own output
folder, ``$R`` the one above it."""

from __future__ import annotations

from dataclasses import dataclass

from models import FAMILIES

PLAIN = "F16,BF16,Q8_0,Q6_K,Q5_1,Q5_0,Q5_K_M,Q5_K_S,Q4_1,Q4_0,Q4_K_M,Q4_K_S,Q3_K_L,Q3_K_M,Q3_K_S,Q2_K,IQ4_NL,IQ4_XS,F32"
"""Every recipe that `quantize --to` knows."""
CHECKPOINTS = (
    "GPTQ-4bit-g64,GPTQ-2bit-g32,GPTQ-3bit-g64-asym,GPTQ-8bit-row,GPTQ-4bit-g128-v2,GPTQ-4bit-g64-ct,GPTQ-4bit-g32-asym-ct,"
    "AWQ-4bit-g64,AWQ-4bit-g32-sym,AWQ-4bit-g128-ct,AWQ-4bit-g32-sym-ct,INT8-W8A16,INT8-W8A8,INT8-W8A8-smooth"
)
"""Every method, layout and option of a checkpoint's name."""
MEASURING = "--text $S/measuring-0.txt --text $S/measuring-1.txt --text $S/measuring-2.txt"
CALIBRATION = "--text $S/calibration.txt"
RUN = f"--workload $S/workload.yaml {MEASURING} --ctx 512 --out $O/run"


@dataclass(frozen=True)
class Command:
    """One call of the command line. ``calibrated``: another processor may round its bytes otherwise. ``tested``: part
    of the tests; the others are too slow for every day, and run when two checkouts are compared."""

    name: str
    words: str
    calibrated: bool = False
    tested: bool = True

    @property
    def folder(self) -> str:
        """What is called ``$O``, beneath ``$R``."""
        return self.name.replace(" ", "-")


def commands() -> list[Command]:
    """In the order in which they run; later ones may read what earlier ones wrote."""
    found = []
    for family in FAMILIES:
        model, importance = f"$S/{family}.gguf", f"$S/{family}-importance"
        found += [
            Command(f"plain {family}", f"quantize {model} --to {PLAIN} --imatrix none --out $O"),
            Command(f"weighed {family}", f"quantize {model} --to {PLAIN} --imatrix {importance}.gguf --out $O"),
            Command(
                f"figures {family}", f"measure {model} --imatrix none {MEASURING}"
                + ("" if family == "llama" else " --levels Q8_0,Q4_K_M,Q2_K"), calibrated=True,
                tested=family in ("llama", "gemma3", "qwen3moe"),
            ),
            Command(
                f"imatrix {family}", f"imatrix {model} {CALIBRATION} --out $O/made.gguf", calibrated=True,
                tested=family in ("llama", "mixtral", "gemma3"),
            ),
            Command(
                f"fitted {family}", f"quantize {model} --to GPTQ-Q4_K_M,AWQ-Q4_K_M {CALIBRATION} --out $O",
                calibrated=True, tested=False,
            ),
            Command(
                f"checkpoints {family}",
                f"quantize {model} --to GPTQ-4bit-row,INT8-W8A8 {CALIBRATION} --out $O"
                if family in ("qwen3moe",)
                else f"quantize {model} --to GPTQ-4bit-g32,AWQ-4bit-g32,INT8-W8A8-smooth {CALIBRATION} --out $O",
                calibrated=True, tested=False,
            ),
        ]  # fmt: skip
    llama, importance = "$S/llama.gguf", "$S/llama-importance"
    small = "$S/small.gguf"
    judged = f"--imatrix {importance}.gguf --bar 'kl < 0.1' {RUN}"
    recipe = f"recipe {small} {CALIBRATION} --effort fast"
    return [
        *found,
        *(
            Command(f"{effort} llama", f"quantize {llama} --to Q6_K,Q4_K_M,Q4_0,Q2_K --effort {effort} "
                    f"--imatrix {importance}.gguf --out $O")
            for effort in ("fast", "best")
        ),
        Command("old kind of matrix", f"quantize {llama} --to Q4_K_M --imatrix {importance}.dat --out $O"),
        Command("split", f"quantize {llama} --to Q8_0,Q4_K_M --imatrix none --split-max-size 600KB --out $O"),
        Command("old matrix written", f"imatrix {small} {CALIBRATION} --out $O/made.dat", True, tested=False),
        Command("all checkpoints", f"quantize {small} --to {CHECKPOINTS} {CALIBRATION} --out $O", calibrated=True),
        Command("folded", f"quantize {small} --to AWQ-Q4_K_M,AWQ-Q2_K {CALIBRATION} --out $O", calibrated=True),
        Command("matrix by itself", f"quantize {llama} --to Q4_K_M {CALIBRATION} --out $O", True, tested=False),
        *(
            Command(f"fitted {effort}", f"quantize {llama} --to GPTQ-Q4_K_M --effort {effort} {CALIBRATION} --out $O",
                    calibrated=True, tested=effort == "fast")
            for effort in ("fast", "good", "best")
        ),
        Command("fitted by bits", f"quantize {small} --to bpw4.25 --effort fast {CALIBRATION} --out $O", True),
        Command("recipe by bits", f"{recipe} --bpw 5", calibrated=True),
        Command("recipe by budget", f"{recipe} --budget 1200KiB --out $O", calibrated=True, tested=False),
        Command("recipe by loss", f"{recipe} --kl 0.05 --out $O", calibrated=True, tested=False),
        Command("recipe by level", f"{recipe} --level Q3_K_M --out $O", calibrated=True, tested=False),
        Command("figures weighed", f"measure {llama} --imatrix {importance}.gguf {MEASURING}", True, tested=False),
        Command("figures of a level", f"measure {llama} --levels Q4_K_M,Q2_K --reference Q8_0 "
                f"--imatrix none {MEASURING}", calibrated=True, tested=False),
        Command("figures of a file", f"measure {llama} --file $R/plain-llama/llama-Q4_K_M.gguf {MEASURING}", True,
                tested=False),
        Command("plan", f"plan {llama} --ctx 512 --as 'RTX 4090 + 64 GiB'"),
        Command("plan of experts", "plan $S/mixtral.gguf --ctx 512 --kv q8_0 --slots 2 --as 'RTX 4090 + 64 GiB'"),
        Command("inspect", "inspect $R/plain-llama/llama-Q4_K_M.gguf --tensors"),
        Command("run", f"run {llama} --levels Q8_0,Q6_K,Q4_K_M,Q2_K --full {judged}", calibrated=True),
        Command("gate that holds", f"gate {llama} --levels Q8_0 {judged}", calibrated=True, tested=False),
        Command("gate that does not", f"gate {llama} --levels Q2_K {judged}", calibrated=True, tested=False),
        Command("smallest", f"smallest {llama} --levels Q8_0,Q2_K --imatrix {importance}.gguf "
                "--workload $S/workload.yaml --ctx 512 --out $O/run", calibrated=True, tested=False),
    ]  # fmt: skip
