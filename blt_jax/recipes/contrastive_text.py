"""Contrastive decoding of text: continuations of held-out pieces, and their true continuations.

Two byte-level models are trained on the same text. What is reported needs no judge: repeated
n-grams of words in greedy continuations, and where the true continuation ranks among others.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from blt_jax.data.loader import evaluation_config, open_documents
from blt_jax.data.tokenizers import Tokenizer
from blt_jax.decoding.contrastive_decoding import (
    ContrastiveDecoder,
    check_strengths,
    contrastive_scores,
)
from blt_jax.decoding.decoder import token_decoder
from blt_jax.decoding.sampling import SamplingConfig, generate
from blt_jax.decoding.scoring import rank
from blt_jax.recipes.contrastive_report import Mean, bootstrap_interval, text_figure
from blt_jax.train.pretraining import Context, Experiment, Pretraining, shared_context

NGRAM_SIZES = (2, 3, 4)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ContrastiveText(Experiment):
    """Expert and amateur on `pieces` of held-out documents, by strength beta under mask alpha.

    amateur_context: bytes of the prompt that the amateur reads, 0 all. prompt_bytes: of a piece;
    true_bytes: what follows it, to be ranked; new_bytes: what is generated. top_p: of the
    sampled continuations beside the greedy ones. shown: pieces in `texts/continuations.txt`.
    """

    expert: Pretraining
    amateur: Pretraining
    alpha: float = 0.1
    betas: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    amateur_context: int = 0
    pieces: int = 64
    prompt_bytes: int = 96
    true_bytes: int = 64
    new_bytes: int = 192
    top_p: float = 0.95
    shown: int = 3

    def __post_init__(self):
        for name in ("expert", "amateur"):
            tokenizer = getattr(self, name).data.tokenizer
            if tokenizer != self.expert.data.tokenizer:
                raise ValueError(
                    f"ContrastiveText.{name}.data.tokenizer={tokenizer}: must be the expert's"
                )
        for name in ("pieces", "prompt_bytes", "true_bytes", "new_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"ContrastiveText.{name}={getattr(self, name)}: must be >= 1")
        if not self.betas or 0.0 not in self.betas:
            raise ValueError(f"ContrastiveText.betas={self.betas}: must hold 0, the expert alone")
        for beta in self.betas:
            check_strengths(self.alpha, beta)
        SamplingConfig(top_p=self.top_p)  # checks it

    def run(self, context: Context) -> dict[str, float]:
        """`rep_N`, `diversity`, `ranking_accuracy`, `above_repetition` by beta (suffix
        `_beta_B`, `_sampled`, `_true`). Raises ValueError on several processes, and for too few
        held-out documents of the needed length."""
        if jax.process_count() > 1:
            raise ValueError(f"{jax.process_count()} processes: this recipe needs one")
        tokenizer = self.expert.data.tokenizer.build()
        pieces = self._pieces(tokenizer)
        pair = self._pair(context)
        prompts = np.array([piece[: self.prompt_bytes] for piece in pieces], np.int32)
        lengths = np.full(len(pieces), self.prompt_bytes, np.int32)

        def continued(pair, sampling) -> list[bytes]:
            new = generate(
                pair, prompts, lengths, sampling, self.new_bytes, (), jax.random.key(self.seed)
            )
            return [tokenizer.decode(row) for row in np.asarray(new.tokens)]

        plain = pair.replace(alpha=0.0, beta=0.0)
        greedy = SamplingConfig(temperature=0.0)
        texts = {
            f"beta_{beta:g}": continued(pair.replace(beta=beta) if beta else plain, greedy)
            for beta in self.betas
        }
        texts["sampled"] = continued(plain, SamplingConfig(top_p=self.top_p))
        texts["true"] = [tokenizer.decode(piece[self.prompt_bytes :]) for piece in pieces]
        numbers: dict[str, float] = {}
        for name, found in texts.items():
            numbers |= {f"{key}_{name}": value for key, value in repetition(found).items()}
        curves: dict[str, dict[float, Mean]] = {}
        for beta in self.betas:
            for key, right in self._ranking(pair.replace(beta=beta), pieces).items():
                low, high = bootstrap_interval(right)
                numbers[f"{key}_beta_{beta:g}"] = float(right.mean())
                curves.setdefault(key, {})[beta] = float(right.mean()), (high - low) / 2
        context.writer.figure("text", text_figure(numbers, list(texts), curves))
        prompts_text = [tokenizer.decode(row) for row in prompts]
        context.writer.text("continuations", _shown(prompts_text, texts, self.shown))
        return numbers

    def _pair(self, context: Context) -> ContrastiveDecoder:
        capacity = self.prompt_bytes + max(self.new_bytes, self.true_bytes)
        decoders = []
        for name in ("expert", "amateur"):
            config = getattr(self, name)
            fit = config.fit(shared_context(context, f"text_{name}", config))
            decoders.append(token_decoder(fit.model, fit.params, capacity))
        return ContrastiveDecoder.create(
            *decoders, alpha=self.alpha, amateur_context=self.amateur_context
        )

    def _pieces(self, tokenizer: Tokenizer) -> list[np.ndarray]:
        """Ids of prompt and continuation, one piece per held-out document while there are such."""
        documents = open_documents(evaluation_config(self.expert.data))
        size = self.prompt_bytes + max(self.new_bytes, self.true_bytes)
        generator = np.random.default_rng(0)
        ids = (tokenizer.encode(documents[i].text) for i in range(len(documents)))
        long = [np.asarray(tokens) for tokens in ids if len(tokens) >= 4 * size]
        if len(long) < 2:
            raise ValueError(f"{len(long)} held-out documents of {4 * size} tokens: 2 are needed")
        starts = [
            (number % len(long), int(generator.integers(len(long[number % len(long)]) - size)))
            for number in range(self.pieces)
        ]
        return [long[number][start : start + size] for number, start in starts]

    def _ranking(
        self, pair: ContrastiveDecoder, pieces: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Whether the true continuation beats all others, and the repeated prompt, by piece.

        The others: those of the next two pieces, and the last bytes of the prompt once more.
        """
        P, M, count = self.prompt_bytes, self.true_bytes, len(pieces)
        true = np.array([piece[P : P + M] for piece in pieces], np.int32)
        prompts = np.array([piece[:P] for piece in pieces], np.int32)
        again = np.resize(prompts[:, -min(M, P) :].T, (M, count)).T
        others = [np.roll(true, -shift, axis=0) for shift in (1, 2)]
        texts = np.stack([true, *others, again], axis=1)
        lengths = np.full(count, P, np.int32)
        sizes = np.full(texts.shape[:2], M, np.int32)
        scores = np.asarray(contrastive_scores(pair, prompts, lengths, texts, sizes).scores)
        return {
            "ranking_accuracy": (rank(scores)[:, 0] == 0).astype(np.float64),
            "above_repetition": (scores[:, 0] > scores[:, -1]).astype(np.float64),
        }


