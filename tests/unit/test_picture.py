"""The report's picture: its size follows the content, colours and legend are really drawn."""

import pytest
import torch
from slipstream.backends import picture
from slipstream.backends.picture import canvas, grid
from slipstream.backends.report import NO_TECHNIQUE, Curve, Grid, Report, RunRecord, Section

pytest.importorskip("PIL", reason="the picture needs Pillow, which comes with ComfyUI")


def report(*figures: Grid | Curve, **changes) -> Report:
    values = {
        "id": 3,
        "num_steps": 20,
        "num_evaluations": 20,
        "num_calls": 20,
        "seconds": 1.5,
        "device": "cpu",
        "model": "Flux",
        "versions": {"torch": "2.11.0", "comfyui": "0.33.0"},
        "completed": True,
        "notes": {},
        "sections": {"attention": Section({}, ("Attention: 3 calls",), figures)},
    }
    return Report(RunRecord(**{**values, **changes}))


def layers(num_rows: int, num_columns: int, *, names: tuple[str, ...] = ("fast", "exact")) -> Grid:
    cells = tuple(
        tuple(names[(row + column) % len(names)] for column in range(num_columns))
        for row in range(num_rows)
    )
    half = num_rows // 2
    labels = [f"double/{i}" for i in range(half)] + [f"single/{i}" for i in range(num_rows - half)]
    return Grid(
        "Layers",
        tuple(labels),
        tuple(str(i) for i in range(num_columns)),
        cells,
        {name: f"the {name} kernel" for name in names},
    )


def count_pixels(image, colour) -> int:
    return {c: n for n, c in image.getcolors(1 << 20)}.get(colour, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (19, 1), (5, 4), (57, 20), (200, 50), (8, 1000)])
def test_grid_of_any_size_shows_both_categories_in_their_shares(size):
    figure = layers(*size)
    image = picture.draw(report(figure))
    assert image.width == canvas.WIDTH
    assert image.height < 2000
    entries = grid.legend_entries(figure)
    assert sum(count for _, _, count, _ in entries) == size[0] * size[1]
    drawn = [count_pixels(image, colour) for *_, colour in entries]
    assert min(drawn) > 300, "a legend chip alone has more"
    if size[0] * size[1] >= 20:
        assert 0.5 < drawn[0] / drawn[1] < 2


def test_legend_says_how_often():
    figure = Grid("g", ("a/0", "a/1"), ("0", "1"), (("x", "x"), ("x", None)), {"y": "Y", "x": "X"})
    assert [(c, words, n) for c, words, n, _ in grid.legend_entries(figure)] == [("x", "X", 3)]
    with_stranger = Grid("g", ("a/0",), ("0",), (("z",),), {})
    assert grid.legend_entries(with_stranger)[0][:3] == ("z", "z", 1)


def test_computed_and_reused_keep_their_colours_in_any_order():
    one = canvas.colours_of(["reused", "computed", "other"])
    two = canvas.colours_of(["computed", "other", "reused"])
    assert one == two
    assert len(set(one.values())) == 3
    many = canvas.colours_of([str(i) for i in range(20)])
    assert len(set(many.values())) == len(canvas.PALETTE) + 1


def test_rows_are_gathered_by_block_type():
    labels = ("double/0", "double/1", "single/0", "call/3.1", "plain")
    assert grid.group_rows(labels) == [
        ("double", 0, 2),
        ("single", 2, 1),
        ("call", 3, 1),
        ("", 4, 1),
    ]
    alternating = tuple(f"{'self' if i % 2 else 'cross'}/{i}" for i in range(60))
    assert grid.group_rows(alternating) == [("", 0, 60)]


def test_groups_of_one_thin_row_do_not_overlap():
    labels = tuple(f"t{i // 60}/{i}" for i in range(600))
    layout = grid.plan(Grid("g", labels, ("0",), (("a",),) * 600, {"a": "a"}))
    assert len(layout.groups) == 10
    for above, below in zip(layout.groups, layout.groups[1:], strict=False):
        assert below.top >= above.top + max(above.height, 24)


def test_words_for_rows_and_columns():
    assert [canvas.counted(n, w) for n, w in ((1, "branch"), (2, "branch"), (1000, "step"))] == [
        "1 branch",
        "2 branches",
        "1,000 steps",
    ]


def test_more_layers_make_a_taller_picture_up_to_a_limit():
    heights = [picture.draw(report(layers(n, 20))).height for n in (4, 20, 57, 200)]
    assert heights[0] < heights[1]
    assert max(heights) < 1.3 * heights[1]


@pytest.mark.parametrize(
    "figures",
    [
        (),
        (Grid("empty", (), (), (), {}),),
        (Grid("idle", ("a/0",), ("0", "1"), ((None, None),), {}),),
        (Curve("empty", (), (), None, ()),),
        (Curve("gaps", (0.0, 1.0), (None, float("nan")), 0.1, (False, False)),),
        (Curve("one", (0.0,), (0.5,), None, (False,)),),
    ],
)
def test_nothing_to_draw_still_gives_a_picture(figures):
    image = picture.draw(report(*figures))
    assert image.width == canvas.WIDTH
    assert count_pixels(image, canvas.TEXT) > 500, "the header is there"


def test_curve_marks_what_was_reused():
    xs = tuple(float(i) for i in range(20))
    ys = (None, *(1 / x for x in xs[1:]))
    marks = tuple(x > 10 for x in xs)
    some = picture.draw(report(Curve("residual", xs, ys, 0.1, marks)))
    none = picture.draw(report(Curve("residual", xs, ys, 0.1, (False,) * 20)))
    assert count_pixels(some, canvas.REUSED) > 500
    assert count_pixels(none, canvas.REUSED) == 0
    flat = picture.draw(report(Curve("flat", xs, (0.0,) * 20, 0.0, marks)))
    assert count_pixels(flat, canvas.REUSED) > 500


def test_remark_and_notes_and_an_unfinished_run_are_in_the_warning_colour():
    plain = picture.draw(report())
    assert count_pixels(plain, canvas.WARN) == 0
    assert count_pixels(picture.draw(report(completed=False)), canvas.WARN) > 50
    noted = picture.draw(report(notes={f"note {i}": i for i in range(12)}))
    assert count_pixels(noted, canvas.WARN) > 50
    assert plain.height < noted.height < plain.height + 400, "the notes are cut"
    remarked = picture.draw(Report(report().record, "It matches no run."))
    assert count_pixels(remarked, canvas.WARN) > 50


def test_a_report_without_a_run_is_a_small_picture():
    image = picture.draw(Report(None, NO_TECHNIQUE))
    assert image.height < 400
    assert count_pixels(image, canvas.MUTED) > 500


def test_tensor_is_a_comfyui_image():
    image = picture.draw(report(layers(3, 4)))
    tensor = picture.to_tensor(image)
    assert tensor.shape == (1, image.height, image.width, 3)
    assert tensor.dtype == torch.float32
    assert 0 <= tensor.min() < tensor.max() <= 1
    expected = torch.tensor(image.getpixel((700, 300))) / 255
    assert torch.equal(tensor[0, 300, 700], expected)


def test_text_is_cut_to_its_place_and_spelled_in_the_fonts_characters():
    assert canvas.drawable("2×3 – naïve 中 · …") == "2x3 - naive ? · …"
    lines = canvas.wrap("word " * 60, canvas.BODY, 400, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(canvas.width_of(line, canvas.BODY) <= 400 for line in lines)
    assert canvas.wrap("", canvas.BODY, 400, 3) == []
    assert canvas.width_of(canvas.fit("x" * 500, canvas.BODY, 300), canvas.BODY) <= 300
