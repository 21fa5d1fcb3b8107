"""The commands heads, lens, transfer, vector and generate --steer as a person meets them."""

from __future__ import annotations

import json
import re

import pytest

import subcircuit as sc

TINY = ("--model", "tiny-gpt2", "--n", 8)
HEADS = [(0, 1), (1, 6), (2, 0)]


@pytest.fixture
def circuit_file(tmp_path):
    sc.Circuit(HEADS, [0, 1], task="months").save(tmp_path / "months.json")
    return tmp_path / "months.json"


def test_heads_of_a_circuit_with_roles_evidence_and_figures(run, circuit_file, tmp_path):
    status, out, err = run("heads", *TINY, "--task", "months", "--circuit", circuit_file, "--out", tmp_path / "f")
    assert status == 0
    assert "months: 3 heads of the circuit, 8 prompts" in out
    assert re.search(r"a0\.h1 +next member +newest member 0\.\d\d \(needs > 0\.\d\d\); OV next", out)
    assert re.search(r"a1\.h6 +similar member", out)
    assert re.search(r"^mean of all +0\.\d\d +0\.\d\d ", out, re.MULTILINE)
    assert "member 2 → member 1  member 3 → member 2  member 4 → member 3  last token → newest member" in out
    assert re.search(r"^a1\.h6 +members +0\.\d\d \[0\.\d\d, 0\.\d\d\] ", out, re.MULTILINE)
    written = {file.name for file in (tmp_path / "f").iterdir()}
    assert written == {"roles.svg", "months.ov.svg", *(f"months.attention.a{i}.h{j}.svg" for i, j in HEADS)}
    assert err.endswith(f"wrote 5 figures in {tmp_path / 'f'}\n")


def test_heads_asked_for_are_shown_whatever_they_do(run, tmp_path):
    arguments = ("heads", *TINY, "--task", "months", "--heads", "a1.h5, a0.h1,a1.h5", "-q")
    status, out, _ = run(*arguments, "--out", tmp_path)
    assert status == 0
    assert "months: 2 heads asked for, 8 prompts" in out
    assert len(re.findall(r"^a1\.h5 +members +0\.\d\d \[", out, re.MULTILINE)) == 1
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {"roles.svg", "months.ov.svg", "months.attention.a0.h1.svg", "months.attention.a1.h5.svg"}
    values = json.loads(run(*arguments, "--json")[1])["tasks"]["months"]
    assert [row["head"] for row in values["heads"]] == ["a0.h1", "a1.h5"]
    assert {row["head"] for row in values["lookups"]} == {"a0.h1", "a1.h5"}


def test_roles_of_two_tasks_are_compared(run):
    status, out, _ = run("heads", *TINY, "--tasks", "months,numerals", "--top", 6, "-q", "--json")
    assert status == 0
    values = json.loads(out)
    assert set(values["tasks"]) == {"months", "numerals"}
    months = values["tasks"]["months"]["heads"]
    assert len(months) == 6
    assert all(head["roles"] for head in months)
    assert {"ov", "qk_similar", "direct", "evidence", "attention"} <= set(months[0])
    assert 0 < values["tasks"]["months"]["mean_of_all_heads"]["ov"]["next"] < months[0]["ov"]["next"]
    assert {row["head"] for row in values["tasks"]["months"]["lookups"]} == {head["head"] for head in months}
    shared = {(row["head"], row["role"]): row["tasks"] for row in values["shared_roles"]}
    assert shared["a1.h6", "similar member"] == ["months", "numerals"]


