"""Questions in streams: what counts as answered, and whole runs of a model in a folder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.data.loader import DataConfig
from blt_jax.data.sources import SourceConfig, SourceKind, Split
from blt_jax.data.streamed_questions import line_questions
from blt_jax.data.tokenizers import TokenizerConfig
from blt_jax.decoding.streaming_decoder import streaming_decoder
from blt_jax.decoding.streaming_llm import dense, sinks, window
from blt_jax.dist.sharding import init_params
from blt_jax.interop.hugging_face import save_pretrained
from blt_jax.models import llama3
from blt_jax.recipes import streaming_questions
from blt_jax.recipes.streaming import PretrainedStream
from blt_jax.recipes.streaming_questions import ChoiceStream, LineStream, answered
from blt_jax.train.launch import run_experiment

MODES = (("window", window(8)), ("sinks", sinks(2, 6)))


@pytest.fixture(scope="module")
def made():
    model = llama3.byte_level(num_layers=1, d_model=16, num_heads=2).build()
    return model, init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    save_pretrained(*made, path)
    return str(path)


def test_a_question_counts_where_the_model_would_write_its_whole_answer(made):
    """Texts and the sinks' own greedy answers, one of them with its last id changed."""
    decoder = streaming_decoder(*made, MODES[1][1]).prepare()
    step, random = jax.jit(type(decoder).step), np.random.default_rng(0)

    def stream(wrong):
        ids, owners, cache, logits = [], [], decoder.new_cache(1), None

        def read(token, owner):
            nonlocal cache, logits
            ids.append(token)
            owners.append(owner)
            logits, cache = step(decoder, jnp.asarray([token], jnp.int32), cache)

        for question in range(1, 5):
            for token in random.integers(4, 260, 5 + question):
                read(int(token), 0)
            for place in range(3):
                best = int(logits[0].argmax())
                read((best + 1) % 260 if question == wrong and place == 2 else best, question)
        return np.array(ids), np.array(owners)

    streams = [stream(wrong=3), stream(wrong=1)]
    streams[1] = tuple(part[:-4] for part in streams[1])  # the last question has no answer
    found = answered(*made, MODES, streams)
    np.testing.assert_array_equal(found["sinks"], [1, 1, 0, 1, 0, 1, 1])
    # Another mode reads other keys, and would write something else somewhere.
    assert not found["window"].all() and found["window"].shape == (7,)


def test_lines(folder, tmp_path):
    config = LineStream(
        model_path=folder,
        tokenizer=TokenizerConfig(),
        modes=MODES,
        distances=(0, 2),
        streams=3,
        questions=2,
        every=1,
        batch_size=2,
    )
    numbers = run_experiment(config, tmp_path)
    assert {name: numbers[name] for name in numbers if "accuracy" in name} == {
        f"accuracy_{mode}_{distance}": 0.0 for mode in ("window", "sinks") for distance in (0, 2)
    }
    assert (tmp_path / "figures" / "accuracy_by_distance.png").exists()


def test_lines_are_read_and_their_answers_counted(folder, tmp_path, monkeypatch):
    """Of every distance the streams with its lines, and the share of questions answered."""
    read = []

    def half(model, params, modes, streams):
        read.extend(TokenizerConfig().build().decode(ids[1:]).decode() for ids, _ in streams)
        first = np.concatenate([np.arange(owners.max()) == 0 for _, owners in streams])
        return {"window": first, "sinks": first | True}

    monkeypatch.setattr(streaming_questions, "answered", half)
    task = dict(distances=(0, 2), streams=3, questions=2, every=1, batch_size=2)
    config = LineStream(model_path=folder, tokenizer=TokenizerConfig(), modes=MODES, **task)
    numbers = run_experiment(config, tmp_path)
    for distance in config.distances:
        assert numbers[f"accuracy_window_{distance}"] == 0.5
        assert numbers[f"accuracy_sinks_{distance}"] == 1.0
    assert len(read) == 6
    for number, text in enumerate(read):
        distance = config.distances[number // 3]
        questions = line_questions(0, number % 3, questions=2, distance=distance, every=1)
        assert text == "".join(q.text + q.answer + q.ending for q in questions)


def test_choices_alone_and_in_a_stream(folder, tmp_path):
    lines = [
        {"question": f"{n}?", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "A"}
        for n in range(3)
    ]
    path = tmp_path / "arc.jsonl"
    prompt = "Q: {question}\n{choices}\nA:"
    path.write_text("\n".join(map(json.dumps, lines)))
    config = ChoiceStream(
        model_path=folder,
        tokenizer=TokenizerConfig(),
        modes=MODES[:1],
        questions=str(path),
        prompt=prompt,
    )
    numbers = run_experiment(config, tmp_path / "run")
    assert (numbers["accuracy_alone"], numbers["accuracy_window"]) == (0.0, 0.0)
    with pytest.raises(FileNotFoundError):
        run_experiment(dataclasses.replace(config, questions="none"), tmp_path / "none")


def test_a_pretrained_model_reads_a_text(folder, tmp_path):
    """Within the window every mode is the same; dense leaves it there."""
    (tmp_path / "book.txt").write_text("to be or not to be, that is the question. " * 4)
    config = PretrainedStream(
        model_path=folder,
        data=DataConfig(
            sources=(SourceConfig(kind=SourceKind.FILES, paths=(str(tmp_path / "*.txt"),)),),
            split=Split.ALL,
            shuffle=False,
            repeat=False,
        ),
        modes=(*MODES, ("dense", dense()), ("long", window(140))),
        trained_length=16,
        stream_tokens=140,
        bucket=8,
    )
    numbers = run_experiment(config, tmp_path / "run")
    assert numbers["nats_long"] == pytest.approx(numbers["nats_dense"], abs=1e-5)
    assert abs(numbers["nats_window"] - numbers["nats_dense"]) > 1e-3
    assert (tmp_path / "run" / "figures" / "log_perplexity.png").exists()
    with pytest.raises(ValueError, match="stream_tokens=1000: the documents have only"):
        run_experiment(dataclasses.replace(config, stream_tokens=1000), tmp_path / "short")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch_size=0), r"LineStream\.batch_size=0: must be >= 1"),
        (dict(distances=()), r"LineStream\.distances=\(\): must be >= 0, not empty"),
        (dict(streams=0), r"LineStream\.streams=0: must be >= 1"),
        (dict(questions=0), r"LineStream\.questions=0: must be >= 1"),
        (dict(question="Which?"), r"LineStream\.question='Which\?': must have \{index\}, and no"),
    ],
)
def test_bad_fields(change, message):
    with pytest.raises(ValueError, match=message):
        LineStream(**dict(model_path="x", tokenizer=TokenizerConfig(), modes=MODES) | change)


def test_bad_models(folder, tmp_path):
    path = tmp_path / "arc.jsonl"
    path.write_text(
        '{"question": "1?", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "A"}'
    )
    options = dict(questions=str(path), modes=())
    config = ChoiceStream(model_path=folder, tokenizer=TokenizerConfig(), **options)
    with pytest.raises(ValueError, match=r"ChoiceStream\.modes=\[\]: give"):
        run_experiment(config, tmp_path / "a")
    with pytest.raises(ValueError, match=r"ChoiceStream\.prompt='x': must have \{question\}"):
        dataclasses.replace(config, prompt="x")
    with pytest.raises(ValueError, match=r"ChoiceStream\.modes has 'alone'"):
        dataclasses.replace(config, modes=(("alone", dense()),))
    with pytest.raises(ValueError, match=r"ChoiceStream\.count=-1"):
        dataclasses.replace(config, count=-1)
