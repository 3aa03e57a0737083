"""A batch in parts: which rows a lane gets, how a call is cut, and lanes of real worker processes.

The workers run the pack's own message loop without ComfyUI (tests/fake_worker.py).
"""

import itertools
import os

import fake_net
import pytest
import torch
from parallel_session import PROGRAM, TIMEOUT_S, Session, close, fails, pids
from patience import patience
from slipstream.backends.architectures.rows import why_whole
from slipstream.parallel import batch
from slipstream.parallel.config import ParallelError, SequenceParallelConfig, choose_layout
from slipstream.parallel.distribute import Distributor
from slipstream.parallel.launcher import LocalLauncher
from slipstream.parallel.mesh import Layout
from slipstream.parallel.pool import Pool
from slipstream.parallel.workers import WorkerError

# --- dealing


def generated(seed, number):
    """(rows, speeds): 1 to 17 rows, 1 to 8 lanes, speeds of 1:1 to 10:1."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        rows = int(torch.randint(1, 18, (1,), generator=generator))
        lanes = int(torch.randint(1, 9, (1,), generator=generator))
        yield rows, (1 + 9 * torch.rand(lanes, generator=generator)).tolist()


def last_end(counts, speeds):
    return max(count / speed for count, speed in zip(counts, speeds, strict=True))


def test_every_row_is_dealt_once_in_order():
    for rows, speeds in generated(1, 400):
        counts = batch.deal(rows, speeds)
        assert sum(counts) == rows
        assert counts[0] >= 1
        assert min(counts) >= 0
        dealt = [r for _, start, n in batch.spans(counts) for r in range(start, start + n)]
        assert dealt == list(range(rows))
        assert all(n > 0 for _, _, n in batch.spans(counts))


def test_no_other_deal_ends_earlier():
    for rows, speeds in generated(2, 60):
        rows, speeds = min(rows, 9), speeds[:4]
        best = min(
            last_end(counts, speeds)
            for counts in itertools.product(range(rows + 1), repeat=len(speeds))
            if sum(counts) == rows and counts[0] >= 1
        )
        assert last_end(batch.deal(rows, speeds), speeds) == pytest.approx(best)


@pytest.mark.parametrize(
    ("rows", "speeds", "counts"),
    [
        (8, [1.7, 1.0], [5, 3]),  # a 5090 and a 3090
        (8, [1.0, 1.7], [3, 5]),
        (4, [1.0, 1.0, 1.0], [2, 1, 1]),
        (3, [1.0, 1.0], [2, 1]),
        (2, [1.0, 10.0], [1, 1]),
        (4, [1.0, 0.1], [4, 0]),
        (1, [0.1, 10.0], [1, 0]),
    ],
)
def test_rows_in_proportion_to_speed(rows, speeds, counts):
    assert batch.deal(rows, speeds) == counts


def test_nobody_is_left_out_where_every_lane_must_be_timed():
    assert batch.deal(4, [1.0, 0.1], leaves_out=False) == [3, 1]
    assert batch.deal(4, [0.1, 1.0, 1.0], leaves_out=False) == [1, 2, 1]
    assert batch.deal(1, [1.0, 1.0], leaves_out=False) == [1, 0]


# --- cutting


def arguments(rows):
    x = torch.arange(rows * 6.0).view(rows, 2, 3)
    return {
        "x": x,
        "timestep": torch.arange(float(rows)),
        "context": [x[:, :1], (x[:1], x[:, 0])],
        "control": {"input": [x, None], "middle": [], "output": [x * 2]},
        "shared": torch.ones(rows + 1, 3),
        "one": torch.ones(1, 5),
        "scalar": torch.tensor(3.0),
        "number": 7,
        "flag": None,
    }


def leaves(value):
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in leaves(one)]
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in leaves(one)]
    return [value]


@pytest.mark.parametrize("rows", range(2, 10))
def test_parts_of_any_lengths_join_to_the_whole(rows):
    given = arguments(rows)
    for speeds in ([1, 1], [3, 1], [1, 5, 1], [1] * rows):
        counts = batch.deal(rows, speeds)
        parts = [batch.cut(given, rows, start, n) for _, start, n in batch.spans(counts)]
        for whole, *cut in zip(leaves(given), *map(leaves, parts), strict=True):
            is_batch = torch.is_tensor(whole) and whole.ndim and whole.shape[0] == rows
            if is_batch:
                assert torch.equal(batch.join(cut), whole)
            else:
                assert all(one is whole for one in cut)
        assert type(parts[0]["context"][1]) is tuple


def test_a_first_dimension_that_is_no_batch_stays_whole():
    freqs = torch.ones(4, 2)
    given = {"x": torch.ones(4, 3), "freqs": freqs, "extra": {"freqs": freqs, "y": freqs}}
    found = batch.cut(given, 4, 1, 2, whole=("freqs",))
    assert found["freqs"] is freqs
    assert found["extra"]["freqs"] is freqs
    assert found["extra"]["y"].shape[0] == found["x"].shape[0] == 2


def test_rows_of_a_call():
    assert batch.rows({"x": torch.ones(3, 2), "t": torch.ones(9)}) == 3
    assert batch.rows({"x": [torch.ones(2, 5), torch.ones(2, 7)]}) == 2
    assert batch.rows({"x": None}) is None
    assert batch.rows({"x": torch.tensor(1.0)}) is None
    assert batch.rows({}) is None


@pytest.mark.parametrize(
    ("start", "length", "kept"),
    [(0, 2, [0]), (2, 2, [1]), (0, 4, [0, 1]), (0, 3, [0, 0, 1]), (3, 1, [1]), (1, 2, [0, 1])],
)
def test_options_say_which_prompt_a_row_has(start, length, kept):
    """Two images times two prompts; whole chunks as ComfyUI has them, else one per row."""
    options = {
        "cond_or_uncond": [0, 1], "uuids": ["a", "b"], "sigmas": torch.ones(2),
        "sample_sigmas": torch.arange(4.0), "other": {"x": 1},
    }  # fmt: skip
    found = batch.cut_options(options, 4, start, length)
    assert found["cond_or_uncond"] == kept
    assert found["uuids"] == ["ab"[one] for one in kept]
    assert length % len(kept) == 0
    assert found["sigmas"] is options["sigmas"]
    assert found["sample_sigmas"] is options["sample_sigmas"], "as long as the batch by chance"
    assert options["cond_or_uncond"] == [0, 1]
    one = batch.cut_options({**options, "sigmas": torch.arange(4.0)}, 4, start, length)
    assert one["sigmas"].tolist() == list(range(start, start + length))


def test_outputs_of_several_tensors_join():
    parts = [(torch.ones(2, 3), [torch.zeros(2, 1)]), (torch.ones(1, 3), [torch.zeros(1, 1)])]
    joined = batch.join(parts)
    assert [joined[0].shape[0], joined[1][0].shape[0]] == [3, 3]
    assert batch.join([None, None]) is None
    with pytest.raises(TypeError, match="a network's output is a str"):
        batch.join(["a", "b"])


def test_networks_whose_rows_are_not_alone():
    class MiniMaxH3Model(torch.nn.Module): ...

    class NaDiT(torch.nn.Module): ...

    class VideoResBlock(torch.nn.Module): ...

    assert why_whole(MiniMaxH3Model()) == (
        "This model takes one image at a time (MiniMax-H3): batch has nothing to share."
    )
    assert "A batch of NaDiT cannot be shared" in why_whole(NaDiT())
    frames = torch.nn.Sequential(torch.nn.Linear(1, 1), VideoResBlock())
    assert "its rows are the frames of one video" in why_whole(frames)
    assert why_whole(torch.nn.Linear(1, 1)) is None


# --- layouts


def layout(world, rows, conds=1, *, has_plan=True, **fields):
    return choose_layout(
        SequenceParallelConfig(**fields), world=world, num_heads=40, num_rows=rows,
        num_conds=conds, has_plan=has_plan,
    )  # fmt: skip


def test_rows_come_before_prompts_and_prompts_before_tokens():
    assert layout(2, 4) == Layout(batch=2)
    assert layout(4, 4) == Layout(batch=4)
    assert layout(4, 2) == Layout(batch=2, ulysses=2)
    assert layout(4, 2, 2) == Layout(batch=2, cfg=2)
    assert layout(8, 2, 2) == Layout(batch=2, cfg=2, ulysses=2)
    assert layout(2, 1, 2) == Layout(cfg=2)
    assert layout(2, 1) == Layout(ulysses=2)
    assert layout(3, 4) == Layout(batch=3), "unequal rows are fine"
    assert layout(3, 2) == Layout(ulysses=3), "no process is left without work"
    assert layout(4, 3) == Layout(batch=2, ulysses=2)


def test_chosen_degrees_are_kept():
    assert layout(2, 4, batch=1) == Layout(ulysses=2)
    assert layout(4, 4, batch=2) == Layout(batch=2, ulysses=2)
    assert layout(4, 4, batch=4) == Layout(batch=4)
    assert layout(4, 1, batch=4) == Layout(ulysses=4), "tokens are shared instead"
    assert layout(4, 4, ulysses=2) == Layout(batch=2, ulysses=2)
    assert layout(4, 4, ulysses=4) == Layout(ulysses=4)
    assert layout(4, 4, 2, cfg=2) == Layout(batch=2, cfg=2)
    assert layout(4, 1, 2, cfg=2) == Layout(cfg=2, ulysses=2)
    assert layout(4, 1, batch=2, ulysses=2, ring=1) == Layout(ulysses=2)


def test_without_a_token_plan_processes_may_have_nothing_to_do():
    assert layout(3, 2, has_plan=False) == Layout(batch=2)
    assert layout(4, 3, has_plan=False) == Layout(batch=3)
    assert layout(4, 1, 2, has_plan=False) == Layout(cfg=2)
    assert layout(4, 1, has_plan=False) == Layout()
    assert layout(4, 2, 2, has_plan=False) == Layout(batch=2, cfg=2)
    assert layout(3, 9, has_plan=False) == Layout(batch=3)


@pytest.mark.parametrize("has_plan", [False, True])
def test_no_layout_has_more_processes_than_there_are(has_plan):
    for world, rows, conds in itertools.product(range(1, 9), range(1, 10), (1, 2)):
        found = layout(world, rows, conds, has_plan=has_plan)
        assert found.world <= world
        assert found.batch <= rows
        if has_plan:
            assert found.world == world
        else:
            assert found.ranks == 1
            assert found.batch == min(world, rows)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"workers": 4, "batch": 3, "ulysses": 2},
            "batch 3 x ulysses 2 is 6 processes, but workers is 4. "
            "Set one of them to 0 (auto) or workers to 6.",
        ),
        ({"batch": 65}, "batch is 65: choose 0 (automatic) to 64."),
    ],
)
def test_mistakes_get_a_sentence(fields, sentence):
    with pytest.raises(ParallelError) as caught:
        SequenceParallelConfig(**fields)
    assert str(caught.value) == sentence


# --- lanes of worker processes

needs_processes = pytest.mark.skipif(os.name == "nt", reason="signals and /proc")


@pytest.fixture(scope="module")
def pool():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Pool(lambda: LocalLauncher(PROGRAM))
    yield pool
    pool.close()
    torch.set_num_threads(threads)


def x_of(rows):
    return torch.randn(rows, 11, 24, generator=torch.Generator().manual_seed(rows))


def lanes(pool, world, **config):
    return Session(pool, world, **{"batch": 0, **config})


def is_good(session, rows):
    return close(session.call(x_of(rows)), session.expected(x_of(rows)))


def known(pool, session, *row_s):
    state = session.state.shared
    key = (state.devices, state.model.load.key, Layout(batch=len(row_s)))
    pool.row_seconds[key] = list(row_s)
    return key


@needs_processes
@pytest.mark.parametrize("plan", [fake_net.PLAN, None])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_batches_agree_with_one_process(pool, world, plan, monkeypatch):
    """Of one to nine rows, dealt as if one process were faster than the others."""
    fastest = iter(itertools.cycle(range(world)))

    def deal(self, layout, num_rows, branch=0):
        speeds = [1.0] * layout.batch
        speeds[next(fastest) % layout.batch] = 1.9
        return batch.deal(num_rows, speeds)

    monkeypatch.setattr(Distributor, "deal", deal)
    session = lanes(pool, world, plan=plan)
    for rows in range(1, 10):
        assert is_good(session, rows), rows
    found = session.state.section().json
    assert found["batch"] == world
    assert found["calls_local"] == (0 if plan else 1), found["reasons"]
    assert found["calls_distributed"] == 9 - found["calls_local"]
    assert plan or list(found["reasons"]) == ["No token plan"]


@needs_processes
def test_the_report_says_rows_and_pace_of_each_device(pool):
    session = lanes(pool, 2)
    for _ in range(4):
        assert is_good(session, 4)
    session.state._distributor.close()
    assert pool.row_seconds
    known(pool, session, 0.001, 0.003)
    again = lanes(pool, 2)
    assert is_good(again, 4)
    section = again.state.section()
    assert section.json["layout"] == "batch 2 x cfg 1 x ulysses 1 x ring 1"
    assert section.json["rows"] == [
        {"devices": ["cpu"], "rows": 3, "ms_per_row": 1.0},
        {"devices": ["cpu"], "rows": 1, "ms_per_row": 3.0},
    ]
    assert "rows of a batch: cpu 3, 1 ms each, cpu 1, 3 ms each" in section.lines
    pool.row_seconds.clear()


@needs_processes
def test_a_lane_that_is_too_slow_is_left_out_and_named(pool):
    session = lanes(pool, 3)
    key = known(pool, session, 0.001, 1.0, 0.001)
    assert is_good(session, 3)
    section = session.state.section()
    assert [one["rows"] for one in section.json["rows"]] == [2, 0, 1]
    assert "cpu left out (too slow for one, 1000 ms each)" in str(section.lines)
    session.state.close()
    assert pool.row_seconds[key][1] == 0.5, "it is tried again some runs later"
    pool.row_seconds.clear()


@needs_processes
def test_a_lane_is_not_left_out_for_a_little(pool):
    """Times vary, and one that is left out is not timed again in that run."""
    session = lanes(pool, 2)
    known(pool, session, 1.0, 2.2)
    assert session.state._distributor.deal(Layout(batch=2), 2) == [1, 1]
    known(pool, session, 1.0, 2.7)
    assert session.state._distributor.deal(Layout(batch=2), 2) == [2, 0]
    pool.row_seconds.clear()


@needs_processes
def test_where_all_others_are_too_slow_this_process_does_it_all(pool):
    session = lanes(pool, 2)
    key = known(pool, session, 0.001, 1.0)
    assert is_good(session, 2)
    found = session.state.section().json
    assert (found["calls_distributed"], found["calls_local"]) == (0, 1)
    assert list(found["reasons"]) == ["the other devices are so slow that they would get no row"]
    session.state.close()
    assert pool.row_seconds[key] == [0.001, 0.5]
    pool.row_seconds.clear()


@needs_processes
def test_what_was_measured_deals_later_calls_and_runs(pool):
    """One process naps in each call: the other gets most of the rows."""
    session = lanes(pool, 2)
    nap = ("nap", pool.workers[0].handle.number)
    for _ in range(4):
        assert close(session.call(x_of(8), fault=nap), session.expected(x_of(8)))
    assert session.state._distributor.lanes[Layout(batch=2)][1].num_rows < 4
    session.state.close()
    again = lanes(pool, 2)
    assert is_good(again, 8), "at once"
    assert again.state._distributor.lanes[Layout(batch=2)][1].num_rows < 4
    pool.row_seconds.clear()


@needs_processes
def test_a_block_cache_keeps_its_rows(pool):
    """Residuals on the workers are of their own rows, so nothing is dealt anew within a run."""
    session = lanes(pool, 2)
    session.state._attach_cache = lambda: None
    object.__setattr__(session.state.shared, "techniques", {"cache": {}})
    nap = ("nap", pool.workers[0].handle.number)
    for _ in range(4):
        assert close(session.call(x_of(8), fault=nap), session.expected(x_of(8)))
        assert session.state._distributor.lanes[Layout(batch=2)][1].num_rows == 4
    pool.row_seconds.clear()


@needs_processes
def test_a_batch_of_one_shares_its_tokens_and_says_so(pool):
    session = lanes(pool, 2, batch=2)
    assert is_good(session, 1)
    found = session.state.section().json
    assert (found["batch"], found["ulysses"]) == (1, 2)
    assert "Batch of 1 and one prompt: tokens are shared instead." in session.run.notes


@needs_processes
def test_a_network_that_takes_one_row_never_gets_lanes(pool):
    session = lanes(pool, 2, batch=2)
    object.__setattr__(session.state.shared, "one_lane", "This model takes one image at a time.")
    assert is_good(session, 4)
    found = session.state.section().json
    assert (found["batch"], found["ulysses"]) == (1, 2)
    assert list(session.run.notes) == ["This model takes one image at a time."]


@needs_processes
def test_rows_that_are_swapped_are_noticed(pool, monkeypatch):
    """The comparison of these tests can fail."""
    session = lanes(pool, 2)
    join = batch.join
    monkeypatch.setattr(batch, "join", lambda outputs: join(list(reversed(outputs))))
    assert not is_good(session, 4)


@needs_processes
@pytest.mark.parametrize("world", [2, 4])
def test_a_fault_in_any_lane_and_the_next_call_is_right(pool, world, monkeypatch):
    monkeypatch.setattr(Distributor, "_measured", lambda *_: None)  # every lane always has rows
    session = lanes(pool, world)
    assert is_good(session, 5)
    kept = pids(pool)
    for worker in list(pool.workers[: world - 1]):
        for kind, words in (("raise", "injected failure"), ("memory", "has no memory left")):
            error, seconds = fails(session, x=x_of(5), fault=(kind, worker.handle.number))
            assert isinstance(error, WorkerError)
            assert words in str(error)
            assert seconds < 2 * patience()
            assert is_good(session, 5)
    error, _ = fails(session, x=x_of(5), fault=("raise", 0))
    assert str(error) == "injected failure in process 0"
    assert is_good(session, 5)
    assert pids(pool) == kept


@needs_processes
@pytest.mark.parametrize("kind", ["exit", "hang"])
def test_a_lane_that_is_lost_is_replaced(pool, kind):
    session = lanes(pool, 3)
    assert is_good(session, 4)
    error, seconds = fails(session, x=x_of(4), fault=(kind, pool.workers[1].handle.number))
    words = "ended with code 7" if kind == "exit" else "did not answer for 2 s"
    assert f"Worker 2 (cpu) {words}" in str(error)
    assert seconds < (2 * TIMEOUT_S + 2) * patience()
    assert is_good(session, 4)
    assert session.state.section().json["calls_distributed"] == 2


@needs_processes
def test_lanes_of_several_processes_and_layouts_that_change(pool):
    session = lanes(pool, 4)
    for rows in (2, 4, 1, 3, 2):
        assert is_good(session, rows)
    assert {(one.batch, one.ulysses) for one in session.state.counts.layouts} == {
        (2, 2), (4, 1), (1, 2),
    }  # fmt: skip
    found = session.state.section().json
    assert found["calls_local"] == 0
