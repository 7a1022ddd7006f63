"""Ordinary attention that rewrites have edited, as everything outside this folder asks for it."""

from attnedit.targets.attention.kind import AttentionKind
from attnedit.targets.attention.rewritten.config import RewrittenConfig
from attnedit.targets.attention.rewritten.graph import KV_CACHE_MODULE, rewritten_graph

REWRITTEN_KIND = AttentionKind(KV_CACHE_MODULE, "rewritten attention", RewrittenConfig, rewritten_graph)
