"""Fusion."""
def fuse(program):
    return program.module()
