from slipstream.backends.run import step_of


def test_step_of_matches_sigmas():
    sigmas = (1.0, 0.75, 0.5, 0.25, 0.0)
    assert [step_of(s, sigmas) for s in sigmas] == [0, 1, 2, 3, 3]
    assert step_of(0.6, sigmas) == 1
    assert step_of(2.0, sigmas) == 0
