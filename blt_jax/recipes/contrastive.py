"""Contrastive decoding of arithmetic stories, whose shortcut is the amateur's known mistake.

An expert, a small amateur and a second expert are trained on `data.word_problems`; checkpoints of
the expert's training are amateurs too. One run judges one kind of amateur on held-out stories;
runs of one comparison share the trained models.
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blt_jax.data import word_problems
from blt_jax.data.loader import DataConfig
from blt_jax.data.sources import Split
from blt_jax.data.synthetic import GeneratedBatches
from blt_jax.data.word_problems import BOS_ID, EOS_ID, Manner, WordProblem
from blt_jax.decoding.contrastive_decoding import (
    ContrastiveDecoder,
    check_strengths,
    contrastive_scores,
    copy_rate,
)
from blt_jax.decoding.decoder import Decoder, token_decoder
from blt_jax.decoding.ngram import NgramDecoder, ngram_log_probabilities
from blt_jax.decoding.sampling import SamplingConfig, generate
from blt_jax.decoding.scoring import rank
from blt_jax.models.llama3 import Llama3Config
from blt_jax.recipes.contrastive_report import (
    Mean,
    amateur_figure,
    amateur_table,
    bootstrap_interval,
    outcome_text,
    strength_figure,
    vote_shares,
)
from blt_jax.recipes.samples import pad_rows
from blt_jax.train.checkpoint import load_params
from blt_jax.train.comparison import Comparison, means
from blt_jax.train.pretraining import Context, Experiment, Fit, Pretraining, shared_context
from blt_jax.train.state import abstract_params

PROMPT_LENGTH, NEW_TOKENS = 1 + word_problems.LONGEST_STORY, word_problems.LONGEST_WORKING + 1
NEGATIVE_SEED = 1


class AmateurKind(enum.Enum):
    """Whom the expert is contrasted with.

    NONE: nobody. SMALL: a smaller model. EARLY: the expert at `early_steps`. EQUAL: another
    expert, trained as long. PROMPT: the expert after an example with the shortcut. SHORTENED: the
    small one, which reads the last token of the story alone (Li et al.). SMALL_PROMPT: the small
    one after the example. NGRAM: 3-grams of the texts that the small one is trained on (Li et al.).
    """

    NONE = "none"
    SMALL = "small"
    EARLY = "early"
    EQUAL = "equal"
    PROMPT = "prompt"
    SHORTENED = "shortened"
    SMALL_PROMPT = "small_prompt"
    NGRAM = "ngram"


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ContrastiveProblems(Experiment):
    """Expert and one kind of amateur on held-out stories, at strength beta under mask alpha.

    alphas, betas: also tried, in one compiled program. shortcut_share: of the training texts.
    problems: judged, the same for every seed. voters: the first of them are also sampled `votes`
    times, the largest, at `temperature`, and answered by majority. examples: problems that the
    contrast wins or loses that `texts/examples.txt` shows of each.
    """

    expert: Pretraining
    small: Pretraining
    kind: AmateurKind = AmateurKind.SMALL
    early_steps: int = 1
    alpha: float = 0.1
    beta: float = 0.5
    alphas: tuple[float, ...] = (0.0, 0.1, 0.3)
    betas: tuple[float, ...] = (0.25, 0.5, 1.0)
    shortcut_share: float = 0.3
    problems: int = 500
    voters: int = 100
    votes: tuple[int, ...] = (1, 5, 10, 20)
    temperature: float = 0.7
    examples: int = 5

    def __post_init__(self):
        for name in ("expert", "small"):
            model = getattr(self, name).model
            if not isinstance(model, Llama3Config) or model.vocab_size < len(word_problems.TOKENS):
                raise ValueError(
                    f"ContrastiveProblems.{name}.model={model}: must be a Llama3Config with "
                    f"vocab_size >= {len(word_problems.TOKENS)}"
                )
            if not getattr(self, name).evaluation.batches:
                raise ValueError(
                    f"ContrastiveProblems.{name}.evaluation.batches=0: must be >= 1, because the "
                    "stream of problems has no end"
                )
        if not 0 < self.early_steps < self.expert.total_steps:
            raise ValueError(
                f"ContrastiveProblems.early_steps={self.early_steps}: must be above 0 and below "
                f"the expert's {self.expert.total_steps} steps"
            )
        for name in ("problems", "voters"):
            if getattr(self, name) < 1:
                raise ValueError(f"ContrastiveProblems.{name}={getattr(self, name)}: must be >= 1")
        for alpha, beta in itertools.product((self.alpha, *self.alphas), (self.beta, *self.betas)):
            check_strengths(alpha, beta)
        SamplingConfig(temperature=self.temperature)  # checks it
        if not self.votes or min(self.votes) < 1:
            raise ValueError(f"ContrastiveProblems.votes={self.votes}: must be >= 1, not empty")

    def run(self, context: Context) -> dict[str, float]:
        """Numbers at (alpha, beta): `exact_match`, its gain over greedy with a 95 % bootstrap
        interval over problems, `shortcut_rate`, `copy_rate`, `vote_K`, `ranking_accuracy` among
        four; `exact_match_alpha_A_beta_B` of the sweep. Raises ValueError on several processes."""
        if jax.process_count() > 1:
            raise ValueError(f"{jax.process_count()} processes: this recipe needs one")
        problems = word_problems.word_problems(self.problems, seed=0)
        pair = self._pair(context, problems)
        sweep = self._sweep(pair, problems)
        greedy, chosen = sweep[0.0, 0.0], sweep[pair.alpha, pair.beta]
        low, high = bootstrap_interval(chosen.right - greedy.right)
        numbers = chosen.numbers() | {
            "exact_match_gain": float(np.mean(chosen.right) - np.mean(greedy.right)),
            "exact_match_gain_low": low,
            "exact_match_gain_high": high,
        }
        for (alpha, beta), outcome in sweep.items():
            numbers[sweep_name(alpha, beta)] = float(outcome.right.mean())
        numbers |= self._votes(pair, problems[: self.voters], context.key)
        numbers |= ranking(pair, problems)
        curves = {setting: outcome.right for setting, outcome in sweep.items() if setting[1]}
        context.writer.figure("strength", strength_figure(curves, greedy.right))
        told = [problem.story() for problem in problems], [p.working() for p in problems]
        compared = (greedy.texts, greedy.right), (chosen.texts, chosen.right)
        context.writer.text("examples", outcome_text(*told, *compared, self.examples))
        return numbers

    def _sweep(
        self, pair: ContrastiveDecoder, problems: Sequence[WordProblem]
    ) -> dict[tuple[float, float], "Outcome"]:
        """Greedy outcomes by (alpha, beta); (0, 0) is the expert alone."""
        settings = {(0.0, 0.0)}
        if self.kind is not AmateurKind.NONE:
            settings |= {(self.alpha, self.beta), *itertools.product(self.alphas, self.betas)}
        return {
            (alpha, beta): Outcome.of(pair.replace(alpha=alpha, beta=beta), problems)
            for alpha, beta in sorted(settings)
        }

    def _pair(self, context: Context, problems: Sequence[WordProblem]) -> ContrastiveDecoder:
        """The trained pair at the settings of the run; NONE is the expert beside itself."""
        fit, early = self._expert(context)
        capacity, kind = PROMPT_LENGTH + NEW_TOKENS, self.kind
        expert = _decoder(fit, capacity)
        if kind is AmateurKind.NONE:
            return ContrastiveDecoder.create(expert, expert, alpha=0.0, beta=0.0)
        settings: dict[str, Any] = {"alpha": self.alpha, "beta": self.beta}
        if kind is AmateurKind.NGRAM:
            return ContrastiveDecoder.create(expert, self._ngrams(), **settings)
        if kind in (AmateurKind.PROMPT, AmateurKind.SMALL_PROMPT):
            settings["amateur_prompt"] = negative_prompts(problems)
            capacity += settings["amateur_prompt"][0].shape[1]
        settings["amateur_context"] = int(kind is AmateurKind.SHORTENED)
        if kind is AmateurKind.EARLY:
            fit = dataclasses.replace(fit, params=early)
        elif kind is AmateurKind.EQUAL:
            fit = self._fit(context, "equal", _other_seed(self.expert))
        elif kind is not AmateurKind.PROMPT:
            fit = self._fit(context, "small", self.small)
        return ContrastiveDecoder.create(expert, _decoder(fit, capacity), **settings)

    def _ngrams(self) -> NgramDecoder:
        """3-grams of as many texts as the small model reads."""
        texts = training_texts(self.small, self.shortcut_share)
        log_probabilities = ngram_log_probabilities(texts, self.expert.model.vocab_size)
        return NgramDecoder(jnp.asarray(log_probabilities))

    def _expert(self, context: Context) -> tuple[Fit, Any]:
        """The expert, and its parameters after `early_steps`."""
        every = self.early_steps
        keeping = dataclasses.replace(
            self.expert.checkpointing, every=every, keep=self.expert.total_steps // every + 1
        )
        config = dataclasses.replace(self.expert, checkpointing=keeping)
        fit = self._fit(context, "expert", config)
        folder = self._shared(context, "expert", config).workdir
        return fit, load_params(folder, abstract_params(fit.model), step=every)

    def _shared(self, context: Context, name: str, config: Pretraining) -> Context:
        # The texts are part of what was trained, but not of its config.
        return shared_context(context, f"{name}_{self.shortcut_share:g}", config)

    def _fit(self, context: Context, name: str, config: Pretraining) -> Fit:
        child = self._shared(context, name, config)
        share = self.shortcut_share
        return config.fit(child, batches=lambda data, rows: word_problem_batches(data, share, rows))

    def _votes(self, pair, problems, key) -> dict[str, float]:
        """Exact match of the majority of the first k sampled answers, for every k."""
        sampling, most = SamplingConfig(temperature=self.temperature), max(self.votes)
        rounds = [
            answers(solve(pair, problems, sampling, jax.random.fold_in(key, number)))
            for number in range(most)
        ]
        truth = [problem.answer for problem in problems]
        return {f"vote_{k}": x for k, x in vote_shares(rounds, truth, self.votes).items()}


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class AmateurComparison(Comparison):
    """`Comparison` of runs of ContrastiveProblems, with all their numbers beside each other."""

    metric: str = "exact_match"

    def report(
        self, context: Context, found: dict[str, list[dict[str, float]]]
    ) -> dict[str, float]:
        """Adds every number of every run (means over the seeds with `_interval`), the table
        `texts/amateurs.txt` and the figure `amateurs`."""
        numbers, by_run = super().report(context, found), means(found)
        if jax.process_index() == 0:
            table = amateur_table(by_run)
            print(table, flush=True)
            context.writer.text("amateurs", table)
            context.writer.figure("amateurs", amateur_figure(self._curves(by_run), by_run))
        for name, values in by_run.items():
            for key, (mean, interval) in values.items():
                numbers[f"{name}/{key}"] = mean
                if interval is not None:
                    numbers[f"{name}/{key}_interval"] = interval
        return numbers

    def _curves(self, found: dict[str, dict[str, Mean]]) -> dict[str, dict[float, Mean]]:
        """Exact match by beta of every amateur, at the alpha of its run."""
        curves = {}
        for name, experiment in self.runs:
            if experiment.kind is not AmateurKind.NONE:
                curves[name] = {0.0: found[name][sweep_name(0.0, 0.0)]} | {
                    beta: found[name][sweep_name(experiment.alpha, beta)]
                    for beta in sorted({*experiment.betas, experiment.beta})
                    if experiment.alpha in experiment.alphas or beta == experiment.beta
                }
        return curves


def sweep_name(alpha: float, beta: float) -> str:
    """Name of the exact match at these strengths."""
    return f"exact_match_alpha_{alpha:g}_beta_{beta:g}"


def _other_seed(config: Pretraining) -> Pretraining:
    data = dataclasses.replace(config.data, seed=config.data.seed + 1000)
    return dataclasses.replace(config, data=data, seed=config.seed + 1000)


def _decoder(fit: Fit, capacity: int) -> Decoder:
    return token_decoder(fit.model, fit.params, capacity)


def word_problem_batches(
    config: DataConfig, shortcut_share: float, rows: Sequence[int]
) -> GeneratedBatches:
    """Batches of word problems without end."""

    def make(numbers, seed):
        return word_problems.word_problem_rows(
            numbers,
            length=config.sequence_length,
            seed=seed[0],
            split=config.split,
            shortcut_share=shortcut_share,
        )

    return GeneratedBatches(config, make, rows)


def training_texts(config: Pretraining, shortcut_share: float) -> Iterator[np.ndarray]:
    """The ids of every document of every row of the training."""
    data = config.data
    batches = word_problem_batches(data, shortcut_share, range(data.batch_size))
    for batch in itertools.islice(batches, config.total_steps):
        rows = zip(batch["tokens"], batch["targets"], batch["segment_ids"], strict=True)
        for tokens, targets, segment_ids in rows:
            for segment in range(1, segment_ids.max() + 1):
                inside = segment_ids == segment
                yield np.append(tokens[inside], targets[inside][-1])


# ---------------------------------------------------------------------------------- solving


def stories(problems: Sequence[WordProblem]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T] of BOS and the stories, and lengths [B]."""
    tokens, lengths = pad_rows([[BOS_ID, *word_problems.encode(p.story())] for p in problems])
    return np.pad(tokens, ((0, 0), (0, PROMPT_LENGTH - tokens.shape[1]))), lengths


