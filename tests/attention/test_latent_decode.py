"""The decode kernel: on a GPU where there is one, in triton's interpreter where there is none."""

import math

import pytest
import torch
from interpreted import HOPPER, needs_triton, results_of

from attnedit.targets.attention.mla.decode import _copies, decodes_fused
from attnedit.targets.attention.mla.decode_sizes import choose_blocks, choose_roles, choose_splits


@needs_triton
def test_kernel_equals_the_reference() -> None:
    errors = results_of("latent_decode_cases.py")["errors"]
    assert len(errors) >= 140
    assert {name: error for name, error in errors.items() if not error < (8e-3 if "bfloat16" in name else 1e-3)} == {}


@needs_triton
def test_kernel_takes_what_it_is_made_for() -> None:
    choices = results_of("latent_decode_cases.py")["choices"]
    assert choices == {"half": True, "float": False, "long": False, "grad": False, "masked by head": False}


@needs_triton
def test_a_few_sequences_take_few_launches() -> None:
    # Of 1, 2 and 17 sequences; 33 are many.
    assert results_of("latent_decode_cases.py")["surrounded"] % (3 * 4 * 3) == 0
    assert results_of("latent_decode_cases.py")["surrounded"] > 0


def test_processors_keep_the_plain_path() -> None:
    query, latent = torch.zeros((1, 2, 1, 16)).half(), torch.zeros((1, 4, 16)).half()
    assert not decodes_fused(query, None, latent, None)


@pytest.mark.parametrize("heads", [1, 9, 32, 128])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (424, 88), (160, 32), (848, 176), (1000, 0)])
def test_blocks_fit(heads: int, rank: int, rope: int) -> None:
    blocks = choose_blocks(heads, rank, rope, HOPPER)
    assert blocks is not None
    assert 16 <= blocks.heads <= 32
    tiles = 2 * blocks.stages * blocks.tokens * (rank + rope)
    assert blocks.resident * tiles < HOPPER
    assert choose_blocks(heads, rank, rope, 8192) is None


def test_no_blocks_for_very_wide_latents() -> None:
    assert choose_blocks(32, 1025, 64, 1 << 30) is None


def test_what_the_copy_engine_brings() -> None:
    cache = torch.zeros((2, 128, 24)).half()
    assert _copies(cache, 64)
    assert not _copies(cache[..., 1:], 64)  # begins at 2 bytes
    assert not _copies(torch.zeros((2, 128, 22)).half(), 64)  # rows of 44 bytes
    assert not _copies(torch.zeros((2, 100, 24)).half(), 64)  # the last tile would reach into the next sequence
    assert _copies(torch.zeros((1, 100, 24)).half(), 64)
    assert not _copies(cache[:0], 64)


@pytest.mark.parametrize("heads", [1, 9, 32, 128])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (424, 88), (160, 32), (848, 176), (1000, 0)])
def test_roles_fit(heads: int, rank: int, rope: int) -> None:
    roles = choose_roles(heads, rank, rope, HOPPER)
    assert roles is not None
    assert roles.heads in (16, 32)
    assert 1 <= roles.tiles <= 4
    chunks = -(-rank // 64) + -(-rope // 64)
    assert 2 * chunks * 64 * (roles.tiles * 64 + roles.heads) < HOPPER
    assert choose_roles(heads, rank, rope, 8192) is None


def test_registers_hold_no_wider_latents_by_roles() -> None:
    assert choose_roles(32, 1025, 0, 1 << 30) is None


@pytest.mark.parametrize("programs", [1, 7, 32, 100, 128, 500])
@pytest.mark.parametrize("keys", [1, 300, 8192, 131072])
@pytest.mark.parametrize(("places", "tokens"), [(264, 32), (132, 64)])
def test_splits_fill_the_processors(programs: int, keys: int, places: int, tokens: int) -> None:
    splits = choose_splits(programs, keys, places, tokens)
    assert 1 <= splits <= -(-keys // tokens)
    if keys >= 131072:
        share = math.ceil(keys / splits / tokens) * tokens
        busy = programs * keys / (math.ceil(programs * splits / places) * share * places)
        assert busy > 0.9


def test_no_part_of_a_short_sequence_is_idle() -> None:
    # 122 parts would be two tiles for some and none for the rest: no sooner done than 64 parts.
    assert choose_splits(1, 8192, 132, 64) == 128
    assert choose_splits(1, 2048, 132, 64) == 32
    assert choose_splits(32, 32768, 132, 64) == 4
