"""Where the nodes of a rewritten graph come from, in torch.fx's own form: ``meta["from_node"]``."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from attnedit.compiler.compatibility.torch_names import NodeSource, NodeSourceAction


def mark(fresh: Iterable[fx.Node], replaced: fx.Node, rule: str) -> None:
    """Say that nodes stand in place of another, and by which rule; those that know no source line get the other's."""
    for node in fresh:
        earlier = replaced.meta.get("from_node", [])
        node.meta["from_node"] = [*earlier, NodeSource(replaced, rule, NodeSourceAction.REPLACE)]
        if "stack_trace" not in node.meta and "stack_trace" in replaced.meta:
            node.meta["stack_trace"] = replaced.meta["stack_trace"]


def replace(old: fx.Node, new: fx.Node, rule: str, others: Iterable[fx.Node] = ()) -> None:
    """Put a node in place of another, which goes, and `mark` it and `others` that it needs."""
    mark([*others, new], old, rule)
    new.meta.update({key: old.meta[key] for key in ("val", "stack_trace") if key in old.meta})
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def rules(node: fx.Node) -> set[str]:
    """The rules that made a node, and those that made what it stands in place of."""
    return {source.pass_name for source in node.meta.get("from_node", ())}


def made_by(node: fx.Node) -> set[str]:
    """The `rules` that are rewrites: capture has passes of its own."""
    return {rule for rule in rules(node) if ":" in rule or rule.startswith("attnedit.")}
