"""Arithmetic stories: right workings, shortcuts, disjoint splits, rows that depend on the index."""

import numpy as np
import pytest

from blt_jax.data import word_problems as words
from blt_jax.data.sources import Split
from blt_jax.data.word_problems import BOS_ID, EOS_ID, Manner

PROBLEMS = words.word_problems(60, seed=3)


def test_workings_compute_and_shortcuts_copy():
    for problem in PROBLEMS:
        lines = problem.working().split(" ; ")
        assert 2 <= len(lines) - 1 <= words.MOST_CHANGES
        value = problem.start
        for line in lines[:-1]:
            left, result = line.split(" = ")
            assert int(left.split()[0]) == value and eval(left) == int(result)
            value = int(result)
        assert lines[-1] == f"so {value}" and value == problem.answer
        assert words.read_answer(problem.working()) == problem.answer
        short = problem.working(Manner.SHORTCUT).split(" ; ")
        assert short[:-2] == lines[:-2]
        assert short[-2].split(" = ")[0] == lines[-2].split(" = ")[0]
        assert words.read_answer(" ; ".join(short)) == problem.numbers[-1] != problem.answer
        told = [int(word) for word in problem.story().split() if word.isdigit()]
        assert told == list(problem.numbers)


def test_ids():
    text = PROBLEMS[0].story()
    assert words.decode([BOS_ID, *words.encode(text), EOS_ID, words.PAD_ID]) == text
    assert len(set(words.TOKENS)) == len(words.TOKENS) < 200
    with pytest.raises(ValueError, match="word 'Mia' is not in"):
        words.encode("Mia has")


@pytest.mark.parametrize(
    ("text", "answer"),
    [("so 7", 7), ("1 + 2 = 3 ; so 3 so 4", 4), ("1 + 2 = 3", None), ("so", None)],
)
def test_read_answer(text, answer):
    assert words.read_answer(text) == answer


def test_held_out_problems_are_not_trained_on():
    train = words.word_problems(400, seed=0, split=Split.TRAIN)
    held_out = words.word_problems(100, seed=0)
    numbers = [{(p.start, p.changes) for p in part} for part in (train, held_out)]
    assert not numbers[0] & numbers[1]
    assert [len(part) for part in numbers] == [400, 100]
    assert held_out == words.word_problems(100, seed=0)
    assert held_out != words.word_problems(100, seed=1)


def test_rows():
    rows = words.word_problem_rows(range(4, 7), length=160, seed=2)
    alone = words.word_problem_rows([5], length=160, seed=2)
    for name, value in rows.items():
        np.testing.assert_array_equal(value[1:2], alone[name])
    other = words.word_problem_rows([5], length=160, seed=2, split=Split.VALIDATION)
    assert (other["tokens"] != alone["tokens"]).any()
    for row in range(3):
        segments, learned = rows["segment_ids"][row], rows["target_mask"][row]
        for number in range(1, segments.max() + 1):
            inside = segments == number
            ids = rows["tokens"][row][inside]
            assert (
                ids[0] == BOS_ID and (rows["positions"][row][inside] == range(inside.sum())).all()
            )
            np.testing.assert_array_equal(rows["targets"][row][inside][:-1], ids[1:])
            taught = words.decode(rows["targets"][row][inside & learned])
            assert taught and "?" not in taught and "how" not in taught
        assert not learned[segments == 0].any()


def test_share_of_shortcuts():
    def shortcut(number, share):
        ids = words.document(seed=number, split=Split.TRAIN, shortcut_share=share)
        change, _, result, _, _, answer = words.decode(ids).split()[-6:]
        assert result == answer
        return change == result

    found = [
        np.mean([shortcut(number, share) for number in range(200)]) for share in (0.0, 0.3, 1.0)
    ]
    assert found[0] == 0 and 0.2 < found[1] < 0.4 and found[2] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: words.word_problems(0), "count=0"),
        (lambda: words.document(seed=0, split=Split.TRAIN, shortcut_share=1.5), "shortcut_share"),
        (lambda: words.word_problem_rows([0], length=64), "length=64: must be >= 102"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
