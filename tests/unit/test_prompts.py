"""Lists of prompts as text and files, and how prompts are shared out over batches and joined."""

import math
import os
import random

import pytest
import torch
from slipstream.backends.prompts import lines
from slipstream.backends.prompts.batches import fits, join, plan
from slipstream.backends.prompts.encode import PromptBatch, encode, summary
from slipstream.backends.prompts.lines import Line, PromptsError, choose, picture_name, split
from slipstream.backends.prompts.padding import (
    MAX_REPEATED,
    PADDING,
    UNKNOWN,
    Padding,
    common_length,
    padding_of,
)

REPEAT = Padding(way="repeat", why="too long")
MASK = Padding(way="mask")
LEFT = Padding(way="left", up_to=8, why="above 8 tokens")
NONE = Padding(way="none", why="no mask")
ALONE = Padding(way="alone", why="one row")


@pytest.mark.parametrize(
    ("text", "separator", "prompts"),
    [
        ("a cat\na dog", "", ["a cat", "a dog"]),
        ("  a cat \r\n\r\n\ta dog\r", "", ["a cat", "a dog"]),
        ("# a title\na cat # not a comment\n   # indented\n#", "", ["a cat # not a comment"]),
        ("\\#1 fan\n\\n is kept", "", ["#1 fan", "\\n is kept"]),
        ("a (red:1.2) cat, embedding:bad", "", ["a (red:1.2) cat, embedding:bad"]),
        ("a cat\nin snow\n---\n\n---\na dog", "---", ["a cat\nin snow", "a dog"]),
        ("a cat\n\nin snow\n # left out\n --- \na dog --- here", "---",
         ["a cat\n\nin snow", "a dog --- here"]),
        ("猫\n🐈 une chatte\u00a0", "", ["猫", "🐈 une chatte"]),
        ("#", " ", []),
        ("a\n##\nb", "##", ["a", "b"]),
        ("", "", []),
    ],
)  # fmt: skip
def test_split(text, separator, prompts):
    assert split(text, separator) == prompts


def test_choose_numbers_prompts_in_the_whole_list():
    prompts = [f"prompt {n}" for n in range(1, 13)]
    assert [line.number for line in choose(prompts)] == list(range(1, 13))
    assert choose(prompts, 11) == [Line("prompt 11", 11, 12), Line("prompt 12", 12, 12)]
    assert [line.number for line in choose(prompts, 3, 2)] == [3, 4]
    assert [line.number for line in choose(prompts, 12, 50)] == [12]


def test_choose_refuses_with_a_sentence():
    with pytest.raises(PromptsError, match="There is no prompt: write one a line"):
        choose([])
    with pytest.raises(PromptsError, match="first is 4, but there are 3 prompts"):
        choose(["a"] * 3, 4)
    many = ["a"] * (2 * lines.MAX_PROMPTS)
    with pytest.raises(PromptsError, match="queue once more with first 1011"):
        choose(many, 11)
    assert len(choose(many, 11, lines.MAX_PROMPTS)) == lines.MAX_PROMPTS


@pytest.mark.parametrize(
    "content",
    [
        "un été\nвторая".encode(),
        "\ufeffun été\nвторая\n".encode(),
        "un été\r\nвторая\r\n".encode("utf-16"),  # Notepad's "Unicode"
    ],
)
def test_files_of_any_editor(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert lines.from_file(tmp_path, "list.txt") == ["un été", "вторая"]
    assert lines.from_file(tmp_path, lines.NO_FILE) == lines.from_file(tmp_path, "") == []


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(PromptsError, match=r"'latin.txt' is not in UTF-8 \(byte 0\)"):
        lines.from_file(tmp_path, "latin.txt")
    (tmp_path / "large.txt").write_bytes(b"a" * (lines.MAX_BYTES + 1))
    with pytest.raises(PromptsError, match="larger than 4 MB"):
        lines.from_file(tmp_path, "large.txt")


@pytest.fixture
def inside(tmp_path):
    """An input folder with a secret beside it."""
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "input-2").mkdir()
    (tmp_path / "input-2" / "other.txt").write_text("secret")
    folder = tmp_path / "input"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("a cat")
    (folder / "sub" / "b.TXT").write_text("a dog")
    (folder / "c.md").write_text("no")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    return folder


