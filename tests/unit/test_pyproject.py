"""The registry's rules for pyproject.toml, and what is shipped."""

import re

import comfy_home
import pytest

tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
ROOT = comfy_home.PACK_ROOT


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_registry_metadata(pyproject):
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    assert project["name"] == "slipstream"  # immutable in the registry, without "ComfyUI"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"]
    assert project["urls"]["Repository"].startswith("https://github.com/")
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert "Icon" in comfy
    assert comfy["requires-comfyui"] == ">=0.33.0"
    assert "Environment :: GPU :: NVIDIA CUDA" in project["classifiers"]


def test_installing_the_pack_installs_nothing_else(pyproject):
    assert pyproject["project"]["dependencies"] == []
    for name in ("requirements.txt", "install.py", "prestartup_script.py"):
        assert not (ROOT / name).exists(), f"ComfyUI-Manager would run {name}"


def test_extras_never_name_what_comfyui_brings(pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    assert set(extras) >= {"sage", "flash", "cache-dit", "ray"}
    named = {
        re.split(r"[ <>=!~\[;]", item)[0].lower() for group in extras.values() for item in group
    }
    assert not named & {"torch", "torchvision", "numpy", "comfy-kitchen", "nunchaku"}


def test_license_is_apache(pyproject):
    text = (ROOT / pyproject["project"]["license"]["file"]).read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_changelog_names_the_version(pyproject):
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {pyproject['project']['version']}" in changelog


def test_tests_are_not_shipped():
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    assert {"tests/", ".ci/", "test"} <= set(ignored)
    assert not {"nodes/", "backends/", "parallel/", "workflows/", "bench/", "docs/"} & set(ignored)
