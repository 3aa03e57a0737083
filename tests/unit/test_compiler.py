"""What we do with a core that records the memory of blocks, and with one that does not."""

import sys
import types

import pytest
from slipstream.backends import compiler


class PauseFlag:
    """A stand-in of comfy.model_prefetch: its pause is one flag, as comfy-aimdo's is."""

    def __init__(self):
        self.paused = False
        self.calls = []

    def pause_malloc_graph(self, sync=False):
        return self

    def __enter__(self):
        self.paused = True
        self.calls.append("pause")

    def __exit__(self, *_):
        self.paused = False
        self.calls.append("resume")


@pytest.fixture
def recording_core(monkeypatch):
    flag = PauseFlag()
    module = types.ModuleType("comfy.model_prefetch")
    module.pause_malloc_graph = flag.pause_malloc_graph
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
    return flag


def test_unrecorded_pauses_the_record_of_core(recording_core):
    with compiler.unrecorded():
        assert recording_core.paused
    assert recording_core.calls == ["pause", "resume"]


def test_an_inner_unrecorded_does_not_end_the_outer_one(recording_core):
    with compiler.unrecorded():
        with compiler.unrecorded():
            pass
        assert recording_core.paused
    assert not recording_core.paused


def test_unrecorded_resumes_after_an_exception(recording_core):
    with pytest.raises(KeyboardInterrupt), compiler.unrecorded():
        raise KeyboardInterrupt
    assert not recording_core.paused
    with compiler.unrecorded():
        assert recording_core.paused


@pytest.mark.parametrize("module", [None, types.ModuleType("comfy.model_prefetch")])
def test_a_core_that_records_nothing_has_nothing_to_pause(monkeypatch, module):
    if module is None:
        monkeypatch.delitem(sys.modules, "comfy.model_prefetch", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
    with compiler.unrecorded():
        pass