@pytest.mark.parametrize(
    "name",
    ["../secret.txt", "sub/../../secret.txt", "../input-2/other.txt", "link.txt", "{}/secret.txt"],
)
def test_nothing_outside_of_the_input_folder_is_read(inside, name):
    name = name.format(inside.parent)
    with pytest.raises(PromptsError, match="outside of ComfyUI's input folder"):
        lines.from_file(inside, name)
    assert lines.fingerprint(inside, name) == "no file"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gone.txt", "not in ComfyUI's input folder"),
        ("sub", "no .txt file"),
        ("c.md", "no .txt file"),
        ("a\0.txt", "no name of a file"),
    ],
)
def test_a_wrong_file_is_named(inside, name, sentence):
    with pytest.raises(PromptsError, match=sentence):
        lines.find(inside, name)


def test_listed_and_found(inside):
    assert "a.txt" in lines.file_names(inside)
    assert "c.md" not in lines.file_names(inside)
    assert lines.file_names(inside / "none") == []
    assert lines.from_file(inside, "sub/b.TXT") == ["a dog"]


def test_fingerprint_follows_the_content_not_the_date(inside):
    before = lines.fingerprint(inside, "a.txt")
    os.utime(inside / "a.txt", (1, 1))
    assert lines.fingerprint(inside, "a.txt") == before
    (inside / "a.txt").write_text("a fox")
    assert lines.fingerprint(inside, "a.txt") != before
    assert lines.fingerprint(inside, lines.NO_FILE) == lines.fingerprint(inside, None) == ""


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (Line("A red fox, 35mm", 7, 12), "007_A_red_fox_35mm"),
        (Line("a fox", 7, 12345), "00007_a_fox"),
        (Line("../../etc/passwd", 1, 1), "001_etc_passwd"),
        (Line('C:\\x|y?*"<>%date%\n#.', 1, 1), "001_C_x_y_date"),
        (Line("???", 2, 2), "002"),
        (Line("ein Käfer -- grün", 1, 1), "001_ein_Käfer_-_grün"),
        (Line("word " * 40, 1, 1), "001" + "_word" * 11),
    ],
)
def test_picture_names(line, name):
    assert picture_name(line) == name


def test_picture_names_of_languages_without_spaces_fit():
    name = picture_name(Line("猫" * 300, 1, 1))
    assert name.startswith("001_猫猫")
    assert len(name.encode()) <= 150
    assert picture_name(Line("हिन्दी", 1, 1)) == "001_हिन्दी"


def prompt(tokens, seed=0, **extra):
    generator = torch.Generator().manual_seed(seed + 100 * tokens)
    pooled = torch.randn(1, 4, generator=generator)
    return [[torch.randn(1, tokens, 6, generator=generator), {"pooled_output": pooled, **extra}]]


@pytest.mark.parametrize(
    ("lengths", "padding", "common"),
    [
        ([77, 154], REPEAT, 154),
        ([77, 154, 231], REPEAT, 462),
        ([231, 308, 385], REPEAT, None),
        ([3, 5], MASK, 5),
        ([3, 8], LEFT, 8),
        ([3, 9], LEFT, None),
        ([9, 9], LEFT, 9),
        ([3, 3], NONE, 3),
        ([3, 4], NONE, None),
    ],
)
def test_common_length(lengths, padding, common):
    assert common_length(lengths, padding) == common


def test_equal_prompts_keep_their_order():
    assert plan([prompt(3, i) for i in range(9)], NONE, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert plan([prompt(3)], NONE, 4) == [[0]]
    assert plan([prompt(3, i) for i in range(3)], ALONE, 4) == [[0], [1], [2]]


def test_what_cannot_share_a_batch_gets_another():
    prompts = [prompt(n, i) for i, n in enumerate([3, 4, 3, 5, 4, 3])]
    assert plan(prompts, NONE, 2) == [[0, 2], [1, 4], [3], [5]]
    assert plan(prompts, MASK, 4) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    "other",
    [
        prompt(3, byt5=torch.zeros(1, 2, 6)),
        prompt(3, ids=torch.zeros(4)),
        [[torch.zeros(1, 3, 7), {"pooled_output": torch.zeros(1, 4)}]],
        [[torch.zeros(1, 3, 6), {"pooled_output": None}]],
        [[torch.zeros(1, 3, 6).half(), {"pooled_output": torch.zeros(1, 4)}]],
        [[torch.zeros(2, 3, 6), {"pooled_output": torch.zeros(2, 4)}]],
        [[torch.zeros(1, 3, 6), {"pooled_output": torch.zeros(1, 5)}]],
        prompt(3) * 2,
    ],
)
@pytest.mark.parametrize("padding", [NONE, MASK, REPEAT])
def test_encodings_that_differ_in_more_than_length_stay_apart(other, padding):
    assert not fits([prompt(3)], other, padding)
    assert not fits([other], prompt(3), padding)
    assert fits([prompt(3)], prompt(3, 1), padding)


