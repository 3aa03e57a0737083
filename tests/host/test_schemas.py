"""What saved graphs and API prompts rely on: ids, inputs, outputs, words, defaults, help pages.

`tests/unit/node_ids.json` is frozen: ids, inputs (in order), options and outputs are only added to,
and an added input is optional. Write the additions by hand.
"""

import asyncio
import inspect
import json

import pytest
from comfy_home import PACK_ROOT
from pack_nodes import node_ids

FROZEN = json.loads((PACK_ROOT / "tests" / "unit" / "node_ids.json").read_text())
CATEGORIES = {
    "model/conditioning/slipstream",
    "model/loaders/slipstream",
    "model/patch/slipstream",
}
NODE_IDS = node_ids()
SOCKETS = {"MODEL", "LATENT", "CONDITIONING", "CLIP", "VAE", "IMAGE", "*"}


@pytest.fixture(scope="session")
def nodes(comfy):
    """Node id -> node class, from the pack's own entry point."""
    import slipstream

    async def listed():
        return await (await slipstream.comfy_entrypoint()).get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(listed())}


def schema_of(nodes, node_id):
    return nodes[node_id].GET_SCHEMA()


def frozen_form(schema) -> dict:
    """A schema as node_ids.json has it."""
    inputs = {}
    for one in schema.inputs:
        inputs[one.id] = {"type": one.get_io_type(), "required": not one.optional}
        if getattr(one, "options", None):
            inputs[one.id]["options"] = list(one.options)
        if getattr(one, "default", None) is not None:
            inputs[one.id]["default"] = one.default
    return {"inputs": inputs, "outputs": [o.get_io_type() for o in schema.outputs]}


def broken_promises(old: dict, new: dict) -> list[str]:
    """What a graph saved with the schema `old` would find changed in `new`."""
    found = []
    if list(new["inputs"])[: len(old["inputs"])] != list(old["inputs"]):
        return [f"inputs {list(old['inputs'])} became {list(new['inputs'])}"]
    for name, was in old["inputs"].items():
        now = new["inputs"][name]
        if now["type"] != was["type"] or now.get("default") != was.get("default"):
            found.append(f"{name}: {was} became {now}")
        if now["required"] and not was["required"]:
            found.append(f"{name} became required")
        gone = set(was.get("options", ())) - set(now.get("options", ()))
        if gone:
            found.append(f"{name} lost {sorted(gone)}")
    added = list(new["inputs"])[len(old["inputs"]) :]
    found.extend(
        f"{name} was added as required" for name in added if new["inputs"][name]["required"]
    )
    if new["outputs"][: len(old["outputs"])] != old["outputs"]:
        found.append(f"outputs {old['outputs']} became {new['outputs']}")
    return found


def test_ids_are_the_frozen_ones(nodes):
    assert sorted(nodes) == NODE_IDS, "a node_id that is not literal, or a node not in NODES"
    assert sorted(FROZEN) == NODE_IDS, "write a new node into tests/unit/node_ids.json"


@pytest.mark.parametrize("node_id", sorted(FROZEN))
def test_schema_keeps_what_saved_graphs_use(nodes, node_id):
    assert broken_promises(FROZEN[node_id], frozen_form(schema_of(nodes, node_id))) == []


def test_a_broken_promise_is_found(nodes):
    """Negative control of the check above, on a schema with everything in it."""
    old = {
        "inputs": {
            "model": {"type": "MODEL", "required": True},
            "policy": {"type": "COMBO", "required": True, "options": ["a", "b"], "default": "a"},
            "late": {"type": "INT", "required": False, "default": 1},
        },
        "outputs": ["MODEL"],
    }

    def changed(**inputs):
        return {**old, "inputs": {**old["inputs"], **inputs}}

    assert broken_promises(old, old) == []
    assert broken_promises(old, changed(new={"type": "INT", "required": False})) == []
    assert broken_promises(old, changed(new={"type": "INT", "required": True}))
    assert broken_promises(old, changed(late={"type": "INT", "required": True, "default": 1}))
    assert broken_promises(old, changed(late={"type": "INT", "required": False, "default": 2}))
    fewer = {"type": "COMBO", "required": True, "options": ["a"], "default": "a"}
    assert broken_promises(old, changed(policy=fewer))
    assert broken_promises(old, {**old, "outputs": ["LATENT"]})
    assert broken_promises(old, {**old, "inputs": dict(reversed(old["inputs"].items()))})


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_words_that_a_user_sees(nodes, node_id):
    schema = schema_of(nodes, node_id)
    assert node_id.startswith("Slipstream")
    assert schema.display_name.startswith("Slipstream ")
    assert schema.category in CATEGORIES
    assert schema.description.split(" ")[0] in {"Output-preserving.", "Approximate."}
    assert schema.search_aliases
    unexplained = [i.id for i in schema.inputs if len(i.tooltip or "") < 20]
    assert unexplained == []
    assert [o.id for o in schema.outputs if not o.tooltip] == []


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_at_most_three_plain_widgets(nodes, node_id):
    plain = [
        i.id
        for i in schema_of(nodes, node_id).inputs
        if i.get_io_type() not in SOCKETS and not getattr(i, "advanced", None)
    ]
    assert len(plain) <= 3, plain


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_execute_repeats_the_defaults_of_optional_inputs(nodes, node_id):
    """A prompt saved before an input existed leaves it out: execute() gets its own default."""
    parameters = inspect.signature(nodes[node_id].execute).parameters
    schema = schema_of(nodes, node_id)
    assert set(parameters) == {i.id for i in schema.inputs}
    for one in schema.inputs:
        if one.optional:
            assert parameters[one.id].default == getattr(one, "default", None), one.id
        else:
            assert parameters[one.id].default is inspect.Parameter.empty, one.id


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_help_page_names_every_widget(nodes, node_id):
    page = PACK_ROOT / "nodes" / "web" / "docs" / f"{node_id}.md"
    assert page.is_file(), f"write {page.relative_to(PACK_ROOT)}"
    text = page.read_text(encoding="utf-8")
    schema = schema_of(nodes, node_id)
    widgets = [i.id for i in schema.inputs if i.get_io_type() not in SOCKETS]
    assert [name for name in widgets if f"`{name}`" not in text] == []
    label = schema.description.split(" ")[0]
    assert label in text


def test_no_help_page_without_a_node():
    pages = {p.stem for p in (PACK_ROOT / "nodes" / "web" / "docs").glob("*.md")}
    assert pages == set(NODE_IDS)
