"""From a live model to a graph and facts for every attention site."""
