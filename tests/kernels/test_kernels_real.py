"""Adapters against the packages themselves: whether they are found, what they take, their names.

CUDA is faked for each kind of GPU; nothing here computes on one.
"""

import pytest

KITCHENS = ("kitchen-0.2.31", "kitchen")


def capability(sm):
    return {"capability": divmod(sm, 10)}


def available(ask, packages, *ids):
    """What kernels say on a Hopper with these packages and no others."""
    (found,) = ask("availability", packages, sms=[90], ids=ids)
    return found


@pytest.fixture(scope="module", params=KITCHENS)
def kitchen(request, ask):
    """A version of comfy-kitchen whose compiled extension loads here."""
    problem = ask("kitchen_extension", (request.param,), sm=89)
    if problem is not None:
        pytest.skip(f"{request.param}'s extension does not load here: {problem}")
    return request.param


def test_balanced_chooses_ck_int8_on_sm89(ask, kitchen):
    """With nothing else installed than what ComfyUI requires."""
    calls = [
        capability(89), {**capability(89), "mask": "bool"}, {**capability(89), "k_tokens": 77}
    ]  # fmt: skip
    assert ask("choice", (kitchen,), sm=89, policy="balanced", calls=calls) == ["ck_int8"] * 3


def test_kitchen_is_asked_in_its_own_terms_on_every_gpu(ask, kitchen):
    sms = [70, 75, 80, 86, 89, 90, 100, 120]
    answers = ask("availability", (kitchen,), sms=sms, ids=["ck_int8", "sol_attn"])
    for sm, found in zip(sms, answers, strict=True):
        if sm >= 75:
            assert found["ck_int8"] is None
        else:
            assert found["ck_int8"].startswith("comfy-kitchen's INT8 attention does not run here")
        if kitchen == "kitchen-0.2.31":
            assert found["sol_attn"].startswith("comfy-kitchen 0.2.31 has no Sol-Attn")
        elif sm >= 80:
            assert found["sol_attn"] is None
        else:
            assert found["sol_attn"].startswith("comfy-kitchen's Sol-Attn does not run here")


NEWEST = pytest.mark.parametrize("kitchen", ["kitchen"], indirect=True)


@NEWEST
def test_fastest_chooses_sol_attn_for_long_calls_and_int8_for_others(ask, kitchen):
    calls = [capability(89), {**capability(89), "q_tokens": 4096, "k_tokens": 4096}]
    found = ask("choice", (kitchen,), sm=89, policy="fastest", calls=calls)
    assert found == ["sol_attn", "ck_int8"]


def test_operators_take_what_adapters_give(ask, kitchen):
    plain = {"head_dim": 128, "q_tokens": 128, "k_tokens": 128, "heads": 4, "layout": "qkv"}
    cases = [plain, {**plain, "kv_heads": 4, "mask": [128, 128], "scale": 0.1}]
    assert ask("shapes", (kitchen,), sm=89, kernel="ck_int8", cases=cases) == [[1, 4, 128, 128]] * 2


@NEWEST
def test_sol_attn_needs_as_much_memory_as_we_count(ask, kitchen):
    sizes = [(12_288, 24), (32_760, 40), (75_600, 40)]
    for needed in ask("sol_workspace", (kitchen,), sizes=sizes):
        assert 0.9 < needed / 3.6 < 1.02


def test_nothing_is_imported_for_a_cpu_or_for_calls_nobody_takes(ask):
    packages = ("kitchen", "sageattention", "flash4")
    calls = [{"device_type": "cpu"}, {**capability(89), "dtype": "float64"}]
    assert ask("imported", packages, calls=calls) == []


def test_sage1_is_found_and_is_not_sage2(ask):
    twos = ["sage2", "sage2_fp16_accum", "sage2_fp32_accum", "sage2_triton"]
    found = available(ask, ("sageattention",), "sage1", *twos)
    assert found.pop("sage1") is None
    assert set(found) == set(twos)
    for reason in found.values():
        assert "is not installed (found 1.0.6, which is 'sage1')" in reason


def test_flash4_alone_is_told_from_flash2(ask):
    found = available(ask, ("flash4",), "flash2", "flash4")
    assert found["flash4"] is None
    assert "with flash-attn-4 choose 'flash4'" in found["flash2"]
    assert {"softmax_scale", "return_lse"} <= set(ask("flash4_names", ("flash4",), sm=90))


def test_flash4_takes_the_widths_that_our_rule_names(ask):
    found = ask("flash4_widths", ("flash4",), sm=90, sms=[90, 100, 110])
    for sm, (package, own) in found.items():
        assert own == package, sm


def test_xformers_is_found_and_ends_where_our_rule_does(ask):
    assert available(ask, ("xformers",), "xformers") == {"xformers": None}
    assert ask("xformers_limits", ("xformers",), sm=90) == {"cutlass": [9, 0], "flash": None}


def test_flash4_alone_breaks_xformers_which_is_a_sentence(ask):
    found = available(ask, ("xformers", "flash4"), "xformers", "flash4")
    assert found["flash4"] is None
    assert found["xformers"].startswith("xformers is installed but cannot be imported (")
