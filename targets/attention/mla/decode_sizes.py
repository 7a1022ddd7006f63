"""How one decode step of latent attention is cut into programs: tiles, heads, and parts of the sequence."""

from __future__ import annotations

from dataclasses import dataclass

from attnedit.targets.attention.triton_support import power

__all__ = ["Blocks", "Roles", "choose_blocks", "choose_roles", "choose_splits"]

RESERVED = 4096
"""Bytes of shared memory left to the compiler: reductions, barriers, converted tiles."""
START = 128
"""Cached tokens that a processor goes through in the time that a program takes to begin and to end."""
CHUNK = 64
"""Columns, and tokens, of what the kernel with roles copies at a time."""
MOST_TILES = 4
"""Beyond them nothing more is in flight than memory delivers."""


@dataclass(frozen=True)
class Blocks:
    """How the work of one program is cut whose warps all do the same.

    Attributes:
        heads: query heads of one program, a power of two of at least 16.
        tokens: cached tokens per tile.
        warps: of one program.
        stages: tiles in flight.
        resident: how many programs share one processor.
    """

    heads: int
    tokens: int
    warps: int
    stages: int
    resident: int


@dataclass(frozen=True)
class Roles:
    """How the work of one program is cut whose warps have roles.

    Attributes:
        heads: query heads of one program, 16 or 32.
        tiles: of 64 tokens that shared memory holds.
        tokens: cached tokens per tile.
        resident: how many programs share one processor.
    """

    heads: int
    tiles: int
    tokens: int = CHUNK
    resident: int = 1


def choose_blocks(heads: int, rank: int, rope: int, shared_memory: int) -> Blocks | None:
    """Say how a program works whose warps all do the same, or None where no tile fits into its memory.

    Few warps with many registers each do best: they hold the sum over keys, 64 KiB of floats for 32 heads of 512
    values (docs/notebook/2026-11-gpu-decode.md).

    Args:
        heads: H.
        rank: r.
        rope: 2 s.
        shared_memory: bytes that the programs of one processor may have.
    """
    block = min(32, power(heads))
    held = block * power(rank)
    if held > 32 * 1024:
        return None
    tokens, warps = (32, 4) if held <= 32 * 512 else (16, 8)
    columns = power(rank) + (power(rope) if rope else 0)
    reserved = RESERVED if warps == 4 else RESERVED + 2 * block * columns
    for stages in (3, 2):
        size = 2 * stages * tokens * columns + reserved
        if size <= shared_memory:
            resident = 2 if warps == 4 and 2 * size <= shared_memory else 1
            return Blocks(block, tokens, warps, stages, resident)
    return None


def choose_roles(heads: int, rank: int, rope: int, shared_memory: int) -> Roles | None:
    """Say how a program works whose warps have roles, or None where not even one tile fits beside the queries.

    Args:
        heads: H.
        rank: r; the sums of 1,024 columns are what registers hold.
        rope: 2 s.
        shared_memory: bytes that the programs of one processor may have.
    """
    block = min(32, power(heads))
    chunks = -(-rank // CHUNK) + -(-rope // CHUNK)
    queries, weights = 2 * chunks * block * CHUNK, 2 * 2 * CHUNK * block
    left = shared_memory - queries - weights - RESERVED
    tiles = min(MOST_TILES, left // (2 * chunks * CHUNK * CHUNK))
    return Roles(block, tiles) if tiles >= 1 and rank <= 1024 else None


def choose_splits(programs: int, keys: int, places: int, tokens: int) -> int:
    """Say into how many parts the sequence is cut, so that all is done soonest: few rounds of programs, no part idle.

    Args:
        programs: without splits: batch times blocks of heads.
        keys: S.
        places: how many programs run at a time.
        tokens: cached tokens per tile; a part is some number of tiles.
    """
    tiles = max(1, -(-keys // tokens))
    most = max(1, min(tiles, -(-places // programs) * 4))

    def cost(splits: int) -> int:
        rounds = -(-programs * splits // places)
        return rounds * (-(-tiles // splits) * tokens + START)

    # Fewest among those within a twentieth of the best: every part is one more to sum.
    best = min(cost(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if cost(splits) <= 1.05 * best)
