"""The pack loads in a real ComfyUI server, with and without the packages it can use."""

from pathlib import Path

import pytest
import queue_client
from fake_packages import COMFYUI_DIES_OF, OPTIONAL, broken_packages
from isolated_server import PACKS, isolated_server
from pack_nodes import node_ids
from smoke_prompt import digest, flux_prompt

NODE_IDS = node_ids()
TEST_NODES = {
    f"SlipstreamTest{name}"
    for name in ("Clip", "Conditioning", "DemoClip", "Digest", "Fault", "Model")
}


def test_pack_loads_and_lists_its_nodes(server):
    assert "IMPORT FAILED" not in server.log(), server.log_tail()
    assert set(server.get("/object_info")) >= {*NODE_IDS, *TEST_NODES}


def test_every_node_belongs_to_this_pack(server):
    listed = server.get("/object_info")
    modules = {name: listed[name]["python_module"] for name in NODE_IDS}
    assert modules == dict.fromkeys(NODE_IDS, "custom_nodes.slipstream")
    assert not [
        n for n in listed if n.startswith("Slipstream") and n not in {*NODE_IDS, *TEST_NODES}
    ]


def test_queue_runs_caches_and_tells_seeds_apart(server):
    first = queue_client.run(server, flux_prompt(seed=101))
    again = queue_client.run(server, flux_prompt(seed=101))
    other = queue_client.run(server, flux_prompt(seed=102))
    assert "finite=True" in digest(first)
    assert "sampler" in again.cached
    assert "sampler" not in other.cached
    assert "model" in other.cached
    assert digest(first) == digest(again) != digest(other)
    assert [(value, most) for _, value, most in first.steps] == [(1, 2), (2, 2)]


def test_model_without_a_file_samples(server):
    prompt = flux_prompt(seed=103)
    prompt["model"] = {
        "class_type": "SlipstreamTestModel",
        "inputs": {"family": "qwen_image", "heads": 1, "seed": 0},
    }
    assert "finite=True" in digest(queue_client.run(server, prompt))


def test_missing_input_is_rejected_by_name(server):
    prompt = flux_prompt(seed=104)
    del prompt["sampler"]["inputs"]["steps"]
    with pytest.raises(queue_client.PromptRejected) as caught:
        queue_client.run(server, prompt)
    errors = caught.value.node_errors["sampler"]["errors"]
    assert [(e["type"], e["extra_info"]["input_name"]) for e in errors] == [
        ("required_input_missing", "steps")
    ]


def test_failing_node_is_reported(server):
    prompt = flux_prompt(seed=105)
    prompt["text"]["inputs"]["dim"] = 767  # the tiny Flux takes 768
    with pytest.raises(queue_client.PromptFailed) as caught:
        queue_client.run(server, prompt)
    assert caught.value.node_type == "KSampler"


def quick_load(packs: dict[str, Path], **environment: str) -> str:
    """Log of a server that leaves after loading, with exit code 0."""
    server = isolated_server(
        packs=packs, arguments=["--quick-test-for-ci"], environment=environment
    )
    try:
        assert server.spawn().wait(120) == 0, server.log_tail()
        return server.log()
    finally:
        server.stop()


def test_loads_without_the_test_pack():
    log = quick_load({"slipstream": PACKS["slipstream"]})
    assert "IMPORT FAILED" not in log
    assert "custom_nodes/slipstream" in log


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_loads_with_every_optional_package_broken(tmp_path, error):
    """A careless pack is the negative control: it imports one of them at its top and fails."""
    names = OPTIONAL if error == "ImportError" else sorted({*OPTIONAL} - COMFYUI_DIES_OF)
    careless = tmp_path / "careless"
    careless.mkdir()
    (careless / "__init__.py").write_text(f"import {names[0]}\nNODE_CLASS_MAPPINGS = {{}}\n")
    log = quick_load(
        {"slipstream": PACKS["slipstream"], "careless": careless},
        PYTHONPATH=str(broken_packages(tmp_path, error, names)),
    )
    failed = [line for line in log.splitlines() if "IMPORT FAILED" in line]
    assert [Path(line.split()[-1]).name for line in failed] == ["careless"], log[-3000:]