def test_vectors_are_never_rows():
    """Core gives a 1-D value its batch axis itself (Anima): there is no place for a second row."""
    one, other = prompt(3, ids=torch.zeros(4)), prompt(3, 1, ids=torch.zeros(4))
    assert not fits([one], other, NONE)


def test_plain_values_are_shared_if_they_are_equal():
    def with_codes(codes):
        return prompt(3, codes=codes, layers=4)

    hooks = object()
    assert fits([with_codes([[1, 2]])], with_codes([[1, 2]]), NONE)
    assert not fits([with_codes([[1, 2]])], with_codes([[1, 3]]), NONE)
    assert not fits([with_codes([torch.zeros(2)])], with_codes([torch.zeros(2)]), NONE)
    assert fits([with_codes(hooks)], with_codes(hooks), NONE)
    assert not fits([with_codes(hooks)], with_codes(object()), NONE)
    joined = join([with_codes([[1, 2]]), with_codes([[1, 2]])], NONE)
    assert joined[0][1]["codes"] == [[1, 2]]
    assert joined[0][1]["layers"] == 4


@pytest.mark.parametrize("padding", [REPEAT, MASK, LEFT])
def test_rows_hold_their_prompt(padding):
    prompts = [prompt(n, i) for i, n in enumerate([2, 4, 8])]
    ((text, extra),) = join(prompts, padding)
    assert text.shape == (3, 8, 6)
    for i, one in enumerate(prompts):
        own, tokens = one[0][0][0], one[0][0].shape[1]
        assert torch.equal(extra["pooled_output"][i], one[0][1]["pooled_output"][0])
        if padding is REPEAT:
            assert torch.equal(text[i], own.repeat(8 // tokens, 1))
            continue
        kept = slice(8 - tokens, 8) if padding is LEFT else slice(0, tokens)
        assert torch.equal(text[i, kept], own)
        assert text[i].count_nonzero() == own.count_nonzero()
    assert ("attention_mask" in extra) == (padding is MASK)
    if padding is MASK:
        assert extra["attention_mask"].sum(1).tolist() == [2, 4, 8]
        assert extra["attention_mask"].dtype == torch.long


def mask_of(prompts, padding):
    ((_, extra),) = join(prompts, padding)
    return extra["attention_mask"].tolist() if "attention_mask" in extra else None


def test_masks_of_the_encoder_are_kept():
    own = torch.tensor([[1, 1, 0]])
    masked = prompt(3, attention_mask=own)
    assert mask_of([masked, prompt(5)], MASK) == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert mask_of([masked, prompt(3, 1)], MASK) == [[1, 1, 0], [1, 1, 1]]
    longer = prompt(6, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0]]))
    assert mask_of([masked, longer], REPEAT) == [[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0]]
    assert mask_of([prompt(3), prompt(3, 1)], MASK) is None


def test_a_mask_that_is_the_same_for_all_stays_one_row():
    """Core's Omnigen2 and Lumina2 take the number of ones for the tokens of one row."""
    ones = torch.ones(1, 3, dtype=torch.long)
    prompts = [prompt(3, i, attention_mask=ones.clone()) for i in range(3)]
    for padding in (NONE, MASK, REPEAT):
        assert mask_of(prompts, padding) == [[1, 1, 1]]


def test_prompts_of_one_length_that_are_masked_unlike_need_a_way():
    masks = ([[1, 1, 1]], [[1, 1, 0]], [[1, 1, 1]])
    prompts = [prompt(3, i, attention_mask=torch.tensor(m)) for i, m in enumerate(masks)]
    assert plan(prompts, NONE, 4) == [[0, 2], [1]]
    assert plan(prompts, MASK, 4) == [[0, 1, 2]]
    assert plan([prompts[0], prompt(3)], NONE, 4) == [[0], [1]]


def test_parts_of_a_schedule_are_joined_part_by_part():
    def scheduled(tokens, seed):
        early, late = prompt(tokens, seed), prompt(tokens, seed + 1)
        early[0][1] |= {"clip_start_percent": 0.0, "clip_end_percent": 0.5}
        late[0][1] |= {"clip_start_percent": 0.5, "clip_end_percent": 1.0}
        return early + late

    joined = join([scheduled(3, 0), scheduled(5, 2)], MASK)
    assert [extra["clip_start_percent"] for _, extra in joined] == [0.0, 0.5]
    assert torch.equal(joined[1][0][1], scheduled(5, 2)[1][0][0])


