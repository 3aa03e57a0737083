"""The kernel in docs/adding-a-kernel.md works as printed."""

import importlib.util
import sys
from types import ModuleType

import comfy_home
import pytest
import torch
from slipstream.backends.attention.request import Request
from torch.nn import functional

PAGE = comfy_home.PACK_ROOT / "docs" / "adding-a-kernel.md"
NAME = "slipstream.backends.attention.kernels.fast"


@pytest.fixture
def fast(tmp_path, monkeypatch):
    """The page's module, loaded as if it lay in the kernels folder."""
    code = PAGE.read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "fast.py").write_text(code)
    spec = importlib.util.spec_from_file_location(NAME, tmp_path / "fast.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, module)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_a_kernel_that_runs(fast, monkeypatch):
    def attend(q, k, v, scale):
        assert q.shape == (2, 10, 4, 48)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)

    kernel = fast.Fast()
    assert kernel.available() == "fastattn is not installed. pip install fastattn"
    package = ModuleType("fastattn")
    package.attend = attend
    monkeypatch.setitem(sys.modules, "fastattn", package)
    kernel = fast.Fast()
    assert kernel.available() is None
    q, k, v = (torch.randn(2, 4, n, 44) for n in (10, 7, 7))
    wanted = functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(kernel.run(q, k, v), wanted, atol=1e-6)


def test_the_page_shows_rules_that_speak(fast):
    request = Request(
        device_type="cuda", capability=(7, 5), dtype="float16", batch=1, heads=8, kv_heads=8,
        q_tokens=64, k_tokens=64, head_dim=64,
    )  # fmt: skip
    assert fast.Fast().ineligible(request) == "SM75: fast needs SM80 or newer"
