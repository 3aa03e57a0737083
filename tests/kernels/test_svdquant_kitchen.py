"""SVDQuant under a torch built for CUDA 12, with the oldest comfy-kitchen that we take and the
newest: the case matrix is in host/test_svdquant_direct.py. CUDA is faked."""

import pytest


@pytest.mark.parametrize("kitchen", ["kitchen-0.2.31", "kitchen"])
def test_its_compiled_functions_are_called_past_the_registry(ask, kitchen):
    problem = ask("kitchen_extension", (kitchen,), sm=89)
    if problem is not None:
        pytest.skip(f"{kitchen}'s extension does not load here: {problem}")
    cases = [{"backend": "kitchen"}, {"fault": "values"}, {"driver": [12, 8]}]
    right, wrong, old_driver = ask("svdquant", (kitchen,), check="direct", cases=cases)
    assert right["ran"] == {"int4": "kitchen", "awq": "kitchen"}
    assert [call["name"] for call in right["calls"]] == ["quantize", "matmul", "gemv"]
    assert right["errors"]["int4"] < 0.03
    for found in (wrong, old_driver):
        assert found["ran"] == {"int4": "dequant", "awq": "dequant"}
    name = "COMFY_KITCHEN_SVDQUANT_DIRECT_CUDA"
    rules = [{}, {"env": {name: "off"}}, {"override": "eager"}, {"extension": False}]
    answers = ask("svdquant", (kitchen,), check="same_rule", cases=rules)
    assert answers == [[True, True], [False, False], [False, False], [False, False]]
    before, during, after = ask("svdquant", (kitchen,), check="workspaces", num_sizes=3)
    assert before == after < during