def test_lens_says_where_the_answer_takes_over(run, tmp_path):
    status, out, err = run("lens", *TINY, "--task", "months", "--positions", "each", "--out", tmp_path)
    assert (status, err) == (0, f"wrote 3 figures in {tmp_path}\n")
    stages = re.findall(r"^(the embedding|layer \d, \w+) ", out.split("In half")[0], re.MULTILINE)
    assert len(stages) == 9
    assert re.search(r"answer leads the last member for good after layer \d, \w+;", out)
    assert re.search(r"Most often layer \d does: in \d+% of the prompts", out)
    assert out.count("First prompt, position") == 23
    assert re.search(r"^m3 +[+-]\d", out, re.MULTILINE)
    assert {file.name for file in tmp_path.iterdir()} == {f"months.{n}.svg" for n in ("lens", "tokens", "direct")}
    assert run("lens", *TINY, "--task", "months", "--out", tmp_path, "--quiet")[2] == ""
    status, out, _ = run("lens", *TINY, "--task", "months", "--neurons", 2, "--top", 3, "--json")
    values = json.loads(out)
    assert values["stages"][-1]["answer_rank"] == 1
    assert len(values["first_prompt"]["top"][0][0]) == 3
    assert sum(row["kind"] == "neuron" for row in values["direct"]) == 2
    assert len(values["handovers"]) == 4


def test_lengths_say_how_sure_the_model_is_after_each_member(run, tmp_path):
    arguments = ("lengths", *TINY, "--tasks", "months,weekdays", "--longest", 7)
    status, out, err = run(*arguments, "--out", tmp_path / "lengths.svg")
    assert status == 0
    row = r"^{} +{} +[01]\.\d+ +\[\d\.\d+, \d\.\d+\] +\d+% +\[\d+%, \d+%\]"
    assert re.search(row.format("months", 1), out, re.MULTILINE)
    assert len(re.findall(row.format("", r"\d"), out, re.MULTILINE)) == 6 + 5
    assert err == f"wrote {tmp_path / 'lengths.svg'}\n"
    assert run(*arguments, "--out", tmp_path / "lengths.svg", "--quiet")[2] == ""
    assert run(*arguments, "--out", tmp_path / "lengths.png")[2].endswith("ends in .svg\n")
    assert "No more of task 'weekdays': template 'done' needs 8 members in a row" in out
    assert (tmp_path / "lengths.svg").read_text().startswith("<svg")
    status, out, _ = run(*arguments, "--json")
    assert [row["members"] for row in json.loads(out)["rows"]] == [*range(1, 8), *range(1, 7)]
    assert run("lengths", *TINY, "--tasks", "months", "--longest", 2, "--n", 1)[1].startswith("1 prompt, each read")
    status, _, err = run("lengths", *TINY, "--tasks", "interval_2", "--longest", 3, "--filter")
    assert (status, "pass the filter" in err) == (2, True)
    status, out, _ = run("lens", *TINY, "--task", "months", "--members", 2, "--positions", "each")
    assert status == 0
    assert out.count("First prompt, position") == 13


def test_transfer_compares_a_circuit_with_random_heads(run, circuit_file, tmp_path):
    arguments = ("transfer", *TINY, "--circuit", circuit_file, "--kinds", "months,interval_2", "--random", 3)
    status, out, err = run(*arguments, "--out", tmp_path / "t.svg")
    assert status == 0
    assert err.endswith(f"wrote {tmp_path / 't.svg'}\n")
    assert "months: without heads 0.1 1.6 2.0" in out
    assert re.search(r"^months +months +8/8 +\d+% ", out, re.MULTILINE)
    assert "no prompt of interval_2 rightly" in out
    assert (tmp_path / "t.svg").read_text().startswith("<svg")
    status, out, _ = run(*arguments, "--heads", "a3.h1,a3.h0,a3.h1", "--ablation", "mean", "--json", "-q")
    rows = {(row["kind"], row["circuit"]): row for row in json.loads(out)["kinds"]}
    assert {row["circuit"] for row in rows.values()} == {"months", "a3.h0,a3.h1"}
    mine = rows["months", "months"]
    assert mine["share"] == sum(prompt["correct"] for prompt in mine["prompts"]) / 8
    assert rows["months", "a3.h0,a3.h1"]["n_heads"] == 2
    assert rows["interval_2", "months"]["share"] is None


