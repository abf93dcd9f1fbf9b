"""Released models that answer questions in streams without end (arXiv 2309.17453, sections 4.3 and
4.4): StreamEval's lines and multiple choice one after the other.

The stream holds the true answers; a question counts where the model would write all of its answer.
For models that the user supplies, as folders of Hugging Face.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from blt_jax.data.streamed_questions import (
    CHOICE,
    CHOICE_ENDING,
    CHOICE_QUESTION,
    LINE,
    LINE_ENDING,
    LINE_QUESTION,
    StreamedQuestion,
    check_template,
    choice_questions,
    encode_stream,
    line_questions,
)
from blt_jax.data.tokenizers import TokenizerConfig, check_vocabulary
from blt_jax.decoding.streaming_llm import dense
from blt_jax.interop import hugging_face
from blt_jax.layers.model import Model
from blt_jax.recipes.streaming import Modes, accuracy_figure, check_modes, scores_by_mode
from blt_jax.train.pretraining import Context, Experiment

ALONE = "alone"
LENGTH_STEP = 128
"""Streams are padded to multiples of it, one program for each."""


def answered(
    model: Model, params: Any, modes: Modes, streams: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """For every mode whether each question of streams, as `encode_stream` gives them, is answered:
    bool, one after the other."""
    longest = max(len(ids) for ids, _ in streams)
    longest += -longest % LENGTH_STEP
    tokens, owners = (
        np.stack([np.pad(stream[part], (0, longest - len(stream[part]))) for stream in streams])
        for part in (0, 1)
    )
    scores, _ = scores_by_mode(model, params, modes, tokens)
    result = {}
    for name, found in scores.items():
        right = []
        for row, correct in zip(owners[:, 1:], found.correct, strict=True):
            wrong = np.bincount(row[~correct], minlength=row.max() + 1)
            right.append(wrong[1:] == 0)
        result[name] = np.concatenate(right)
    return result


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class StreamedQuestions(Experiment):
    """A Llama of a Hugging Face folder, `model_path`, reads streams with every mode, `batch_size`
    at once."""

    model_path: str
    tokenizer: TokenizerConfig
    modes: Modes = ()
    batch_size: int = 1

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"{type(self).__name__}.batch_size={self.batch_size}: must be >= 1")

    def _load(self) -> tuple[Model, Any, Any]:
        """Model, parameters, tokenizer. Raises ValueError for modes that they cannot be read with,
        a tokenizer with more ids than the model, and on several processes."""
        if jax.process_count() > 1:
            raise ValueError(f"{jax.process_count()} processes: this recipe needs one")
        model, params = hugging_face.load_pretrained(self.model_path)
        check_modes(type(self).__name__, self.modes, model.config)
        tokenizer = self.tokenizer.build()
        check_vocabulary(tokenizer, model.config.vocab_size, self.model_path)
        return model, params, tokenizer

    def _accuracies(
        self,
        loaded: tuple[Model, Any, Any],
        modes: Modes,
        streams: Sequence[Sequence[StreamedQuestion]],
    ) -> dict[str, float]:
        model, params, tokenizer = loaded
        encoded = [encode_stream(tokenizer, questions) for questions in streams]
        parts = [
            answered(model, params, modes, encoded[first : first + self.batch_size])
            for first in range(0, len(encoded), self.batch_size)
        ]
        return {
            name: float(np.concatenate([part[name] for part in parts]).mean()) for name, _ in modes
        }


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class LineStream(StreamedQuestions):
    """StreamEval: `questions` questions in each of `streams` streams, for every distance in lines.

    every, line, question, ending: see `line_questions`.
    """

    distances: tuple[int, ...] = (20, 40, 60, 80, 100)
    streams: int = 100
    questions: int = 100
    every: int = 10
    line: str = LINE
    question: str = LINE_QUESTION
    ending: str = LINE_ENDING

    def __post_init__(self):
        super().__post_init__()
        if not self.distances or min(self.distances) < 0:
            raise ValueError(f"LineStream.distances={self.distances}: must be >= 0, not empty")
        if self.streams < 1:
            raise ValueError(f"LineStream.streams={self.streams}: must be >= 1")
        try:
            self._stream(0, max(self.distances))
        except ValueError as error:
            raise ValueError(f"LineStream.{error}") from error

    def _stream(self, number: int, distance: int) -> list[StreamedQuestion]:
        task = dict(questions=self.questions, distance=distance, every=self.every)
        layout = dict(line=self.line, question=self.question, ending=self.ending)
        return line_questions(self.seed, number, **task, **layout)

    def run(self, context: Context) -> dict[str, float]:
        """`accuracy_<mode>_<distance in lines>`, and the figure `accuracy_by_distance`.

        Raises as `hugging_face.load_pretrained`, and ValueError for modes or a tokenizer that do
        not fit the model, and on several processes.
        """
        loaded, numbers = self._load(), {}
        lines = {name: [] for name, _ in self.modes}
        for distance in self.distances:
            streams = [self._stream(number, distance) for number in range(self.streams)]
            for name, value in self._accuracies(loaded, self.modes, streams).items():
                numbers[f"accuracy_{name}_{distance}"] = value
                lines[name].append(value)
        label = "lines between the line and its question"
        figure = accuracy_figure(lines, self.distances, label)
        context.writer.figure("accuracy_by_distance", figure)
        return numbers


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ChoiceStream(StreamedQuestions):
    """Multiple choice, all questions of a file as one stream, and each one alone.

    questions: JSON lines of ARC, see `choice_questions` also for prompt (its `question`), choice
    and ending. count: questions taken, 0 all.
    """

    questions: str
    count: int = 0
    prompt: str = CHOICE_QUESTION
    choice: str = CHOICE
    ending: str = CHOICE_ENDING

    def __post_init__(self):
        super().__post_init__()
        if self.count < 0:
            raise ValueError(f"ChoiceStream.count={self.count}: must be >= 0 (0: all)")
        check_template("ChoiceStream.prompt", self.prompt, ("question", "choices"))
        check_template("ChoiceStream.choice", self.choice, ("label", "text"))
        if ALONE in dict(self.modes):
            raise ValueError(f"ChoiceStream.modes has {ALONE!r}, which names what is no mode")

    def run(self, context: Context) -> dict[str, float]:
        """`accuracy_<mode>` in the stream, and `accuracy_alone`.

        Raises as `LineStream.run` and `choice_questions`.
        """
        del context
        layout = dict(question=self.prompt, choice=self.choice, ending=self.ending)
        asked = choice_questions(self.questions, self.count, **layout)
        loaded = self._load()
        alone = self._accuracies(loaded, ((ALONE, dense()),), [[each] for each in asked])
        streamed = self._accuracies(loaded, self.modes, [asked])
        return {f"accuracy_{name}": value for name, value in (alone | streamed).items()}
