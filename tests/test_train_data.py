"""Training texts: ``--data`` files, chat glue, batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_models import save_chat_model, write_lines

from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.errors import AssetError
from ppsd_cli.tasks.chat import read_glue
from ppsd_cli.tasks.data_file import read_data
from ppsd_cli.tasks.dataset import Batches, BatchSettings, Sample, held_out, rung
from ppsd_cli.tasks.text_store import spans

GOOD = [
    {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]},
    {"prompt": "w1", "completion": "w2 w3"},
    {"text": "w4 w5 w6"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("data_model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def test_formats(tokenizer: Any, tmp_path: Path) -> None:
    found = read_data(
        write_lines(tmp_path / "d.jsonl", GOOD), tokenizer, context=64, skip_bad=False
    )
    answers = [tokenizer.decode(s.ids[s.answers]) for s in found.samples]
    assert answers == ["w3 <|end|>", "w2 w3 <|end|>", "w4 w5 w6 <|end|>"]
    first = tokenizer.decode(found.samples[0].ids[~found.samples[0].answers])
    assert first.replace(" ", "") == "<|start|>userw1w2<|end|><|start|>assistant"


def test_only_the_assistant_answers(tokenizer: Any, tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "w0"},
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4 w5"},
    ]
    path = write_lines(tmp_path / "d.jsonl", [{"messages": turns}])
    (sample,) = read_data(path, tokenizer, context=64, skip_bad=False).samples
    assert tokenizer.decode(sample.ids[sample.answers]) == "w2 <|end|> w4 w5 <|end|>"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ('{"question": "w1"}', "has none of"),
        ('{"prompt": "w1"}', "completion must be text"),
        ('{"text": 5}', "text must be text"),
        ('{"messages": []}', "not empty"),
        ('{"messages": [{"role": "user", "content": "w1"}]}', "no assistant turn"),
        ('{"messages": [{"role": "robot", "content": "w1"}]}', "needs a role"),
    ],
)
def test_bad_lines(tokenizer: Any, tmp_path: Path, line: str, reason: str) -> None:
    path = write_lines(tmp_path / "d.jsonl", [GOOD[0], "", line, GOOD[1]])
    with pytest.raises(AssetError, match=f"line 3: .*{reason}.*--skip-bad"):
        read_data(path, tokenizer, context=64, skip_bad=False)
    found = read_data(path, tokenizer, context=64, skip_bad=True)
    assert (len(found.samples), found.skipped) == (2, 1)


def test_bad_files(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="No such file"):
        read_data(tmp_path / "none", tokenizer, context=64, skip_bad=False)
    (tmp_path / "latin").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(AssetError, match="line 1: not UTF-8 .byte 10"):
        read_data(tmp_path / "latin", tokenizer, context=64, skip_bad=False)
    with pytest.raises(AssetError, match="no usable line"):
        read_data(tmp_path / "latin", tokenizer, context=64, skip_bad=True)


def test_glue(folder: Path, tokenizer: Any) -> None:
    glue = read_glue(tokenizer, folder)
    assert glue.chat
    assert tokenizer.convert_ids_to_tokens(glue.opening) == ["<|start|>", "user"]
    after = ["<|end|>", "<|start|>", "assistant"]
    assert tokenizer.convert_ids_to_tokens(glue.to_answer) == after
    assert tokenizer.convert_ids_to_tokens(glue.to_question) == ["<|end|>", "<|start|>", "user"]
    assert glue.ends == (0,)
    assert glue.banned == (1, 2)


def samples(lengths: list[int]) -> list[Sample]:
    return [Sample.of(list(range(1, n + 1)), [(n // 2, n)], greedy=False) for n in lengths]


def test_every_answer_token_is_in_an_epoch_once() -> None:
    texts = samples([5, 9, 16, 17, 30, 31, 40, 12])
    batches = Batches(texts, BatchSettings(tokens=96, seed=1, chunk=8))
    for epoch in (0, 1):
        drafted = []
        for index in range(batches.per_epoch):
            batch = batches[epoch * batches.per_epoch + index]
            assert batch.token_ids.numel() <= 96
            assert len(batch.where) % 8 == 0
            assert batch.weight.sum() == pytest.approx(1.0)
            real = batch.where[: batch.count]
            drafted += batch.token_ids.flatten()[real].tolist()
            assert not batch.weight[batch.count :].any()
        expected = [int(t) for s in texts for t in s.ids[s.positions()]]
        assert sorted(drafted) == sorted(expected)


def test_order_is_a_function_of_seed_and_index() -> None:
    texts = samples([16] * 40)
    settings = BatchSettings(tokens=64, seed=3, chunk=1)
    one, other = Batches(texts, settings), Batches(texts, settings)
    later = one[25]
    one[3]
    assert torch.equal(later.token_ids, other[25].token_ids)


def test_small_parts() -> None:
    assert [rung(n) for n in (1, 16, 17, 24, 25, 1500, 2048)] == [16, 16, 24, 24, 32, 1536, 2048]
    assert spans([False, True, True, False, True]) == [[1, 3], [4, 5]]
    rest, kept = held_out(samples([16] * 20), 4)
    assert (len(rest), len(kept)) == (16, 4)
    with pytest.raises(AssetError, match="too few"):
        held_out(samples([16] * 3), 4)
    assert np.array_equal(samples([6])[0].positions(), [2, 3, 4])
