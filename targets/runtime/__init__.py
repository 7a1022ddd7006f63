"""Where a rewritten model runs."""
