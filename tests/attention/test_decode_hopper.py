"""The kernel with roles: that it compiles for Hopper, which needs no GPU; run on one it is in `test_latent_decode`."""

import warnings

import pytest
from interpreted import HOPPER, needs_triton


@needs_triton
@pytest.mark.parametrize(
    ("heads", "rank", "rope", "mask", "page"),
    [(32, 512, 64, "none", 0), (32, 848, 176, "bool", 0), (9, 96, 0, "add", 0), (32, 424, 88, "none", 128)],
)
def test_kernel_with_roles_compiles_for_hopper(heads: int, rank: int, rope: int, mask: str, page: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from attnedit.targets.attention.mla.decode import REGISTERS
    from attnedit.targets.attention.mla.decode_hopper import attend_split
    from attnedit.targets.attention.mla.decode_sizes import choose_roles

    roles = choose_roles(heads, rank, rope, HOPPER)
    assert roles is not None
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    constants = {
        "RANK": rank,
        "ROPE": rope,
        "MASK": mask,
        "LENGTH": True,
        "PAGE": page,
        "SLOT": rank if page else 0,
        "CR": -(-rank // 64),
        "CS": -(-rope // 64),
        "BLOCK_H": roles.heads,
        "BLOCK_N": roles.tokens,
        "TILES": roles.tiles,
        "REGISTERS": REGISTERS,
    }
    pointers = {"query": "*bf16", "query_rope": "*bf16", "mask": "*i8", "context": "*fp32"}
    pointers |= {"length": "*i32" if page else "*i64", "table": "*i32"}
    described = dict.fromkeys(("latent", "slots"), f"tensordesc<bf16[64, 64],{layout!r}>")
    signature = dict.fromkeys(attend_split.arg_names, "i32") | described | pointers | {"mass": "*fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of triton's own defaults
        made = triton.compile(
            GluonASTSource(fn=attend_split, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 4, "maxnreg": 128},
        )
    assert made.metadata.shared <= HOPPER
    # Both products on the matrix unit of a warp group, every chunk by the copy engine.
    assert made.asm["ptx"].count("wgmma.mma_async") >= 4 * (constants["CR"] * 2 + constants["CS"])
    assert made.asm["ptx"].count("cp.async.bulk.tensor") == constants["CR"] + constants["CS"]
