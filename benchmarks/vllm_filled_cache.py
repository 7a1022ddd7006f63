"""vLLM's connector that fills its cache as if prompts had been read, with a switch (`vllm_throughput.py`)."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector


class FilledCache(DecodeBenchConnector):
    """Fills the cache while `filling`, and is none otherwise."""

    filling = True

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens of a request are there already."""
        if not FilledCache.filling:
            return 0, False
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return found
