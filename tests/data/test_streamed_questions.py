"""Streams of questions: which line is asked for, both layouts of ARC, and whose ids are whose."""

import json
import re

import numpy as np
import pytest

from blt_jax.data.streamed_questions import (
    StreamedQuestion,
    choice_questions,
    encode_stream,
    line_questions,
)
from blt_jax.data.tokenizers import ByteTokenizer

PUBLISHED = {
    "question": {
        "stem": "Which is hot?",
        "choices": [{"text": "ice", "label": "A"}, {"text": "fire {x}", "label": "B"}],
    },
    "answerKey": "B",
}
LISTED = {
    "question": "Which is wet?",
    "choices": {"text": ["rain", "sand"], "label": ["1", "2"]},
    "answerKey": "1",
}


@pytest.mark.parametrize(("distance", "every"), [(20, 10), (0, 1), (3, 2)])
def test_every_question_is_about_a_line_so_many_lines_back(distance, every):
    task = dict(questions=12, distance=distance, every=every)
    stream, values, count = line_questions(0, 3, **task), {}, 0
    for asked in stream:
        new = re.findall(r"line (\d+): REGISTER_CONTENT is <(\d{5})>\n", asked.text)
        assert len(new) == every + (distance if not values else 0)
        assert [int(index) for index, _ in new] == list(range(count + 1, count + len(new) + 1))
        values |= dict(new)
        count += len(new)
        index = re.search(r"in line (\d+)\? It is <$", asked.text)[1]
        assert int(index) == count - distance and asked.answer == values[index]
    assert len(set(values.values())) == count
    assert stream == line_questions(0, 3, **task)
    for other in (line_questions(0, 4, **task), line_questions(1, 3, **task)):
        assert [a.answer for a in other] != [a.answer for a in stream]


def test_both_layouts_of_arc(tmp_path):
    path = tmp_path / "arc.jsonl"
    path.write_text("\n".join(map(json.dumps, (PUBLISHED, LISTED))) + "\n\n")
    first, second = choice_questions(str(path))
    text = "Question: Which is hot?\nA. ice\nB. fire {x}\nAnswer:"
    assert first == StreamedQuestion(text, " B", "\n\n")
    assert second.text == "Question: Which is wet?\n1. rain\n2. sand\nAnswer:"
    assert second.answer == " 1"
    assert choice_questions(str(path), 1) == [first]
    # A byte order mark, and a line separator that is none of JSON lines.
    separated = PUBLISHED | {"question": PUBLISHED["question"] | {"stem": "Which\u2028is hot?"}}
    path.write_text("\ufeff" + json.dumps(separated, ensure_ascii=False), encoding="utf-8")
    assert choice_questions(str(path))[0].text.startswith("Question: Which\u2028is hot?")
    # Formats within a template.
    numbered = line_questions(0, 0, questions=1, distance=0, line="{index:03d}={value}\n")
    assert numbered[0].text.startswith("001=")


class PairTokenizer(ByteTokenizer):
    """Bytes, but a ":" and a letter after it are one id, as are a ">" and the line's end."""

    merged = (b": ", b">\n")

    def encode(self, text, *, bos=False, eos=False):
        parts = re.split(rb"(: |>\n)", text.encode())
        ids = [
            [300 + self.merged.index(p)]
            if p in self.merged
            else super(PairTokenizer, self).encode(p)
            for p in parts
        ]
        return np.concatenate(ids)

    def decode(self, ids):
        parts = [
            self.merged[i - 300] if i >= 300 else super(PairTokenizer, self).decode(np.array([i]))
            for i in np.asarray(ids)
        ]
        return b"".join(parts)


def test_ids_of_answers():
    questions = [StreamedQuestion("ab:", " c", "\n"), StreamedQuestion("d", "ef", "")]
    ids, owners = encode_stream(ByteTokenizer(), questions)
    assert ids[0] == ByteTokenizer().bos_id and len(ids) == 1 + 6 + 3
    np.testing.assert_array_equal(owners, [0, 0, 0, 0, 1, 1, 0, 0, 2, 2])
    assert ByteTokenizer().decode(ids[1:]) == b"ab: c\ndef"
    # ": " is one id: who goes on after "ab" has to write it.
    _, owners = encode_stream(PairTokenizer(), questions)
    np.testing.assert_array_equal(owners, [0, 0, 0, 1, 1, 0, 0, 2, 2])


def test_bad_inputs(tmp_path):
    with pytest.raises(ValueError, match=r"the answer '1>' and its ending '\\n' share an id"):
        encode_stream(PairTokenizer(), [StreamedQuestion("a", "1>", "\n")])
    with pytest.raises(ValueError, match="questions=0: must be >= 1"):
        line_questions(0, 0, questions=0, distance=1)
    with pytest.raises(ValueError, match="distance=-1: must be >= 0"):
        line_questions(0, 0, questions=1, distance=-1)
    with pytest.raises(ValueError, match="questions=9001, every=10, distance=0: 90010 lines"):
        line_questions(0, 0, questions=9001, distance=0)
    with pytest.raises(ValueError, match=r"line='\{index\}': must have \{index\} and \{value\}"):
        line_questions(0, 0, questions=1, distance=0, line="{index}")
    for line in ("{{index}} {{value}}", "{index} {value} {x}", "{index} {value"):
        with pytest.raises(ValueError, match="line="):
            line_questions(0, 0, questions=1, distance=0, line=line)
    with pytest.raises(ValueError, match="question 1 has no answer"):
        encode_stream(ByteTokenizer(), [StreamedQuestion("a", "", "")])
    path = tmp_path / "arc.jsonl"
    path.write_text("\n\n" + json.dumps(PUBLISHED | {"answerKey": "E"}))
    with pytest.raises(ValueError, match=r"line 3 has answer 'E', choices \['A', 'B'\]"):
        choice_questions(str(path))
    path.write_text(json.dumps(LISTED) + "\n" + json.dumps({"question": "why?"}))
    with pytest.raises(ValueError, match=r"arc\.jsonl, line 2 is no question of ARC"):
        choice_questions(str(path))
    with pytest.raises(ValueError, match=r"choice='x': must have \{label\} and \{text\}"):
        choice_questions(str(path), choice="x")
    twice = {"question": "?", "choices": {"label": ["A", "A"], "text": "xy"}, "answerKey": "A"}
    path.write_text(json.dumps(twice))
    with pytest.raises(ValueError, match=r"line 1 has choices \['A', 'A'\]: must be different"):
        choice_questions(str(path))
    with pytest.raises(ValueError, match="count=-1: must be >= 0"):
        choice_questions(str(path), -1)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"arc\.jsonl: no JSON object"):
        choice_questions(str(path))
