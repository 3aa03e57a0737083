"""README.md names what exists: nodes with their labels, commands, files, and no number."""

import re

import pytest
from comfy_home import PACK_ROOT
from pack_nodes import node_ids

README = (PACK_ROOT / "README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| [^|]+ \| `(Slipstream\w+)` \|(.*)\|$", README, re.M))


def test_table_lists_exactly_our_nodes():
    assert sorted(ROWS) == node_ids()


@pytest.mark.parametrize("node_id", node_ids())
def test_label_is_that_of_the_node(node_id):
    sources = "".join(p.read_text(encoding="utf-8") for p in (PACK_ROOT / "nodes").glob("*.py"))
    schema = sources.split(f'node_id="{node_id}"')[1]
    label = re.search(r"description=\(?\s*\"([\w-]+)\.", schema).group(1)
    assert ROWS[node_id].split("|")[-1].strip().startswith(label)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (PACK_ROOT / link).exists()] == []


def test_folders_and_programs_exist():
    block = README.split("## For developers")[1].split("```")[1]
    named = re.findall(r"^\s*((?:\w+/\s+)+)", block, re.M)
    folders = [folder for line in named for folder in line.split()]
    assert len(folders) >= 8
    for folder in folders:
        places = (PACK_ROOT / folder, PACK_ROOT / "backends" / folder)
        assert any(place.is_dir() for place in places), folder
    assert (PACK_ROOT / "run").stat().st_mode & 0o111
    assert (PACK_ROOT / "test").stat().st_mode & 0o111


def test_workflows_named_exist():
    named = set(re.findall(r"`(slipstream-[a-z-]+)`", README))
    assert named
    assert all((PACK_ROOT / "workflows" / f"{name}.json").is_file() for name in named)
