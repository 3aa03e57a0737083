"""Core's own nodes, from the registry that its server fills, and calls of them with defaults."""

import asyncio
import functools
from typing import Any


@functools.cache
def registry() -> dict[str, Any]:
    """Node id -> class of every built-in node; needs ComfyUI on sys.path (the fixture `comfy`)."""
    import nodes

    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return dict(nodes.NODE_CLASS_MAPPINGS)


def of_kind(output: str, *, takes: str | None = None) -> set[str]:
    """Ids of the nodes that give `output`, and take an input of type `takes`."""
    return {
        name
        for name, cls in registry().items()
        if output in (getattr(cls, "RETURN_TYPES", None) or ())
        and (takes is None or takes in _types(cls).values())
    }


def run(name: str, **inputs: Any) -> Any:
    """The first output of the node, its other widgets at their defaults."""
    cls = registry()[name]
    given = {**_defaults(cls), **inputs}
    target = cls if hasattr(cls, "GET_SCHEMA") else cls()
    out = getattr(target, cls.FUNCTION)(**given)
    return out[0] if isinstance(out, tuple) else out.args[0]


def _inputs(cls: Any) -> dict[str, Any]:
    found = cls.INPUT_TYPES()
    return {**found.get("required", {}), **found.get("optional", {})}


def _types(cls: Any) -> dict[str, Any]:
    return {name: one[0] for name, one in _inputs(cls).items()}


def _defaults(cls: Any) -> dict[str, Any]:
    values = {}
    for name, (kind, *rest) in _inputs(cls).items():
        settings = rest[0] if rest else {}
        options = kind if isinstance(kind, list) else settings.get("options")
        if "default" in settings:
            values[name] = settings["default"]
        elif options:
            values[name] = options[0]
        elif kind == "BOOLEAN":
            values[name] = False
    return values


def widgets(name: str, kind: str) -> list[str]:
    """Names of the node's inputs of a type."""
    return [one for one, found in _types(registry()[name]).items() if found == kind]
