"""Contrastive decoding of two released models on questions with a number as the answer.

For pairs that the user supplies: Hugging Face folders of Llamas with one tokenizer, a file of
questions (as of GSM8K) and a text with worked examples, which every prompt begins with.
"""

import dataclasses
import functools
import pathlib
import re

import jax
import numpy as np

from blt_jax.data.sources import json_records
from blt_jax.data.tokenizers import Tokenizer, TokenizerConfig
from blt_jax.decoding.contrastive_decoding import (
    ContrastiveDecoder,
    check_strengths,
    check_tokenizers,
)
from blt_jax.decoding.decoder import token_decoder
from blt_jax.decoding.sampling import SamplingConfig, generate, row_keys
from blt_jax.interop.hugging_face import load_pretrained
from blt_jax.recipes.contrastive_report import bootstrap_interval, outcome_text, vote_shares
from blt_jax.recipes.samples import encode_prompts
from blt_jax.train.pretraining import Context, Experiment

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ContrastiveQuestions(Experiment):
    """Answers of the expert alone and of the pair, at beta under mask alpha: greedy, and the
    majority of some drawn at `temperature` (the paper: 0.7).

    expert, amateur: folders. vocab_size: ids that both have, where a model pads its vocabulary, 0
    all. questions: JSON lines with `question` and `answer`, whose last number counts. tokenizer,
    amateur_tokenizer: of both models, and of the amateur if it has a file of its own, which must
    have the same ids. shots: file of worked examples, "" for none. prompt: follows them; a
    completion ends where `ending` appears in it. count: questions taken, 0 all. votes: how many
    answers vote, each number by itself; () for greedy answers alone.
    """

    expert: str
    amateur: str
    questions: str
    tokenizer: TokenizerConfig
    amateur_tokenizer: TokenizerConfig | None = None
    vocab_size: int = 0
    shots: str = ""
    prompt: str = "Q: {question}\nA:"
    ending: str = "\n\n"
    alpha: float = 0.1
    beta: float = 0.5
    count: int = 0
    batch_size: int = 8
    new_tokens: int = 256
    examples: int = 5
    votes: tuple[int, ...] = ()
    temperature: float = 0.7

    def __post_init__(self):
        check_strengths(self.alpha, self.beta)
        if "{question}" not in self.prompt:
            raise ValueError(f"ContrastiveQuestions.prompt={self.prompt!r}: must hold {{question}}")
        if self.count < 0:
            raise ValueError(f"ContrastiveQuestions.count={self.count}: must be >= 0 (0: all)")
        if self.votes and (min(self.votes) < 1 or self.temperature <= 0):
            raise ValueError(
                f"ContrastiveQuestions.votes={self.votes}, temperature={self.temperature}: must be "
                ">= 1 and > 0"
            )
        for name in ("batch_size", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"ContrastiveQuestions.{name}={getattr(self, name)}: must be >= 1")

    def run(self, context: Context) -> dict[str, float]:
        """`exact_match_greedy`, `exact_match`, its gain with a 95 % bootstrap interval; `vote_N`
        of the pair and `vote_N_expert` of the expert alone for the majority of N answers.

        Raises FileNotFoundError for missing files, ValueError for models or tokenizers whose
        vocabularies differ, questions without a number, and on several processes.
        """
        if jax.process_count() > 1:
            raise ValueError(f"{jax.process_count()} processes: this recipe needs one")
        asked, solved = read_questions(self.questions, self.count)
        examples = pathlib.Path(self.shots).read_text() if self.shots else ""
        tokenizer = self.tokenizer.build()
        if self.amateur_tokenizer is not None:
            check_tokenizers(tokenizer, self.amateur_tokenizer.build())
        prompts = tuple(examples + self.prompt.replace("{question}", text) for text in asked)
        tokens, lengths = encode_prompts(tokenizer, prompts)
        pair = self._pair(context, tokens.shape[1] + self.new_tokens)
        truth = [last_number(text) for text in solved]
        found, numbers = [], {}
        for name, decoder in (("_expert", pair.replace(alpha=0.0, beta=0.0)), ("", pair)):
            complete = functools.partial(self._complete, decoder, tokenizer, tokens, lengths)
            for votes, share in self._votes(complete, truth, context.key).items():
                numbers[f"vote_{votes}{name}"] = share
            texts = complete(SamplingConfig(temperature=0.0))
            right = [last_number(a) == b for a, b in zip(texts, truth, strict=True)]
            found.append((texts, np.array(right, np.float64)))
        greedy, contrast = (right for _, right in found)
        low, high = bootstrap_interval(contrast - greedy)
        context.writer.text("examples", outcome_text(asked, solved, *found, self.examples))
        return {
            "exact_match_greedy": float(greedy.mean()),
            "exact_match": float(contrast.mean()),
            "exact_match_gain": float(contrast.mean() - greedy.mean()),
            "exact_match_gain_low": low,
            "exact_match_gain_high": high,
            **numbers,
        }

    def _votes(self, complete, truth, key) -> dict[int, float]:
        """Exact match of the majority of the first answers, for every number of them."""
        sampling = SamplingConfig(temperature=self.temperature)
        rounds = [
            [last_number(text) for text in complete(sampling, jax.random.fold_in(key, number))]
            for number in range(max(self.votes, default=0))
        ]
        return vote_shares(rounds, truth, self.votes)

    def _pair(self, context: Context, capacity: int) -> ContrastiveDecoder:
        decoders = [
            token_decoder(*load_pretrained(path, mesh=context.mesh), capacity)
            for path in (self.expert, self.amateur)
        ]
        return ContrastiveDecoder.create(
            *decoders, self.vocab_size, alpha=self.alpha, beta=self.beta
        )

    def _complete(
        self,
        pair: ContrastiveDecoder,
        tokenizer: Tokenizer,
        tokens: np.ndarray,
        lengths: np.ndarray,
        sampling: SamplingConfig,
        key: jax.Array | None = None,
    ) -> list[str]:
        """Completions up to `ending`, in batches of one shape; a key for every row by its
        number."""
        keys = None if key is None else row_keys(key, len(tokens))
        texts = []
        for first in range(0, len(tokens), self.batch_size):
            rows = np.minimum(np.arange(first, first + self.batch_size), len(tokens) - 1)
            new = generate(
                pair,
                tokens[rows],
                lengths[rows],
                sampling,
                self.new_tokens,
                tuple(tokenizer.stop_ids),
                None if keys is None else keys[rows],
            )
            for ids, length in zip(np.asarray(new.tokens), np.asarray(new.lengths), strict=True):
                text = tokenizer.decode(ids[:length]).decode(errors="replace")
                texts.append(text.split(self.ending)[0] if self.ending else text)
        return texts[: len(tokens)]


def read_questions(path: str, count: int = 0) -> tuple[list[str], list[str]]:
    """Questions and answers of a JSON-lines file, the first `count` (0: all).

    Raises as `json_records`, and ValueError naming the line that lacks one of them or whose answer
    has no number.
    """
    asked, solved = [], []
    for where, entry in json_records(path, count):
        if not {"question", "answer"} <= entry.keys() or last_number(entry["answer"]) is None:
            raise ValueError(f"{where} needs a question, and an answer with a number")
        asked.append(entry["question"])
        solved.append(entry["answer"])
    return asked, solved


def last_number(text: str) -> float | None:
    """The last number of a text, commas within it left out; None if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
