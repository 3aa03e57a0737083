"""A measurement in a process of its own: what it answers, or what it said last."""

import sys

import pytest
from slipstream.bench import children


@pytest.fixture
def child(tmp_path, monkeypatch):
    def running(text):
        script = tmp_path / "child.py"
        script.write_text(f"import sys\nsys.path.insert(0, {sys.path[0]!r})\n{text}")
        monkeypatch.setattr(children, "command", lambda *_: [sys.executable, str(script)])
        return children.ask("name")

    return running


def test_its_answer_is_taken_from_all_that_it_prints(child):
    assert child(f"print('x')\nprint({children._MARK!r} + '{{\"a\": 1}}')\nprint('y')") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("sys.exit('a sentence')", "a sentence"),
        ("raise RuntimeError('why')", "RuntimeError: why"),
        ("import os; os._exit(7)", "exit status 7"),
        ("import os; os.kill(os.getpid(), 9)", "exit status -9"),
    ],
)
def test_without_one_it_is_what_it_said_last(child, text, error):
    assert child(text) == {"error": error}


def test_its_progress_is_shown(child, capsys):
    child(f"sys.stderr.write('50%')\nprint({children._MARK!r} + '{{}}')")
    assert capsys.readouterr().err == "50%"


def test_a_file_is_written_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.json"
    children.write_text(path, "before")

    def full(self, *_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(children.Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        children.write_text(path, "after")
    assert path.read_text("utf-8") == "before"