def test_a_task_file_is_a_kind_to_transfer_to_and_has_a_card(run, tmp_path):
    file = tmp_path / "mine.csv"
    rows = ["May June July,May June March,August,July", "April May June,April May January,July,June"]
    rows += ["June July August,June July April,September,August"]
    file.write_text("\n".join(["clean,corrupted,answer,wrong", *rows]))
    status, out, err = run("transfer", "-m", "tiny-gpt2", "--heads", "a0.h1", "-k", file, "--random", 1, "--json", "-q")
    assert (status, err) == (0, "")
    kind = json.loads(out)["kinds"][0]
    assert (kind["kind"], kind["n_asked"], kind["n_answered"]) == (str(file), 3, 3)
    assert [prompt["expected"] for prompt in kind["prompts"]] == ["August", "July", "September"]
    status, out, _ = run("tasks", file, "-m", "tiny-gpt2")
    assert status == 0
    assert re.search(r"^top-1 +100\.0%", out, re.MULTILINE)
    assert re.search(r"^3 +June July August +June July April +' September' +' August'", out, re.MULTILINE)
    assert f"Source: {file}" in out


def test_a_vector_is_made_and_steers(run, tmp_path):
    file, prompt = tmp_path / "v.safetensors", "Ring lost in 2. Van lost in 3. Box lost in"
    made = ("vector", "-m", "tiny-gpt2", "--at", "r2", "--towards", "Ring lost in May. Van lost in June. Box lost in")
    status, out, err = run(*made, "--away-from", prompt, "--out", file)
    assert (status, err) == (0, f"wrote {file}\n")
    assert f"--steer {file}@r2" in out
    texts = []
    for steer in ((), ("--steer", f"{file}@r2*0"), ("--steer", f"{file}@r2@-1*2")):
        status, out, _ = run("generate", "-m", "tiny-gpt2", prompt, "--max-new-tokens", 1, *steer, "--json")
        assert status == 0
        texts.append(json.loads(out)[0]["text"])
    assert texts[:2] == [" 4", " 4"]
    assert texts[2] != " 4"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("heads", *TINY, "--task", ","), "no task"),
        (("heads", *TINY, "--task", "colours"), "'colours'"),
        (("heads", *TINY, "--task", "months", "--circuit", "nowhere.json"), "nowhere.json"),
        (("lens", *TINY, "--task", "months", "--positions", "30"), "position 30 is not there"),
        (("lens", *TINY, "--task", "ioi", "--members", "3"), "task 'ioi' shows no members"),
        (("lengths", *TINY, "--task", "ioi"), "task 'ioi' shows no members"),
        (("lengths", *TINY, "--task", ","), "no task"),
        (("transfer", *TINY, "--kinds", "months"), "nothing to ablate"),
        (("transfer", *TINY, "--heads", "a9.h0"), "'a9.h0' does not exist"),
        (("transfer", *TINY, "--heads", "a0.h0", "--kinds", "sums"), "kind 'sums' is not known"),
        (("transfer", *TINY, "--heads", "a0.h0,m0", "--kinds", "months"), "heads 'a0.h0,m0': expected heads joined by"),
        (("transfer", *TINY, "--heads", ",", "--kinds", "months"), "heads ',': expected heads joined by"),
        (("heads", *TINY, "--task", "months", "--heads", "a9.h0"), "a9.h0 does not exist"),
        (("heads", *TINY, "--task", "months", "--heads", "foo"), "heads 'foo': expected heads joined by"),
        (("heads", *TINY, "--task", "months", "--heads", "a0.h0", "--circuit", "c.json"), "one of the two"),
        (("generate", "-m", "tiny-gpt2", "May", "--steer", "nowhere.safetensors@r2"), "nowhere.safetensors"),
        (("vector", "-m", "tiny-gpt2", "--at", "r2", "--towards", "May", "--away-from", "", "-o", "v"), "empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(run, arguments, words):
    status, out, err = run(*arguments, *(("-q",) if arguments[0] in ("heads", "transfer") else ()))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_circuit_of_a_head_that_the_model_lacks_is_an_error(run, tmp_path):
    sc.Circuit([(9, 0)], [], task="months").save(tmp_path / "far.json")
    status, _, err = run("heads", *TINY, "--task", "months", "--circuit", tmp_path / "far.json", "-q")
    assert status == 2
    assert "a9.h0 does not exist" in err
