"""Runs one of tests/browser/*.mjs against a server, with the chromium and playwright-core found."""

import os
import subprocess

import browser_home


def run_script(name: str, *arguments: object, timeout_s: float = 240) -> str:
    """What tests/browser/<name> printed. Raises AssertionError with its output if it failed."""
    found = browser_home.find()
    assert found is not None, browser_home.NOT_FOUND
    env = {**os.environ, "CHROMIUM": found.chromium}
    command = [found.node, str(browser_home.FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{name}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
