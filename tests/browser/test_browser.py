"""The pack in ComfyUI's own page, in both renderers: templates, graphs, a run, help, errors."""

import json

import browser_home
import pytest
from browser_page import run_script
from comfy_home import PACK_ROOT
from tiny_prompts import on_tiny_models

WORKFLOWS = PACK_ROOT / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
HELP = "The latent goes through unchanged"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=[True, False], ids=["vue", "canvas"])
def checks(request, server, tmp_path_factory):
    """Every check of check.mjs in one renderer: name -> (ok, detail)."""
    if browser_home.find() is None:
        pytest.skip(browser_home.NOT_FOUND)
    folder = tmp_path_factory.mktemp("browser")
    templates = [
        {
            "name": name,
            "workflow": read(WORKFLOWS / f"{name}.json"),
            "prompt": read(WORKFLOWS / "api" / f"{name}.json"),
        }
        for name in NAMES
    ]
    prompt = on_tiny_models(
        read(WORKFLOWS / "api" / "slipstream-attention-image.json"),
        seed=900 + request.param,
        steps=3,
    )
    node = next(i for i, n in prompt.items() if n["class_type"] == "SlipstreamReport")
    tiny = {"prompt": prompt, "node": node, "text": "3 steps (3 evaluations)", "help": HELP}
    (folder / "templates.json").write_text(json.dumps(templates))
    (folder / "tiny.json").write_text(json.dumps(tiny))
    out = run_script(
        "check.mjs",
        server.port,
        str(request.param).lower(),
        folder / "templates.json",
        folder / "tiny.json",
        folder / "page.png",
    )
    lines = [json.loads(line) for line in out.splitlines()]
    return {line["check"]: (line["ok"], line["detail"]) for line in lines}


def holds(checks, name):
    assert name in checks, f"check.mjs did not get to '{name}': {checks}"
    ok, detail = checks[name]
    assert ok, detail


@pytest.mark.parametrize("name", NAMES)
def test_workflow_loads_without_missing_nodes(checks, name):
    holds(checks, f"{name}: no missing node")


@pytest.mark.parametrize("name", NAMES)
def test_workflow_converts_to_its_api_twin(checks, name):
    holds(checks, f"{name}: converts to its twin")
    holds(checks, f"{name}: keeps its places")


@pytest.mark.parametrize("name", NAMES)
def test_workflow_is_in_the_template_browser(checks, name):
    holds(checks, f"{name}: in the template browser")
    holds(checks, "every template has its picture")


def test_run_from_the_page_finishes(checks):
    holds(checks, "queued from the page")


def test_report_is_on_the_node(checks):
    holds(checks, "the text is on the node")
    holds(checks, "the text is in the page")
    holds(checks, "the text keeps its lines")
    holds(checks, "the picture is on the node")


def test_help_page_opens(checks):
    holds(checks, "the help page opens")


def test_no_page_errors(checks):
    assert [name for name in checks if name.endswith("got through")] == []
    holds(checks, "no page errors")
