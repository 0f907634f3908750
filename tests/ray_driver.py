"""A GPTQ level of a tiny model on a Ray cluster, in a process of its own, that waits for a line before a layer.

    python ray_driver.py ADDRESS SOURCE CHECKPOINT OUT WAITS_AT [RESOURCE]

Prints ``layer N`` before each layer, states are kept after each; units take one of RESOURCE.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

import tiny_checkpoints
from bitladder.errors import BitladderError
from bitladder.executors.needs import Needs
from bitladder.executors.on_ray import connect
from bitladder.files.gguf import GgufFile
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.stages.calibrate import Calibration, Reading
from spread_walks import short_shards


def main() -> int:
    address, source, checkpoint, out, waits_at, *resource = sys.argv[1:]
    torch.set_num_threads(1)

    waiting = [float(waits_at)]

    def progress(what: str, layer: float, total: float) -> None:
        print(f"layer {layer}", flush=True)
        if layer in waiting:
            waiting.clear()
            sys.stdin.readline()

    with pytest.MonkeyPatch.context() as patched, GgufFile.open(Path(source)) as file:
        short_shards(patched)
        patched.setattr("bitladder.walk.keep.SECONDS_BETWEEN", 0.0)
        patched.setattr("bitladder.executors.on_ray._LOOK_EVERY", 1.0)  # a head that is gone is found to be so soon
        patched.setattr("bitladder.executors.on_ray._HEAD_PAUSE", 0.5)
        wanted, text = [parse_checkpoint("GPTQ-4bit-g32")], Reading(tiny_checkpoints.windows_of(1))
        try:
            with connect(address, "cpu", Needs(cpus=0, custom=dict.fromkeys(resource, 1))) as cluster:
                options = {"out_dir": Path(out), "name": "tiny", "checkpoint": Path(checkpoint), "executor": cluster}
                Calibration(file, wanted, text, **options).run(progress)
        except BitladderError as error:
            print(json.dumps({"error": type(error).__name__, "found": error.found, "do": error.do}), flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
