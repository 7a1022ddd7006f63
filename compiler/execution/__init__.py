"""Models run: layer by layer over windows, in several processes, and held to their contracts."""
