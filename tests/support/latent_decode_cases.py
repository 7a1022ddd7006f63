"""The kernel of `attnedit::latent_decode` against float64, case by case; prints JSON. Run as a program of its own.

Triton decides when it is imported whether kernels are interpreted, so that cannot be switched on inside a test.
"""

import itertools
import json
import sys
from unittest import mock

import torch
from torch import Tensor

from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.decode import decodes_fused, latent_decode, run_kernels
from attnedit.targets.attention.mla.decode_sizes import Blocks, Roles, choose_blocks, choose_roles
from attnedit.targets.attention.mla.module import MLA

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter of triton 3.9 takes bfloat16 for integers.
DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
# batch, heads, cached tokens, latent, rotary values: none a power of two; more heads than a block; one token.
SHAPES = ((1, 3, 5, 6, 4), (3, 9, 70, 40, 0), (2, 40, 100, 130, 22), (2, 2, 1, 16, 2))
if DEVICE == "cuda":
    SHAPES += ((2, 40, 1000, 136, 24), (3, 32, 300, 512, 64), (2, 32, 517, 848, 176), (2, 9, 129, 64, 16))
MASKS = ("none", "bool", "add", "shared")
KINDS = ("none", "bool", "float", "shared table")


def reference(query: Tensor | None, rope: Tensor | None, latent: Tensor, slots: Tensor, hidden: Tensor) -> Tensor:
    """Attention of one query per sequence in float64; hidden [B, S]."""
    logits = torch.zeros((), dtype=torch.float64)
    for asked, keys in ((query, latent), (rope, slots)):
        if asked is not None:
            logits = logits.to(keys.device) + asked.double() @ keys.double().mT
    return logits.masked_fill(hidden[:, None], -1e30).softmax(-1) @ latent.double()


def inputs(dtype: torch.dtype, batch: int, heads: int, keys: int, rank: int, rope: int) -> tuple[Tensor, ...]:
    shapes = ((batch, heads, rank), (batch, heads, rope), (batch, keys, rank), (batch, keys, rope))
    return tuple(torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)


def cuts(heads: int, rank: int, rope: int) -> list[Blocks | Roles]:
    """How the work may be cut: by roles on Hopper only, and where rows are multiples of 16 bytes."""
    blocks, roles = choose_blocks(heads, rank, rope, 1 << 20), choose_roles(heads, rank, rope, 232448)
    assert blocks is not None
    assert roles is not None
    hopper = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return [blocks, roles] if hopper and rank % 8 == rope % 8 == 0 else [blocks]


def kernel_errors() -> dict[str, float]:
    """Relative error over shapes, masks, filled lengths and splits; of logits from slots alone, of strided caches."""
    errors = {}
    for number, (dtype, shape, kind) in enumerate(itertools.product(DTYPES, SHAPES, MASKS)):
        full, splits = number % 2 == 0, (None, 1, 5)[number % 3]  # the interpreter is slow: not every combination
        batch, heads, keys, rank, rope = shape
        query, query_rope, latent, slots = inputs(dtype, *shape)
        shown = torch.arange(keys, device=DEVICE) >= torch.arange(batch, device=DEVICE)[:, None] * 2
        if kind == "shared":
            shown = shown[-1:] if keys > 8 else shown[:1]
        mask = None if kind == "none" else shown
        if kind == "add":
            mask = torch.zeros(shown.shape, device=DEVICE, dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)
        hidden = torch.zeros((batch, keys), dtype=torch.bool, device=DEVICE)
        if kind != "none":
            hidden |= ~shown
        length = None
        if not full and keys > 8:
            length = torch.tensor([keys - 3], device=DEVICE)
            hidden[:, -3:] = True
        arguments = (query, query_rope if rope else None, latent, slots)
        expected = reference(*arguments, hidden)
        seen = ~hidden.all(-1)
        for cut in cuts(heads, rank, rope):
            found = run_kernels(*arguments, mask, length, cut, splits)
            assert found.isfinite().all()
            assert kind == "add" or not found[~seen].any()
            error = (found.double() - expected)[seen].norm() / expected[seen].norm()
            errors[f"{type(cut).__name__} {dtype} {shape} {kind} {full} {splits}"] = float(error)
    query, query_rope, latent, slots = inputs(torch.float16, 2, 4, 50, 20, 6)
    expected = reference(None, query_rope, latent, slots, torch.zeros((2, 50), dtype=torch.bool, device=DEVICE))
    # A cache with free places: rows of more columns, sequences of more rows.
    wide = torch.zeros((2, 60, 24), dtype=latent.dtype, device=DEVICE)
    wide[:, :50, :20] = latent
    for name, cached in (("contiguous", latent), ("strided", wide[:, :50, :20])):
        found = latent_decode(None, query_rope, cached, slots)
        errors[f"slots only, {name}"] = float((found.double() - expected).norm() / expected.norm())
    return errors


