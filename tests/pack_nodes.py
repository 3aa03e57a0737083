"""Ids of the pack's nodes, read from its source: a literal `node_id=` in every define_schema."""

import ast

from comfy_home import PACK_ROOT


def node_ids() -> list[str]:
    """Sorted; the same way ComfyUI-Manager's scanner reads them."""
    found = set()
    for path in sorted((PACK_ROOT / "nodes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "node_id":
                assert isinstance(node.value, ast.Constant), f"{path}: node_id is not a literal"
                found.add(node.value.value)
    return sorted(found)
