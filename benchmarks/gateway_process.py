"""The gateway before engines by URL, for benchmarks: ``python gateway_process.py SLOTS QUALITY_URL [SPEED_URL]``, or
with ``--replicas`` before replicas of one tier; ``--processes=N``, ``--quiet``.
"""

from __future__ import annotations

import json
import logging
import sys

from bitladder.serve.app import serve
from bitladder.serve.settings import ReplicaSpec, ServeSettings, TierSpec, UpstreamTimeouts


def main() -> None:
    options = [word for word in sys.argv[2:] if word.startswith("--")]
    slots, urls = int(sys.argv[1]), [word for word in sys.argv[2:] if word not in options]
    processes = next((int(word[12:]) for word in options if word.startswith("--processes=")), 1)
    names = ("fake", "fake-fast")
    tiers = [TierSpec(name, url=url, slots=slots) for name, url in zip(names, urls, strict=False)]
    if "--replicas" in options:
        replicas = tuple(ReplicaSpec(url) for url in urls[1:])
        tiers = [TierSpec("fake", url=urls[0], replicas=replicas, slots=slots)]
    settings = ServeSettings(
        tiers[0],
        tiers[1] if len(tiers) > 1 else None,
        port=0,
        processes=processes,
        max_queue=4096,
        timeouts=UpstreamTimeouts(first_byte=5.0, between=5.0),
        drain_s=2.0,
    )

    def ready(address: str, _: object) -> None:
        logging.getLogger("bitladder.serve").setLevel(logging.ERROR if "--quiet" in options else logging.INFO)
        print(json.dumps({"address": address}), flush=True)

    serve(settings, ready)


if __name__ == "__main__":
    main()
