"""One launch for what conjugate gradients do to the errors of all logits: three passes over them, torch takes nine.

Imported where kernels run only, as triton is not everywhere.
"""

# triton compiles this function from its source: no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def pull_rows(error, weight, strength, length, BLOCK: tl.constexpr):
    """In place, a row each: weight x (error - its weighted mean), where `strength` is the sum of the row's weights."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        inside = first + columns < length
        places = row * length + first + columns
        found += tl.load(error + places, inside, 0.0) * tl.load(weight + places, inside, 0.0)
    mean = tl.sum(found) / tl.load(strength + row)
    for first in range(0, length, BLOCK):  # the row is in the cache by now
        inside = first + columns < length
        places = row * length + first + columns
        pulled = (tl.load(error + places, inside, 0.0) - mean) * tl.load(weight + places, inside, 0.0)
        tl.store(error + places, pulled, inside)
