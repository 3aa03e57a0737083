"""What outlives a run: accuracy verdicts and frozen kernel plans, on disk."""

import json

import pytest
from slipstream.backends.attention import verdicts as verdicts_module
from slipstream.backends.attention.config import AttentionConfig, AttentionError
from slipstream.backends.attention.frozen import FOLDER, FrozenPlan, plan_of
from slipstream.backends.attention.probe import Verdict
from slipstream.backends.attention.request import BlockKey, Request
from slipstream.backends.attention.verdicts import FILE_NAME, Verdicts

REQUEST = Request(
    device_type="cuda", dtype="float16", batch=1, heads=24, kv_heads=24, q_tokens=4608,
    k_tokens=4608, head_dim=128, device_name="H100",
)  # fmt: skip
SMALL = Request(
    device_type="cuda", dtype="float16", batch=1, heads=24, kv_heads=24, q_tokens=64,
    k_tokens=64, head_dim=128, device_name="H100",
)  # fmt: skip
GOOD, WORSE, BAD = Verdict(0.01, 0.999, True), Verdict(0.02, 0.998, True), Verdict(0.3, 0.9, True)
NAN = Verdict(float("inf"), 0.0, False)


def block(index):
    return BlockKey("double", index, 0)


def test_verdicts_last_per_model_layer_kernel_and_shape(tmp_path):
    first = Verdicts(tmp_path, "flux a", {})
    first.put(block(0), REQUEST, "sage2", GOOD)
    first.put(block(1), REQUEST, "sage2", NAN)
    assert first.save() is None
    again = Verdicts(tmp_path, "flux a", {})
    assert again.known(block(0), REQUEST, "sage2") == GOOD
    assert again.known(block(1), REQUEST, "sage2").finite is False
    assert again.known(block(2), REQUEST, "sage2") is None
    assert again.known(block(0), REQUEST, "ck_int8") is None
    assert again.known(block(0), SMALL, "sage2") is None
    assert Verdicts(tmp_path, "flux b", {}).known(block(0), REQUEST, "sage2") is None
    newer = Verdicts(tmp_path, "flux a", {"sageattention": "2.3"})
    assert newer.known(block(0), REQUEST, "sage2") is None


def test_the_worst_layer_that_passed_stands_for_the_others(tmp_path):
    verdicts = Verdicts(tmp_path, "flux", {})
    for index, verdict in enumerate((GOOD, WORSE, GOOD, NAN)):
        verdicts.put(block(index), REQUEST, "sage2", verdict)

    def samples(limit):
        def passes(verdict):
            return verdict.against(limit, 0.9) is None

        return [i for i in range(4) if verdicts.is_sample(block(i), REQUEST, "sage2", passes)]

    assert samples(0.05) == [1]
    assert len(samples(0.015)) == 1  # stricter limits: another layer is the closest to them
    assert samples(0.015) != [1]
    assert samples(0.001) == []


def test_the_worse_of_two_checks_stays(tmp_path):
    verdicts = Verdicts(tmp_path, "flux", {})
    for verdict in (GOOD, WORSE, GOOD):
        verdicts.put(block(0), REQUEST, "sage2", verdict)
    assert verdicts.known(block(0), REQUEST, "sage2") == WORSE
    verdicts.put(block(0), REQUEST, "sage2", NAN)
    verdicts.put(block(0), REQUEST, "sage2", GOOD)
    assert not verdicts.known(block(0), REQUEST, "sage2").finite


def test_distrusted_verdicts_are_gone_also_from_the_file(tmp_path):
    verdicts = Verdicts(tmp_path, "flux", {})
    verdicts.put(block(0), REQUEST, "sage2", GOOD)
    verdicts.put(block(0), SMALL, "sage2", GOOD)
    verdicts.save()
    again = Verdicts(tmp_path, "flux", {})
    again.distrust(REQUEST, "sage2")
    assert again.known(block(0), REQUEST, "sage2") is None
    assert again.known(block(0), SMALL, "sage2") == GOOD
    again.save()
    assert Verdicts(tmp_path, "flux", {}).known(block(0), REQUEST, "sage2") is None


def test_only_the_latest_models_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts_module, "MOST_MODELS", 3)
    for name in "abcd":
        verdicts = Verdicts(tmp_path, name, {})
        verdicts.put(block(0), REQUEST, "sage2", GOOD)
        verdicts.save()
    assert list(json.loads((tmp_path / FILE_NAME).read_text())["models"]) == ["b", "c", "d"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": 1, "models": []}', '{"format": 1, "models": {"flux": {"k": {"l": 3}}}}'],
)
def test_damaged_file_is_written_anew(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    verdicts = Verdicts(tmp_path, "flux", {})
    assert verdicts.known(block(0), REQUEST, "sage2") is None
    verdicts.put(block(0), REQUEST, "sage2", GOOD)
    assert verdicts.save() is None
    assert Verdicts(tmp_path, "flux", {}).known(block(0), REQUEST, "sage2") == GOOD


DECIDED = [
    (block(0), REQUEST, False, "sage2"),
    (block(1), REQUEST, False, "sage2"),
    (block(2), REQUEST, False, "cudnn"),
    (block(0), REQUEST, True, "cudnn"),
    (block(0), SMALL, False, "default"),
]


def test_plan_names_the_usual_kernel_of_a_shape_and_the_exceptions():
    plan = plan_of(DECIDED, "H100 torch=2.11")
    assert sorted(map(len, plan["choices"].values())) == [1, 1, 2]
    frozen = FrozenPlan(json.dumps(plan), None)
    for key, request, dense, kernel in DECIDED:
        assert frozen.choice(key, request, dense) == kernel
    assert frozen.choice(block(9), REQUEST, False) == "sage2"
    assert frozen.num_missing == 0
    assert frozen.choice(block(0), SMALL, True) is None
    assert frozen.num_missing == 1


def test_named_plan_is_written_once_and_extended_by_new_shapes(tmp_path):
    first = FrozenPlan("my film", tmp_path)
    assert first.is_new
    assert first.choice(block(0), REQUEST, False) is None
    assert first.save(plan_of(DECIDED[:3], "H100")) is None
    assert (tmp_path / FOLDER / "my film.json").is_file()
    again = FrozenPlan("my film", tmp_path)
    assert not again.is_new
    changed = [(block(0), REQUEST, False, "ck_int8"), (block(0), SMALL, False, "flash_sdpa")]
    assert again.save(plan_of(changed, "H100")) is None
    third = FrozenPlan("my film", tmp_path)
    assert third.choice(block(0), REQUEST, False) == "sage2"
    assert third.choice(block(0), SMALL, False) == "flash_sdpa"
    anew = FrozenPlan("my film", tmp_path, forget=True)
    assert anew.is_new
    anew.save(plan_of(changed, "H100"))
    assert FrozenPlan("my film", tmp_path).choice(block(0), REQUEST, False) == "ck_int8"


@pytest.mark.parametrize("text", ["../up", "a/b", "{", '{"choices": 3}', "{}", "\\x", " "])
def test_what_is_no_plan_is_refused_with_a_sentence(text):
    with pytest.raises(AttentionError, match="freeze"):
        AttentionConfig(freeze=text)


def test_names_and_json_are_taken():
    assert AttentionConfig(freeze="Wan 2.2 low-noise").freeze
    assert AttentionConfig(freeze=json.dumps(plan_of(DECIDED, "")))
