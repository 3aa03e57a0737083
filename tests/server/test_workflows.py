"""The shipped workflows against the real schemas, and run on the tiny models."""

import json

import pytest
import queue_client
from comfy_home import PACK_ROOT
from tiny_prompts import on_tiny_models

# The prompt of ./run needs the demo pack that ./run links: test_run_command.py queues it.
QUICKSTART = "quickstart"
API = sorted(p for p in (PACK_ROOT / "workflows" / "api").glob("*.json") if p.stem != QUICKSTART)
GUI = {path.stem for path in (PACK_ROOT / "workflows").glob("*.json")}
FILES = (".safetensors", ".gguf", ".pt")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"


def prompt_of(path):
    return json.loads(path.read_text(encoding="utf-8"))


def inputs_of(schema: dict, values: dict) -> dict:
    """name -> (type or options, settings) of a node, with what the chosen options add."""
    listed = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
    found = {}
    queue = list(listed.items())
    while queue:
        name, one = queue.pop()
        kind, settings = one[0], one[1] if len(one) > 1 else {}
        found[name] = (kind, settings)
        if kind == DYNAMIC:
            chosen = [o for o in settings["options"] if o["key"] == values.get(name)]
            for option in chosen:
                for group in option["inputs"].values():
                    queue += [(f"{name}.{child}", child_one) for child, child_one in group.items()]
    return found


def complaints(prompt: dict, schemas: dict) -> list[str]:
    """What of `prompt` does not exist in the schemas: nodes, inputs, options, ranges, sockets."""
    found = []
    for node_id, node in prompt.items():
        where = f"{node_id} {node['class_type']}"
        schema = schemas.get(node["class_type"])
        if schema is None:
            found.append(f"{where}: no such node")
            continue
        known = inputs_of(schema, node["inputs"])
        missing = set(schema["input"].get("required", {})) - set(node["inputs"])
        found += [f"{where}: {name} is missing" for name in missing]
        for name, value in node["inputs"].items():
            if name not in known:
                found.append(f"{where}: no input {name}")
            elif isinstance(value, list):
                source = schemas[prompt[value[0]]["class_type"]]["output"][value[1]]
                if known[name][0] not in ("*", source):
                    found.append(f"{where}: {name} takes {known[name][0]}, not {source}")
            elif wrong := bad_value(value, *known[name]):
                found.append(f"{where}: {name}={value!r} {wrong}")
    return found


def bad_value(value, kind, settings) -> str | None:
    """Why a widget cannot hold `value`; names of model files differ per machine."""
    if kind == DYNAMIC:
        keys = [option["key"] for option in settings["options"]]
        return None if value in keys else f"is none of {keys}"
    options = kind if isinstance(kind, list) else settings.get("options")
    if options is not None:
        is_file = isinstance(value, str) and value.endswith(FILES)
        return None if value in options or is_file else f"is none of {options}"
    if kind in ("INT", "FLOAT"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "is no number"
        inside = settings.get("min", value) <= value <= settings.get("max", value)
        return None if inside else "is out of range"
    types = {"STRING": str, "BOOLEAN": bool}
    return None if isinstance(value, types.get(kind, object)) else f"is no {kind}"


@pytest.fixture(scope="module")
def schemas(server):
    return server.get("/object_info")


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_every_node_input_and_option_exists(schemas, path):
    assert complaints(prompt_of(path), schemas) == []


def test_a_wrong_prompt_is_found(schemas):
    """Negative control of the check above."""
    good = {
        "1": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "a.pt", "weight_dtype": "default"},
        },
        "2": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 3.0}},
    }
    assert complaints(good, schemas) == []
    for node_id, name, value in (
        ("1", "weight_dtype", "fp3"),
        ("2", "shift", -1.0),
        ("2", "shift", "3"),
        ("2", "shft", 3.0),
    ):
        bad = json.loads(json.dumps(good))
        bad[node_id]["inputs"][name] = value
        assert len(complaints(bad, schemas)) == 1, (name, value)
    bad = json.loads(json.dumps(good))
    bad["2"]["class_type"] = "ModelSamplingSD33"
    assert complaints(bad, schemas) == ["2 ModelSamplingSD33: no such node"]
    del good["2"]["inputs"]["shift"]
    assert complaints(good, schemas) == ["2 ModelSamplingSD3: shift is missing"]


def test_template_browser_lists_them(server):
    assert set(server.get("/workflow_templates")["slipstream"]) == GUI


@pytest.mark.parametrize("path", [p for p in API if p.stem in GUI], ids=lambda path: path.stem)
def test_runs_on_the_tiny_models_and_reports(server, path):
    prompt = on_tiny_models(prompt_of(path), seed=611, steps=6)
    reports = [i for i, n in prompt.items() if n["class_type"] == "SlipstreamReport"]
    result = queue_client.run(server, prompt)
    for node_id in reports:
        text = result.outputs[node_id]["text"][0]
        assert "6 steps" in text
        assert result.progress_text[node_id].replace("  \n", "\n") == text
        assert result.outputs[node_id]["images"][0]["type"] == "temp"


@pytest.mark.parametrize("path", [p for p in API if p.stem in GUI], ids=lambda path: path.stem)
def test_report_follows_the_seed_and_the_cache(server, path):
    """The patched MODEL stays in ComfyUI's cache: each run has its own numbers."""

    def report(seed, steps):
        prompt = on_tiny_models(prompt_of(path), seed=seed, steps=steps)
        node_id = next(i for i, n in prompt.items() if n["class_type"] == "SlipstreamReport")
        result = queue_client.run(server, prompt)
        return result.outputs[node_id]["text"][0], node_id in result.cached

    first, _ = report(612, 6)
    again, was_cached = report(612, 6)
    other, _ = report(613, 8)
    assert was_cached
    assert again == first
    assert "6 steps" in first
    assert "8 steps" in other
    assert first.split(":")[0] != other.split(":")[0], "run numbers"