@pytest.mark.parametrize("padding", [REPEAT, MASK, LEFT, NONE, ALONE])
def test_every_prompt_is_a_row_once_whatever_the_lengths(padding):
    draw = random.Random(padding.way)
    for _ in range(60):
        size = draw.randint(1, 9)
        prompts = [prompt(draw.randint(1, 10), i) for i in range(draw.randint(1, 17))]
        batches = plan(prompts, padding, size)
        assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
        assert max(map(len, batches)) <= size
        for batch in batches:
            assert batch == sorted(batch)
            lengths = [prompts[i][0][0].shape[1] for i in batch]
            ((text, _),) = join([prompts[i] for i in batch], padding)
            assert text.shape == (len(batch), common_length(lengths, padding), 6)
            if padding is REPEAT:
                assert text.shape[1] == math.lcm(*lengths) <= MAX_REPEATED * max(lengths)


def test_join_leaves_its_prompts_as_they_are():
    prompts = [prompt(3), prompt(5)]
    before = [p[0][0].clone() for p in prompts]
    ((text, extra),) = join(prompts, MASK)
    text.zero_()
    extra["pooled_output"] = None
    for one, was in zip(prompts, before, strict=True):
        assert torch.equal(one[0][0], was)
        assert one[0][1]["pooled_output"] is not None


class FakeClip:
    """Words are tokens; counts what it is asked."""

    def __init__(self):
        self.tokenizer, self.asked = object(), []

    def tokenize(self, text):
        return text.split()

    def encode_from_tokens_scheduled(self, tokens, show_pbar=True):
        assert not show_pbar
        self.asked.append(tokens)
        return prompt(len(tokens), len(self.asked))


def batches_of(texts, size):
    return encode(FakeClip(), choose(texts), size)[0]


def test_encode_asks_once_per_prompt_and_keeps_lines_with_rows():
    clip = FakeClip()
    batches, padding = encode(clip, choose(["a b", "c", "d e", "f"]), 4)
    assert padding is UNKNOWN
    assert len(clip.asked) == 4
    assert [[line.text for line in b.lines] for b in batches] == [["a b", "d e"], ["c", "f"]]
    assert [b.conditioning[0][0].shape for b in batches] == [(2, 2, 6), (2, 1, 6)]
    with pytest.raises(PromptsError, match="clip is empty"):
        encode(None, choose(["a"]), 4)


def test_encode_ends_on_cancel(monkeypatch):
    from slipstream.backends import host

    clip = FakeClip()

    def cancel():
        if len(clip.asked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(host, "raise_if_cancelled", cancel)
    with pytest.raises(KeyboardInterrupt):
        encode(clip, choose(["a"] * 5), 4)
    assert len(clip.asked) == 2


@pytest.mark.parametrize(
    ("texts", "padding", "size", "told"),
    [
        (["a"], NONE, 4, "1 prompt in 1 batch of 1."),
        (["a"] * 9, NONE, 4, "9 prompts in 3 batches of 4, 4, 1."),
        (["a", "a b"], ALONE, 4, "No two prompts share a batch: one row."),
        (["a", "a b", "c"], NONE, 4, "Prompts of 1, 2 tokens do not all share a batch: no mask."),
        (["a"] * 2, REPEAT, 4, "2 prompts in 1 batch of 2."),
    ],
)
def test_summary(texts, padding, size, told):
    chosen = choose(texts)
    encoded = [prompt(len(t.split()), i) for i, t in enumerate(texts)]
    batches = [
        PromptBatch(
            join([encoded[i] for i in batch], padding),
            tuple(chosen[i] for i in batch),
            tuple(encoded[i][0][0].shape[1] for i in batch),
        )
        for batch in plan(encoded, padding, size)
    ]
    assert told in summary(batches, padding, size)


def test_every_entry_says_why():
    for name, padding in PADDING.items():
        assert name.startswith("comfy.")
        assert padding.way == "mask" or padding.why, name
        assert (padding.up_to > 0) == (padding.way == "left"), name
    assert UNKNOWN.way == "none"


def test_a_subclass_of_a_known_tokenizer_is_unknown():
    """Kandinsky 5 subclasses Qwen-Image's tokenizer, and its network takes no mask."""
    known = type("QwenImageTokenizer", (), {})
    known.__module__ = "comfy.text_encoders.qwen_image"

    class Other(known):
        pass

    def clip(tokenizer):
        return type("Clip", (), {"tokenizer": tokenizer})()

    assert padding_of(clip(known())).way == "mask"
    assert padding_of(clip(Other())) is UNKNOWN
    assert padding_of(object()) is UNKNOWN
