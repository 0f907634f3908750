"""The gateway before engines by URL, for benchmarks: ``python gateway_process.py SLOTS QUALITY_URL
[SPEED_URL]``.
"""

from __future__ import annotations

import json
import logging
import sys

from bitladder.serve.app import serve
from bitladder.serve.settings import ServeSettings, TierSpec, UpstreamTimeouts


def main() -> None:
    slots, urls = int(sys.argv[1]), sys.argv[2:]
    names = ("fake", "fake-fast")
    tiers = [TierSpec(name, url=url, slots=slots) for name, url in zip(names, urls, strict=False)]
    settings = ServeSettings(
        tiers[0],
        tiers[1] if len(tiers) > 1 else None,
        port=0,
        max_queue=4096,
        timeouts=UpstreamTimeouts(first_byte=5.0, between=5.0),
        drain_s=2.0,
    )

    def ready(address: str, _: object) -> None:
        logging.getLogger("bitladder.serve").setLevel(logging.ERROR if "--quiet" in sys.argv else logging.INFO)
        print(json.dumps({"address": address}), flush=True)

    serve(settings, ready)


if __name__ == "__main__":
    main()
