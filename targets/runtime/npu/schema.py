"""Schemas of the fused operators, as data of one torch_npu version; compared with the real ones where those are.

``python -m attnedit.targets.runtime.npu.schema FILE VERSION`` reads them anew from
``torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml`` of a torch_npu wheel: of the operators that lowered graphs
and training may call, whose names ``schemas.json`` has, whatever stands behind a new one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from attnedit.compiler.compatibility.torch_names import operator_names, parse_schema, schema_of
from attnedit.compiler.errors import UsageError

FILE = Path(__file__).with_name("schemas.json")


@cache
def _stored() -> dict[str, object]:
    values: dict[str, object] = json.loads(FILE.read_text(encoding="utf-8"))
    return values


def torch_npu_version() -> str:
    """Version of torch_npu that the schemas come from."""
    return str(_stored()["torch_npu"])


def schemas() -> dict[str, str]:
    """Operator -> schema, without namespace.

    >>> schemas()["npu_swiglu"]
    'npu_swiglu(Tensor input, int dim=-1) -> Tensor'
    """
    found = _stored()["schemas"]
    if not isinstance(found, Mapping):
        raise AssertionError(f"{FILE} holds no schemas")
    return dict(found)


def real_operators() -> set[str]:
    """Operators of ours that something registered already: torch_npu's, as we register only what is absent."""
    known = {name.removeprefix("npu::").split(".")[0] for name in operator_names() if name.startswith("npu::")}
    return known & set(schemas())


def check_live() -> list[str]:
    """Compare the stored schemas with those registered now.

    Returns:
        One line for every operator that differs or is absent; empty where all agree.
    """
    problems = []
    for name, stored in schemas().items():
        packet = getattr(torch.ops.npu, name, None)
        if packet is None:
            problems.append(f"{name} is not registered")
            continue
        live = parse_schema(str(schema_of(packet.default)))
        if str(live) != str(parse_schema(f"npu::{stored}")):
            problems.append(f"{name} is {live}, torch_npu {torch_npu_version()} has {stored}")
    return problems


def read_yaml(text: str) -> dict[str, str]:
    """Find our operators among the functions of a torch_npu wheel.

    The file calls the first argument ``self``, and the registered operators call it ``input``.

    Raises:
        UsageError: one is not there.
    """
    lines = re.findall(r"^\s*-? ?func: (.*)$", text, flags=re.MULTILINE)
    by_name = {line.split("(")[0]: line for line in lines if "." not in line.split("(")[0]}
    if absent := sorted(set(schemas()) - set(by_name)):
        raise UsageError(f"the file has no function {', '.join(absent)}")
    return {name: re.sub(r"(Tensor(?:\(a!\))?) self\b", r"\1 input", by_name[name]) for name in schemas()}


def main() -> None:
    """Write the stored schemas."""
    source, version = sys.argv[1:]
    found = read_yaml(Path(source).read_text(encoding="utf-8"))
    FILE.write_text(json.dumps({"torch_npu": version, "schemas": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
