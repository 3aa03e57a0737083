"""The shipped workflows as files: twins agree, seeds fixed, pictures there, nothing foreign.

What needs the real schemas is in server/test_workflows.py, what needs the frontend in browser/.
"""

import json
import re

import pytest
from comfy_home import PACK_ROOT
from pack_nodes import node_ids

FOLDER = PACK_ROOT / "workflows"
GUI = sorted(FOLDER.glob("*.json"))
API = sorted((FOLDER / "api").glob("*.json"))
VIRTUAL = {"MarkdownNote", "Note"}  # exist in the page only
FRONTEND_WIDGETS = {"control_after_generate"}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def converted(workflow: dict) -> dict:
    """The API prompt of a GUI file: what the frontend makes of plain nodes, links and widgets."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in VIRTUAL:
            continue
        inputs = dict(node.get("widgets_values_named") or {})
        for name in FRONTEND_WIDGETS:
            inputs.pop(name, None)
        inputs.update(
            {i["name"]: sources[i["link"]] for i in node["inputs"] if i["link"] is not None}
        )
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def without_titles(prompt: dict) -> dict:
    return {i: {"class_type": n["class_type"], "inputs": n["inputs"]} for i, n in prompt.items()}


def test_there_are_workflows():
    assert GUI, "the first level of workflows/ is what the template browser lists"


@named(GUI)
def test_gui_file_and_api_twin_are_the_same_prompt(path):
    twin = read(FOLDER / "api" / path.name)
    assert converted(read(path)) == without_titles(twin)


@named(GUI)
def test_picture_of_the_same_name(path):
    picture = path.with_suffix(".jpg")
    assert picture.is_file()
    assert picture.read_bytes()[:3] == b"\xff\xd8\xff"
    assert picture.stat().st_size < 300_000


@named(GUI)
def test_seeds_stay_what_they_are(path):
    for node in read(path)["nodes"]:
        named_values = node.get("widgets_values_named") or {}
        assert named_values.get("control_after_generate", "fixed") == "fixed", node["type"]
        if "control_after_generate" in named_values:
            assert "fixed" in node["widgets_values"]


@named(GUI)
def test_nodes_say_which_pack_they_are_from(path):
    for node in read(path)["nodes"]:
        pack = node["properties"].get("cnr_id", "comfy-core")
        expected = "slipstream" if node["type"].startswith("Slipstream") else "comfy-core"
        assert pack == expected, node["type"]
        assert "aux_id" not in node["properties"]


@named(GUI)
def test_every_model_file_comes_with_its_address(path):
    """Without it the page cannot offer to fetch what is missing."""
    for node in read(path)["nodes"]:
        values = [v for v in node.get("widgets_values") or [] if isinstance(v, str)]
        files = {v for v in values if v.endswith((".safetensors", ".gguf", ".pt"))}
        offered = node["properties"].get("models", [])
        assert {m["name"] for m in offered} == files
        for model in offered:
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith("/" + model["name"])
            assert model["directory"] in {"diffusion_models", "text_encoders", "vae"}


@named(GUI)
def test_no_two_nodes_lie_on_each_other(path):
    boxes = [(n["type"], *n["pos"], *n["size"]) for n in read(path)["nodes"]]
    for i, (one, x, y, width, height) in enumerate(boxes):
        for other, x2, y2, width2, height2 in boxes[i + 1 :]:
            apart = (
                x + width <= x2
                or x2 + width2 <= x
                or y + height + 30 <= y2
                or y2 + height2 + 30 <= y
            )
            assert apart, (one, other)


@named([*GUI, *API])
def test_nothing_of_a_machine_is_in_the_file(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(root|home|tmp|work|Users)/|[A-Z]:\\\\|127\.0\.0\.1|localhost", text)


@pytest.mark.parametrize("node_id", node_ids())
def test_every_node_of_ours_is_in_a_workflow(node_id):
    shown = {node["type"] for path in GUI for node in read(path)["nodes"]}
    assert node_id in shown
