"""A running server of the real vLLM, and requests to it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_serving import GIBIBYTE, NEW, environment, on_gpu, python


@contextmanager
def server(directory: Path, log: Path) -> Iterator[str]:
    """A running server; its address. ``vllm serve`` of the CPU's wheel stops at looking up its own version."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--served-model-name", "result"]
    if on_gpu():
        command += ["--kv-cache-memory-bytes", str(GIBIBYTE), "--gpu-memory-utilization", "0.1"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment(), stdout=stream, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(300):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    with urllib.request.urlopen(f"{address}/health", timeout=5):
                        break
                except (urllib.error.URLError, OSError):
                    time.sleep(1)
            else:
                raise AssertionError(log.read_text()[-4000:])
            yield address
        finally:
            process.terminate()
            process.wait(timeout=120)


def complete(address: str, prompt: str) -> list[int]:
    """Ids of the new tokens: random bytes are no text that can be compared."""
    body = {"model": "result", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    body["return_token_ids"] = True
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return list(json.load(answer)["choices"][0]["token_ids"])
