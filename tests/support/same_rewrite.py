"""A rewrite that changes nothing, so that what carries it can be held to the source."""

from __future__ import annotations

import attnedit
from attnedit import Rewrite, attention


class Same(Rewrite):
    """Attention as it was, through the cache of the rewritten layer."""

    contract = attnedit.exact

    def pattern(self, query_BHTd, key_BGTd, value_BGTv):  # type: ignore[no-untyped-def]
        return attention(query_BHTd, key_BGTd, value_BGTv)

    def replacement(self, match, query_BHTd, key_BGTd, value_BGTv):  # type: ignore[no-untyped-def]
        return attention(query_BHTd, key_BGTd, value_BGTv)
