"""The comfy-kitchen that this ComfyUI has, asked by our adapter with a faked GPU."""

import kernels_home
import pytest


def test_balanced_chooses_the_8_bit_kernel_that_comfyui_brings(comfy):
    problem = kernels_home.ask("kitchen_extension")
    if problem is not None:
        pytest.skip(f"comfy-kitchen's extension does not load here: {problem}")
    calls = [{"capability": [8, 9]}, {"capability": [8, 9], "mask": "bool"}]
    found = kernels_home.ask("choice", sm=89, policy="balanced", calls=calls)
    assert found == ["ck_int8", "ck_int8"]