def repetition(texts: Iterable[bytes]) -> dict[str, float]:
    """`rep_N`: share of the N-grams of words and signs within a text that came before in it;
    `diversity`: the product of 1 - rep_N over N = 2, 3, 4 (Li et al., section 4)."""
    repeated, total = dict.fromkeys(NGRAM_SIZES, 0), dict.fromkeys(NGRAM_SIZES, 0)
    for text in texts:
        words = re.findall(rb"\w+|[^\w\s]", text)
        for size in NGRAM_SIZES:
            ngrams = list(zip(*(words[i:] for i in range(size)), strict=False))
            total[size] += len(ngrams)
            repeated[size] += len(ngrams) - len(set(ngrams))
    numbers = {f"rep_{size}": repeated[size] / max(total[size], 1) for size in NGRAM_SIZES}
    return numbers | {"diversity": float(np.prod([1.0 - rep for rep in numbers.values()]))}


def _shown(prompts: Sequence[bytes], texts: dict[str, list[bytes]], count: int) -> str:
    parts = []
    for number, prompt in enumerate(prompts[:count]):
        parts.append(f"=== prompt\n{prompt.decode(errors='replace')}\n")
        for name, found in texts.items():
            parts.append(f"--- {name}\n{found[number].decode(errors='replace')}\n")
    return "\n".join(parts)
