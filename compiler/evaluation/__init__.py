"""Perplexity, by position too, planted facts, and their intervals."""