def negative_prompts(problems: Sequence[WordProblem]) -> tuple[np.ndarray, np.ndarray]:
    """The stories, each after a training problem that was solved by the shortcut."""
    rows = []
    for number, problem in enumerate(problems):
        example = word_problems.word_problem(seed=(NEGATIVE_SEED, number), split=Split.TRAIN)
        solved = word_problems.encode(f"{example.story()} {example.working(Manner.SHORTCUT)}")
        rows.append([BOS_ID, *solved, EOS_ID, *word_problems.encode(problem.story())])
    return pad_rows(rows)


def solve(
    pair: ContrastiveDecoder,
    problems: Sequence[WordProblem],
    sampling: SamplingConfig,
    key: jax.Array | None = None,
) -> list[str]:
    """What the pair writes after every story."""
    prompt = pair.amateur_prompt
    if prompt is not None:
        pair = pair.replace(amateur_prompt=tuple(part[: len(problems)] for part in prompt))
    new = generate(pair, *stories(problems), sampling, NEW_TOKENS, (EOS_ID,), key)
    rows = zip(np.asarray(new.tokens), np.asarray(new.lengths), strict=True)
    return [word_problems.decode(row[:length]) for row, length in rows]


def answers(texts: Sequence[str]) -> list[int | None]:
    """The answers of workings; None where there is none."""
    return [word_problems.read_answer(text) for text in texts]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Problems, what was written to them, and whether the answer is right (bool [B])."""

    problems: tuple[WordProblem, ...]
    texts: tuple[str, ...]
    right: np.ndarray

    @classmethod
    def of(cls, pair: ContrastiveDecoder, problems: Sequence[WordProblem]) -> "Outcome":
        """Greedy solutions."""
        texts = solve(pair, problems, SamplingConfig(temperature=0.0))
        truth = [problem.answer for problem in problems]
        right = np.array([a == b for a, b in zip(answers(texts), truth, strict=True)], np.float64)
        return cls(tuple(problems), tuple(texts), right)

    def numbers(self) -> dict[str, float]:
        """Shares: right answers, answers by the shortcut, results that the story holds."""
        given = answers(self.texts)
        shortcuts = [p.shortcut == a for p, a in zip(self.problems, given, strict=True)]
        copied = [
            copy_rate(p.numbers, results(text))
            for p, text in zip(self.problems, self.texts, strict=True)
        ]
        return {
            "exact_match": float(self.right.mean()),
            "shortcut_rate": float(np.mean(shortcuts)),
            "copy_rate": float(np.mean(copied)),
        }


def results(text: str) -> list[int]:
    """The numbers after the signs `=` of a working."""
    words = text.split()
    return [int(b) for a, b in itertools.pairwise(words) if a == "=" and b.isdigit()]


# ---------------------------------------------------------------------------------- ranking


def candidates(problem: WordProblem) -> tuple[str, ...]:
    """The true working; with the shortcut; without the last step; with a slip of one at the end."""
    right = [int(n) for n in np.cumsum((problem.start, *problem.changes))[1:]]
    slip = -1 if right[-1] > 0 and right[-1] - 1 != problem.shortcut else 1
    slipped = [*right[:-1], right[-1] + slip]
    start, changes = problem.start, problem.changes
    return (
        problem.working(),
        problem.working(Manner.SHORTCUT),
        word_problems.format_working(start, changes[:-1], right[:-1]),
        word_problems.format_working(start, changes, slipped),
    )


def ranking(pair: ContrastiveDecoder, problems: Sequence[WordProblem]) -> dict[str, float]:
    """Share of problems whose true working scores best per token of the four `candidates`, and
    better than the shortcut."""
    rows = [[*word_problems.encode(t), EOS_ID] for p in problems for t in candidates(p)]
    texts, sizes = pad_rows(rows)
    sizes = sizes.reshape(len(problems), -1)
    texts = texts.reshape(*sizes.shape, -1)
    scores = np.asarray(contrastive_scores(pair, *stories(problems), texts, sizes).scores)
    per_token = scores / sizes
    return {
        "ranking_accuracy": float(np.mean(rank(scores, sizes)[:, 0] == 0)),
        "ranking_above_shortcut": float(np.mean(per_token[:, 0] > per_token[:, 1])),
    }
