"""A user's tasks from files: read whole and exactly, or refused in a line that names file, row and token."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from subcircuit.analysis.tasks import task, task_from_file
from subcircuit.engine.errors import TaskError
from task_tokenizers import tokenizer_of

MAY = {
    "clean": "Ring done in May. Van done in June. Box done in",
    "corrupted": "Ring done in May. Van done in March. Box done in",
    "answer": "July",
    "wrong": "June",
}
NINE = {
    "clean": "Ring done in 7. Van done in 8. Box done in",
    "corrupted": "Ring done in 7. Van done in 3. Box done in",
    "answer": "9",
    "wrong": "8",
}


def write(folder: Path, rows: list[dict[str, Any]], suffix: str) -> str:
    file = folder / f"mine{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        with file.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(
                {key: "|".join(cell) if isinstance(cell, list) else cell for key, cell in row.items()} for row in rows
            )
    return str(file)


@pytest.mark.parametrize("suffix", [".csv", ".json"])
@pytest.mark.parametrize("name", ["tiny-gpt2", "smollm2-135m", "gpt2", "llama2"])
def test_a_file_gives_the_tokens_of_its_texts(name: str, suffix: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name)
    made = task_from_file(write(tmp_path, [MAY, MAY | {"answer": "August"}], suffix), tokenizer)
    assert (made.name, made.n, made.template, made.answers) == ("mine", 2, "file", None)
    assert made.corrupted is not None
    assert made.clean.tolist() == [tokenizer.encode(MAY["clean"])] * 2
    assert made.corrupted.tolist() == [tokenizer.encode(MAY["corrupted"])] * 2
    assert [*made.clean[1].tolist(), int(made.answer[1])] == tokenizer.encode(f"{MAY['clean']} August")
    assert [*made.clean[1].tolist(), int(made.wrong[1])] == tokenizer.encode(f"{MAY['clean']} June")


def test_several_answers_are_sets(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("tiny-gpt2")
    rows = [
        {
            "clean": MAY["clean"],
            "corrupted": MAY["corrupted"],
            "answers": ["July", "August"],
            "wrongs": ["June", "May"],
        },
        {"clean": MAY["clean"], "corrupted": MAY["corrupted"], "answers": ["July"], "wrongs": ["June", "May"]},
    ]
    for suffix in (".csv", ".json"):
        made = task_from_file(write(tmp_path, rows, suffix), tokenizer)
        july, august = (tokenizer.encode(f"in {month}")[-1] for month in ("July", "August"))
        assert made.answer_sets[0].tolist() == [[july, august], [july, -1]]
        assert torch.equal(made.answer_sets[0][:, 0], made.answer)


@pytest.mark.parametrize("name", ["smollm2-135m", "llama2"])
def test_a_space_that_is_a_token_of_its_own_ends_the_prompt(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name)
    made = task_from_file(write(tmp_path, [NINE], ".csv"), tokenizer)
    assert [*made.clean[0].tolist(), int(made.answer[0])] == tokenizer.encode(f"{NINE['clean']} 9")
    assert made.prompts == (f"{NINE['clean']} ",)
    assert made.pos == len(tokenizer.encode(NINE["clean"])) + 1
    with_space = NINE | {"clean": f"{NINE['clean']} ", "corrupted": f"{NINE['corrupted']} "}
    if name == "smollm2-135m":
        again = task_from_file(write(tmp_path, [with_space], ".csv"), tokenizer)
        assert again.fingerprint() == made.fingerprint()


def test_without_a_gap_the_answer_follows_at_once(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("gpt2")
    row = {"clean": "from 1743 to 17", "corrupted": "from 1701 to 17", "answer": "51", "wrong": "42", "gap": ""}
    for suffix in (".csv", ".json"):
        made = task_from_file(write(tmp_path, [row], suffix), tokenizer)
        assert [*made.clean[0].tolist(), int(made.answer[0])] == tokenizer.encode("from 1743 to 1751")


def test_a_file_is_a_task_by_its_path(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("tiny-gpt2")
    file = write(tmp_path, [MAY, NINE | {"corrupted": MAY["corrupted"]}, MAY], ".csv")
    assert task(file, tokenizer).n == 3
    assert task(file, tokenizer, n=2).fingerprint() == task_from_file(file, tokenizer).subset([0, 1]).fingerprint()
    for wrong in ({"template": "done"}, {"starts": [1]}, {"n": 0}):
        with pytest.raises(TaskError, match="has neither templates nor start values"):
            task(file, tokenizer, **wrong)
    with pytest.raises(TaskError, match="got a tokenizer alone"):
        task(file, tokenizer, filter=True)


def test_corrupted_prompts_may_be_left_out_everywhere_only(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("tiny-gpt2")
    alone = {key: MAY[key] for key in ("clean", "answer", "wrong")}
    assert task_from_file(write(tmp_path, [alone], ".csv"), tokenizer).corrupted is None
    with pytest.raises(TaskError, match=r"mine.json, row 2: no corrupted prompt; expected one in every row or in none"):
        task_from_file(write(tmp_path, [MAY, alone], ".json"), tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "Xanthippe"}, r"mine.csv, row 2: 'Xanthippe' is \d+ tokens for tiktoken/gpt2 \(.*\); expected one"),
        ({"wrong": "July"}, r"row 2: ' July' is an answer and a wrong answer"),
        ({"answer": ""}, r"row 2: no answer; expected text in the column answer, or several in answers"),
        ({"clean": " "}, "row 2: no clean prompt"),
        (
            {"clean": "Box done in"},
            r"row 2: the clean prompt has 3 tokens, the first row's clean one 13; .*'Box' ' done'",
        ),
        ({"corrupted": "Box done in"}, "row 2: the corrupted prompt has 3 tokens"),
        ({"corrupted": MAY["clean"]}, "row 2: clean and corrupted prompt are the same"),
        ({"clean": MAY["clean"] + " "}, r"row 2: tiktoken/gpt2 joins the end of the prompt .*'July'"),
    ],
)
def test_a_bad_row_is_named(change: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        task_from_file(write(tmp_path, [MAY, MAY | change], ".csv"), tokenizer_of("gpt2"))
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("tiny-gpt2")
    contents = {
        "none.csv": ("", "has no rows"),
        "header.csv": ("clean,corrupted,answer,wrong\n", "has no rows"),
        "columns.csv": (
            "prompt,answer\na b,c\n",
            "columns.csv, row 1: no clean prompt; expected text in the column clean",
        ),
        "bad.json": ("{", "bad.json is not JSON"),
        "dict.json": ('{"clean": 1}', "dict.json: expected a list of objects with the keys clean"),
        "number.json": ('[{"clean": 1}]', "number.json, row 1: no clean prompt"),
        "mine.txt": ("", "ending '.txt' is not known; expected .csv or .json"),
    }
    for name, (text, message) in contents.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(TaskError, match=message):
            task_from_file(tmp_path / name, tokenizer)
    with pytest.raises(TaskError, match=r"missing\.csv cannot be read"):
        task_from_file(tmp_path / "missing.csv", tokenizer)