def module_errors() -> tuple[dict[str, float], int]:
    """The module's step through the kernels against the same module in float64, whose step is plain; how many did."""
    errors = {}
    used = mock.Mock(wraps=torch.ops.attnedit.latent_decode_raised)
    forms = (((0, 2, 3), False), ((), False), (tuple(range(5)), True))
    with mock.patch.object(torch.ops.attnedit, "latent_decode_raised", used):
        for dtype, (slots, bias), kind, batch in itertools.product(DTYPES, forms, KINDS, (1, 2, 17, 33)):
            config = MLAConfig(0, 4, 8, 6, 12, slots, 8, 10, 0.4, kv_bias=bias)
            module = MLA(config, device=DEVICE, dtype=dtype).requires_grad_(False)
            exact = MLA(config, device=DEVICE, dtype=torch.float64).requires_grad_(False)
            exact.load_state_dict(module.state_dict())
            keys = 33 if batch > 1 else 500
            cached = [torch.randn(batch, 1, keys, size, device=DEVICE).to(dtype) for size in (12, 2 * len(slots))]
            # Heads behind tokens, as projections leave them.
            query = torch.randn(batch, 1, 4, 8, device=DEVICE).to(dtype).transpose(1, 2)
            states, angle = torch.randn(batch, 1, 10, device=DEVICE).to(dtype), torch.rand(batch, 1, 5, device=DEVICE)
            turns = [angle.cos().to(dtype), angle.sin().to(dtype)] if slots else [None, None]
            if kind == "shared table":
                turns = [None if x is None else x[:1] for x in turns]
            mask = None
            if kind in ("bool", "float"):
                shown = torch.arange(keys, device=DEVICE) >= torch.arange(batch, device=DEVICE)[:, None] % 7
                mask = shown[:, None, None]
                if kind == "float":
                    mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, torch.finfo(torch.float32).min)
            given = (query, states, *turns)
            found, appended = module(*given, mask, full := Full(*cached)), full.appended
            double = [None if x is None else x.double() for x in given]
            expected = exact(*double, mask, full := Full(*(x.double() for x in cached)))
            name = f"module {dtype} {len(slots)} {kind} {batch}"
            errors[name] = float((found.double() - expected).norm() / expected.norm())
            for part, new, other in zip(("latent", "slots"), appended, full.appended, strict=True):
                if new.numel():
                    errors[f"{name} {part}"] = float((new.double() - other).norm() / other.norm())
    return errors, used.call_count


class Full:
    """A cache whose tokens are all there."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.parts = (keys, values)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.appended = keys, values
        return self.parts

    def get_seq_length(self, layer: int = 0) -> int:
        return self.parts[0].shape[2]


if __name__ == "__main__":
    torch.manual_seed(0)
    half, exact = (torch.zeros((1, 2, 1, 16), device=DEVICE, dtype=dtype) for dtype in (torch.float16, torch.float32))
    latent = torch.zeros((1, 4, 16), device=DEVICE)
    choices = {
        "half": decodes_fused(half, None, latent.half(), None),
        "float": decodes_fused(exact, None, latent, None),
        "long": decodes_fused(half.expand(-1, -1, 3, -1), None, latent.half(), None),
        "grad": decodes_fused(half, None, latent.half().requires_grad_(), None),
        "masked by head": decodes_fused(half, None, latent.half(), torch.ones((1, 2, 1, 4), device=DEVICE).bool()),
    }
    errors, surrounded = module_errors()
    json.dump({"choices": choices, "errors": kernel_errors() | errors, "surrounded": surrounded}, sys.stdout)
