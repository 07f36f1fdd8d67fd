"""Text as tokens arrive."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ppsd_cli.ui.text import TextStream, escape_controls

SAMPLE = ["the cat sat on the mat. 你好，世界 – größer 🙂🙃 the end the cat", "naïve café 日本語"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁the", "▁cat", "▁", "s", "a", "t", "."]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BYTES = byte_level()
PIECES = sentencepiece_like()


def stream(tokenizer: Tokenizer, ids: list[int], *stops: str) -> tuple[str, TextStream]:
    out = TextStream(tokenizer.decode, stops)
    text = "".join([out.push(token) for token in ids])
    return text + out.finish(), out


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=120))
def test_any_text_comes_out_whole(text: str) -> None:
    ids = BYTES.encode(text).ids
    assert stream(BYTES, ids)[0] == text


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=150))
def test_any_tokens_come_out_as_decoded_at_once(ids: list[int]) -> None:
    assert stream(BYTES, ids)[0] == BYTES.decode(ids)


def test_long_run_of_broken_bytes_is_not_held_for_ever() -> None:
    alone = [token for token in range(256) if BYTES.decode([token]) == "\ufffd"]
    ids = (alone * 10)[:400]
    out = TextStream(BYTES.decode)
    given_early = sum(len(out.push(token)) for token in ids)
    assert given_early > 200
    assert stream(BYTES, ids)[0] == BYTES.decode(ids)


def test_work_per_token_is_bounded() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return BYTES.decode(ids)

    ids = BYTES.encode(SAMPLE[0] * 50).ids
    out = TextStream(decode)
    assert "".join(map(out.push, ids)) + out.finish() == SAMPLE[0] * 50
    assert longest < 64


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(["▁the", "▁cat", "▁", "s", "🙂", "é", "."]), max_size=60))
def test_tokenizer_that_strips_the_first_space(pieces: list[str]) -> None:
    ids: list[int] = []
    for piece in pieces:
        known = PIECES.token_to_id(piece)
        ids += [known] if known is not None else list(piece.encode())
    assert stream(PIECES, ids)[0] == PIECES.decode(ids)


def test_part_of_a_character_waits() -> None:
    out = TextStream(BYTES.decode)
    ids = [BYTES.token_to_id(pre) for pre in byte_chars("🙂")]
    assert [out.push(token) for token in ids] == ["", "", "", "🙂"]
    unfinished = TextStream(BYTES.decode)
    assert [unfinished.push(token) for token in ids[:2]] == ["", ""]
    assert unfinished.finish() == "\ufffd"


def byte_chars(text: str) -> list[str]:
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return list(pre.pre_tokenize_str(text)[0][0])


@pytest.mark.parametrize("offset", range(len(SAMPLE[0])))
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_stop_at_every_offset(offset: int, size: int) -> None:
    text = SAMPLE[0]
    stop = text[offset : offset + size]
    out, state = stream(BYTES, BYTES.encode(text).ids, stop)
    assert state.stopped
    assert out == text[: text.index(stop)]


@settings(deadline=None, max_examples=200)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.integers(1, 7),
)
def test_stops_do_not_depend_on_how_text_is_cut(text: str, stops: list[str], size: int) -> None:
    parts = [text[at : at + size] for at in range(0, len(text), size)]

    def run(pieces: list[str]) -> tuple[str, bool]:
        out = TextStream(lambda ids: "".join(pieces[i] for i in ids), tuple(stops))
        joined = "".join([out.push(i) for i in range(len(pieces))]) + out.finish()
        return joined, out.stopped

    one_by_one = run(list(text))
    assert run(parts) == one_by_one
    assert one_by_one[1] == any(stop in text for stop in stops)


def test_beginning_of_a_stop_is_given_in_the_end() -> None:
    out = TextStream(lambda ids: "".join(chr(i) for i in ids), ("\n\nUser:",))
    assert out.push(ord("A")) == "A"
    assert [out.push(ord(char)) for char in "\n\nUs"] == [""] * 4
    assert out.push(ord("!")) == "\n\nUs!"
    assert out.push(ord("\n")) == ""
    assert out.finish() == "\n"
    assert not out.stopped


def test_nothing_after_a_stop() -> None:
    out = TextStream(lambda ids: "".join(chr(i) for i in ids), ("b",))
    assert [out.push(ord(char)) for char in "abc"] == ["a", "", ""]
    assert (out.finish(), out.stopped) == ("", True)


def test_controls_become_visible() -> None:
    assert escape_controls("a\x1b[31mb\r\n\tc\x7f\x9b") == "a\\x1b[31mb\\x0d\n\tc\\x7f\\x9b"
    assert escape_controls("\u202eevil\u2066\u2028") == "\\u202eevil\\u2066\\u2028"
    assert escape_controls("日本 é 🙂") == "日本 é 🙂"


@given(st.text())
def test_escaping_twice_changes_nothing(text: str) -> None:
    once = escape_controls(text)
    assert escape_controls(once) == once
