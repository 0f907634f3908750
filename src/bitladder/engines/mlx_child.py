"""mlx-lm's server with one model, for whoever knows its key: run by the Python that mlx-lm is installed for, as a
script, and importing nothing of ours.

    python mlx_child.py FOLDER NAME HOST PORT SLOTS

By itself that server loads whatever model a request names, from the hub too, and answers every program and web page of
the machine. Here it has the one that it was started with, answers under NAME, and wants the key in
``BITLADDER_ENGINE_KEY`` where there is one.
"""

from __future__ import annotations

import hmac
import os
import sys
from functools import partial
from typing import Any

KEY_VARIABLE = "BITLADDER_ENGINE_KEY"


def main() -> None:
    """Serve until the process is ended."""
    folder, name, host, port, slots = sys.argv[1:]
    key = os.environ.pop(KEY_VARIABLE, "")

    from mlx_lm import server

    class OneModel(server.ModelProvider):  # type: ignore[misc]
        """Whatever is asked for, it is this."""

        def load(self, *_: Any) -> Any:
            return super().load("default_model", None, "default_model")

    class Guarded(server.APIHandler):  # type: ignore[misc]
        """Requests carry the key."""

        def _knows_key(self) -> bool:
            given = self.headers.get("Authorization", "").encode()
            if not key or hmac.compare_digest(given, f"Bearer {key}".encode()):
                return True
            self._set_completion_headers(401)
            self.end_headers()
            self.wfile.write(b'{"error": "The key is missing or wrong."}')
            return False

        def do_GET(self) -> None:  # noqa: N802 - the standard library's name
            if self.path == "/health":
                self._tell_health()
            elif self._knows_key():
                super().do_GET()

        def _tell_health(self) -> None:
            """Well once the model is loaded; a model that cannot be loaded is the end of the process."""
            if not self.response_generator.is_healthy:
                os._exit(1)
            loaded = self.response_generator.model_provider.model is not None
            self._set_completion_headers(200 if loaded else 503)
            self.end_headers()

        def do_POST(self) -> None:  # noqa: N802
            if self._knows_key():
                super().do_POST()

        def handle_completion(self, *arguments: Any) -> None:
            self.requested_model = name
            super().handle_completion(*arguments)

    sys.argv = [
        "mlx_lm.server", "--model", folder, "--host", host, "--port", port, "--allowed-origins", "",
        "--decode-concurrency", slots, "--prompt-concurrency", slots, "--log-level", "WARNING",
    ]  # fmt: skip
    server.ModelProvider = OneModel
    server._run_http_server = partial(server._run_http_server, handler_class=Guarded)
    server.main()


if __name__ == "__main__":
    del sys.path[0]  # our modules beside this script are nobody's here
    main()
