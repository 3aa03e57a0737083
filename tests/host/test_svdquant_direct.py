"""4-bit kernels under a torch built for CUDA 12: the real comfy-kitchen of this ComfyUI on a faked
GPU, its compiled functions called past the registry that ComfyUI has switched off, and checked."""

import kernels_home
import pytest

OFF = "4-bit kernels are off: "


def ask(check, **more):
    return kernels_home.ask("svdquant", check=check, **more)


@pytest.fixture(scope="module", autouse=True)
def _kitchen(comfy):
    problem = kernels_home.ask("kitchen_extension")
    if problem is not None:
        pytest.skip(f"comfy-kitchen's extension does not load here: {problem}")


BY_HAND, AUTO, DRIVER, SWITCH, WRONG_BY_HAND = range(5)
FAULTS = {
    "values": "its result on this device is wrong (relative error 0.2",
    "silent": "its result on this device is wrong",
    "unstable": "equal calls give different results on this device",
    "ImportError": "failed on this device: ImportError: faked",
    "RuntimeError": "failed on this device: RuntimeError: faked",
}


@pytest.fixture(scope="module")
def found():
    cases = [
        {"backend": "kitchen"},
        {},
        {"driver": [12, 8]},
        {"env": {"COMFY_KITCHEN_SVDQUANT_DIRECT_CUDA": "0"}},
        {"backend": "kitchen", "fault": "values"},
        *({"fault": fault} for fault in FAULTS),
    ]
    return ask("direct", cases=cases)


def test_the_compiled_functions_are_called_and_right(found):
    found = found[BY_HAND]
    assert found["ran"] == {"int4": "kitchen", "awq": "kitchen"}
    assert found["errors"]["int4"] < 0.03
    assert found["errors"]["awq"] < 0.01
    assert found["reasons"] == {}
    assert found["notices"] == []
    quantise, matmul, gemv = found["calls"]
    assert quantise["name"] == "quantize"
    assert quantise["x"] == [3, 384]
    assert quantise["q"] == [256, 192]  # rows padded, two codes in a byte
    assert quantise["ascales"] == [6, 256]
    assert matmul["name"] == "matmul"
    assert matmul["wgt"] == [256, 192]
    assert matmul["wscales"] == [6, 256]
    assert matmul["up"] == [256, 16]
    assert matmul["out"] == [256, 256]
    assert gemv["name"] == "gemv"
    assert gemv["x"] == [3, 128]


def test_auto_measures_it_beside_dequant(found):
    assert found[AUTO]["measured"] == ["dequant", "kitchen"]
    assert found[AUTO]["notices"] == []
    assert found[AUTO]["checks"] > 12  # three equal calls, signed and unsigned, and the gemv


@pytest.mark.parametrize(("index", "words"), enumerate(FAULTS.values(), WRONG_BY_HAND + 1))
def test_kernels_that_fail_the_check_are_not_used(found, index, words):
    found = found[index]
    assert found["ran"] == {"int4": "dequant", "awq": "dequant"}
    assert found["calls"] == []
    assert words in found["reasons"]["kitchen"]
    (notice,) = found["notices"]
    assert notice.startswith(OFF + words[:20])


def test_a_kernel_that_fails_the_check_is_an_error_where_it_was_chosen(found):
    error = found[WRONG_BY_HAND]["error"]
    assert error.startswith("backend kitchen cannot run this model here: its result on")
    assert error.endswith("Choose backend auto or dequant.")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            DRIVER,
            "the NVIDIA driver knows CUDA 12.8, and comfy-kitchen's kernels need CUDA 13 "
            "(driver 580 or newer): torch ",
        ),
        (
            SWITCH,
            "comfy-kitchen's kernels are switched off by COMFY_KITCHEN_SVDQUANT_DIRECT_CUDA: ",
        ),
    ],
)
def test_what_to_do_is_said(found, index, words):
    found = found[index]
    (notice,) = found["notices"]
    assert notice.startswith(OFF + words)
    assert "is built for CUDA 12.8; install a torch for CUDA 13 (cu130)" in notice
    assert found["ran"] == {"int4": "dequant", "awq": "dequant"}
    assert found["checks"] == 0


def test_our_rule_is_the_one_of_comfy_kitchens_own_layout():
    name = "COMFY_KITCHEN_SVDQUANT_DIRECT_CUDA"
    cases = [
        {},
        *({"env": {name: value}} for value in ("0", "no", "OFF", "1", "yes", " false ", "")),
        {"override": "eager"},
        {"extension": False},
    ]
    found = ask("same_rule", cases=cases)
    assert all(ours == theirs for ours, theirs in found), found
    assert {ours for ours, _ in found} == {True, False}


def test_workspaces_of_12_sizes_are_gone_after_the_run():
    before, during, after = ask("workspaces", num_sizes=12)
    # codes, scales and low-rank rows of 256 to 3,072 padded rows
    assert during - before >= sum(256 * n * (384 // 2 + 2 * 6 + 2 * 16) for n in range(1, 13))
    assert after == before


def test_rows_are_split_where_32_bit_indices_would_overflow():
    found = ask("split_rows", limit=200_000)
    assert found == {"rows": [512, 488], "equal": True, "largest": 512}
