"""Run in an environment with the real torch_npu and stand-ins for CANN: ``live.py WHAT FOLDER``.

Prints one JSON object, or (for WHAT "graph") leaves a folder behind. There is no NPU here: schemas, shape functions and
graphs are real, and nothing is computed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch_npu  # type: ignore[import-not-found]
from safetensors.torch import load_file
from torch import fx

from attnedit.targets.runtime.npu.export_air import example
from attnedit.targets.runtime.npu.reference import register
from attnedit.targets.runtime.npu.run_npu import WEIGHTS_FILE, NpuModel, load_program
from attnedit.targets.runtime.npu.schema import check_live, real_operators

BATCH_TOKENS = 7


def schemas(folder: Path) -> dict[str, Any]:
    """Our stored schemas against the registered ones; nothing of ours may be registered."""
    return {
        "version": torch_npu.__version__,
        "problems": check_live(),
        "ours": register(),
        "real": len(real_operators()),
    }


def shapes(folder: Path) -> dict[str, Any]:
    """Run both programs on meta, and compare every value with what the references said when it was traced."""
    manifest = json.loads((folder / "attnedit-npu.json").read_text())
    weights = {name: tensor.to("meta") for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    differ, compared, logits = [], 0, {}
    for phase, file in manifest["programs"].items():
        graph = load_program(folder / file, weights, manifest["aliases"], "meta")
        inputs = example(manifest, phase, 11, "meta")
        seen = _Shapes(graph)
        flat = torch.utils._pytree.tree_leaves(inputs)
        seen.run(*flat)
        compared += seen.compared
        differ += seen.differ
        logits[phase] = seen.last
    return {"compared": compared, "differ": differ, "logits": logits}


def values(folder: Path) -> dict[str, Any]:
    """Run both programs on the CPU, by the references in place of the kernels that torch_npu has not."""
    register()
    state = NpuModel.load(folder).decoding()
    ids = torch.arange(3 * BATCH_TOKENS).view(3, BATCH_TOKENS) % 50
    logits = [state.feed(ids, torch.ones_like(ids)), state.feed(ids[:, :2], torch.ones_like(ids[:, :2]))]
    return {"logits": [array.tolist() for array in logits]}


class _Shapes(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.compared, self.differ, self.last = 0, [], None
        for node in list(module.graph.nodes):
            if node.op == "call_module":
                module.graph.erase_node(node)

    def run_node(self, node: fx.Node) -> Any:
        found = super().run_node(node)
        expected = node.meta.get("val")
        if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor) and node.op == "call_function":
            self.compared += 1
            fixed = [isinstance(size, int) for size in expected.shape]
            same = [a == b for a, b, known in zip(found.shape, expected.shape, fixed, strict=True) if known]
            if found.dim() != expected.dim() or not all(same) or found.dtype != expected.dtype:
                self.differ.append(f"{node.target}: {found.dtype} {tuple(found.shape)}, traced {expected}")
        if node.op == "output":
            self.last = list(torch.utils._pytree.tree_leaves(found)[0].shape)
        return found


def graph(folder: Path, phase: str, output: str) -> None:
    """Let torchair build the graph of one phase, as export_air.py does; the process ends where CANN would begin."""
    import torchair  # type: ignore[import-not-found]
    import torchair._ge_concrete_graph.compat_ir as compat  # type: ignore[import-not-found]
    import torchair._ge_concrete_graph.fx2ge_converter as converter  # type: ignore[import-not-found]
    import torchair.core._backend as backend  # type: ignore[import-not-found]

    converter.initialize_graph_engine = lambda *args, **kwargs: None
    compat.is_cann_compat = lambda *args, **options: ""  # it asks CANN which operators it has
    backend._cached_device_id = 0
    torch_npu.npu.get_device_name = lambda *args: "Ascend910B1"
    manifest = json.loads((folder / "attnedit-npu.json").read_text())
    weights = load_file(folder / WEIGHTS_FILE)
    program = load_program(folder / manifest["programs"][phase], weights, manifest["aliases"], "cpu")
    inputs = example(manifest, phase, 11, "cpu")
    torchair.dynamo_export(model=program, export_path=output, dynamic=phase == "decode", **inputs)


def main() -> None:
    what, folder, *more = sys.argv[1:]
    if what == "graph":
        graph(Path(folder), *more)
    else:
        print(json.dumps({"schemas": schemas, "shapes": shapes, "values": values}[what](Path(folder))))


if __name__ == "__main__":
    main()
