"""The three steps of a Byte Latent Transformer run: entropy model, patch threshold, BLT.

A small byte-level language model is trained first; a threshold on its entropies is then searched
so that patches have the wanted mean size; the BLT is trained on rows cut by that patcher, and
evaluated on held-out text with the same one (arXiv 2412.09871, sections 2.3 and 4).
"""

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blt_jax.data.loader import DataConfig, evaluation_config, open_documents
from blt_jax.data.tokenizers import ByteTokenizer, encode_document
from blt_jax.decoding.sampling import SamplingConfig
from blt_jax.dist.multihost import local_copy
from blt_jax.interop import model_files
from blt_jax.models import blt
from blt_jax.models.blt_decode import BLTDecoder
from blt_jax.models.blt_ngrams import build_ngram_tables
from blt_jax.models.blt_patching import (
    NgramEntropy,
    PatcherConfig,
    PatcherKind,
    ngram_entropy,
    reset_segments,
)
from blt_jax.recipes.patch_figure import patch_figure
from blt_jax.recipes.samples import encode_prompts, generate_texts, samples_wanted
from blt_jax.train.pretraining import Context, Experiment, Fit, Pretraining, shared_context


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class BLTPretraining(Experiment):
    """Entropy model, threshold, BLT.

    entropy_model: how the entropy model is trained; unused by patchers that need no entropies.
    ngram_order: n > 0 takes the entropies from byte n-gram counts instead of a trained model.
    match_space: calibrate to the mean patch size that space patching has on the same text,
    instead of the patcher's target_patch_size. calibration_bytes: training text for it.
    precomputed_bytes: text of each split whose entropies are computed before training, in large
    batches; those of further documents are computed when they are read.
    prompts, sample_bytes: what is generated at the end; figure_bytes: text in the patch figure.
    """

    blt: Pretraining
    patcher: PatcherConfig
    entropy_model: Pretraining | None = None
    ngram_order: int = 0
    match_space: bool = False
    calibration_bytes: int = 400_000
    precomputed_bytes: int = 64_000_000
    prompts: tuple[str, ...] = ("def ", "import ", "class ")
    sample_bytes: int = 200
    figure_bytes: int = 320

    def __post_init__(self):
        if not isinstance(self.blt.model, blt.BLTConfig):
            raise ValueError(f"BLTPretraining.blt.model={self.blt.model}: must be a BLTConfig")
        for phase in self.blt.all_phases:
            data, model = self.blt.phase_data(phase), phase.model or self.blt.model
            _check_rows(data, model, "max_patches", "row_pieces")
            _check_rows(self.held_out, model, "row_pieces")
        needs_model = self.patcher.needs_entropies and not self.ngram_order
        if needs_model and self.entropy_model is None:
            raise ValueError(
                f"BLTPretraining.entropy_model=None: patcher {self.patcher.kind.name} needs "
                "entropies, from an entropy_model or with ngram_order > 0"
            )
        if self.patcher.kind is PatcherKind.TOPK:
            raise ValueError("BLTPretraining.patcher: TOPK is not causal, for analysis only")
        for name in (
            "ngram_order",
            "calibration_bytes",
            "precomputed_bytes",
            "sample_bytes",
            "figure_bytes",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"BLTPretraining.{name}={getattr(self, name)}: must be >= 0")

    def run(self, context: Context) -> dict[str, float]:
        """Trains both models; numbers of the BLT, and of the entropy model under its own prefix."""
        sample = take_bytes(tokenized_documents(self.blt.data), self.calibration_bytes)
        entropy_fit, entropies = None, None
        if self.patcher.needs_entropies:
            entropy_fit, entropies = self._entropies(context)
            for data in (self.held_out, self.blt.data):
                entropies.fill(take_bytes(tokenized_documents(data), self.precomputed_bytes))
        patcher = self._calibrated(sample, entropies)
        sizes = _patch_sizes(patcher, sample, entropies)
        if jax.process_index() == 0:
            model_files.save_patcher(context.workdir, patcher)

        def starts(index: int, tokens: np.ndarray) -> np.ndarray:
            del index  # documents are recognised by their content: splits number them alike
            return patcher.document_starts(tokens, entropies and entropies(tokens))

        fit = self.blt.fit(context, patcher=starts, build=self._builder(context))
        numbers = {**fit.metrics, **sizes}
        numbers["held_out_patch_size"] = numbers.pop("patched_bytes") / numbers.pop("patches")
        self._figure(context, patcher, entropies)
        decodable = entropies is None or entropy_fit is not None
        if decodable and samples_wanted(self.prompts, self.sample_bytes):
            numbers |= self._generate(context, fit, entropy_fit, patcher)
        if entropy_fit is not None:
            numbers |= {f"entropy_model_{k}": v for k, v in entropy_fit.metrics.items()}
        return numbers

    @property
    def held_out(self) -> DataConfig:
        """The text that the BLT is evaluated on."""
        return self.blt.evaluation.data or evaluation_config(self.blt.data)

    def _entropies(self, context: Context) -> tuple[Fit | None, "DocumentEntropies"]:
        if self.ngram_order:
            documents = tokenized_documents(self.blt.data)
            return None, DocumentEntropies(CrossFittedNgrams.build(documents, self.ngram_order))
        fit = self.entropy_model.fit(shared_context(context, "entropy_model", self.entropy_model))
        # Input pipelines of several processes ask at their own pace: each has its own copy.
        params = local_copy(fit.params)
        compute = functools.partial(
            model_entropies, fit.model, params, reset_at_newline=self.patcher.reset_at_newline
        )
        return fit, DocumentEntropies(compute)

    def _builder(self, context: Context) -> Callable[[blt.BLTConfig], blt.BLT] | None:
        """With exact n-grams, the tables are counted on the training text first."""
        ngrams = self.blt.model.ngrams
        if ngrams.kind is not blt.NgramKind.EXACT:
            return None
        documents = take_bytes(tokenized_documents(self.blt.data), self.precomputed_bytes)
        tables = build_ngram_tables(documents, ngrams.sizes, ngrams.vocab_size)
        if jax.process_index() == 0:
            model_files.save_ngram_tables(context.workdir, tables)
        return lambda config: config.build(self.blt.sharding, ngram_tables=tables)

    def _calibrated(self, sample: list[np.ndarray], entropies) -> PatcherConfig:
        patcher = self.patcher
        if self.match_space:
            space = PatcherConfig(kind=PatcherKind.SPACE)
            size = _patch_sizes(space, sample, None)["patch_size"]
            patcher = dataclasses.replace(patcher, target_patch_size=size)
        if patcher.needs_entropies:
            patcher = patcher.calibrate([entropies(tokens) for tokens in sample])
        return patcher

    def _figure(self, context: Context, patcher: PatcherConfig, entropies) -> None:
        documents = list(tokenized_documents(self.held_out))
        wanted = 2 * self.figure_bytes + 2
        tokens = next((d for d in documents if len(d) >= wanted), max(documents, key=len))
        low = max(1, (len(tokens) - self.figure_bytes) // 2)
        shown = slice(low, min(low + self.figure_bytes, len(tokens) - 1))
        values = entropies and entropies(tokens)
        starts = patcher.document_starts(tokens, values)
        threshold = patcher.threshold or patcher.relative_threshold
        context.writer.figure(
            "patches",
            patch_figure(
                ByteTokenizer().decode(tokens[shown]),
                starts[shown],
                None if values is None else np.roll(values, 1)[shown],
                threshold,
            ),
        )

    def _generate(self, context, fit: Fit, entropy_fit: Fit | None, patcher) -> dict[str, float]:
        tokenizer = ByteTokenizer()
        _, lengths = encode_prompts(tokenizer, self.prompts)
        decoder = BLTDecoder.create(
            fit.model,
            fit.params,
            patcher,
            int(lengths.max()) + self.sample_bytes,
            entropy_fit and entropy_fit.model,
            entropy_fit and entropy_fit.params,
        )
        sampling = SamplingConfig(temperature=0.8)
        return generate_texts(
            context, decoder, tokenizer, self.prompts, sampling, self.sample_bytes
        )


def _check_rows(data: DataConfig, model: blt.BLTConfig, *names: str) -> None:
    for name in names:
        if getattr(data, name) != getattr(model, name):
            raise ValueError(
                f"BLTPretraining: rows of the {data.split.name} split have "
                f"{name}={getattr(data, name)}, the model {getattr(model, name)}; they must be "
                "equal"
            )
    if data.row_pieces > 1 and data.piece_halo < model.piece_halo:
        raise ValueError(
            f"BLTPretraining: rows of the {data.split.name} split have "
            f"piece_halo={data.piece_halo}; the model's windows and n-grams need "
            f"{model.piece_halo}"
        )


def tokenized_documents(config: DataConfig) -> Iterator[np.ndarray]:
    """Byte ids of every document of a data config, BOS and EOS included, in order."""
    documents, tokenizer = open_documents(config), ByteTokenizer()
    for index in range(len(documents)):
        yield encode_document(tokenizer, documents[index].text)


def take_bytes(documents: Iterable[np.ndarray], num_bytes: int) -> list[np.ndarray]:
    """Whole documents until `num_bytes` bytes are reached (at least one document)."""
    taken, total = [], 0
    for tokens in documents:
        taken.append(tokens)
        total += len(tokens)
        if total >= num_bytes:
            break
    return taken


def _patch_sizes(patcher: PatcherConfig, sample, entropies) -> dict[str, float]:
    patches = sum(
        int(patcher.document_starts(tokens, entropies and entropies(tokens)).sum())
        for tokens in sample
    )
    sizes = {"patch_size": sum(len(tokens) for tokens in sample) / patches}
    if patcher.needs_entropies:
        name = "relative_threshold" if patcher.kind is PatcherKind.MONOTONIC else "threshold"
        sizes[name] = getattr(patcher, name)
    return sizes


class DocumentEntropies:
    """Entropies of tokenised documents [n] -> float32 [n], computed once and kept by content.

    `compute` takes a list of documents. At most `capacity` documents are kept, the oldest go.
    """

    def __init__(self, compute: Callable[[Sequence[np.ndarray]], list[np.ndarray]], capacity=10**5):
        self._compute, self._capacity = compute, capacity
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()  # the input pipeline asks from its own threads

    def fill(self, documents: Iterable[np.ndarray]) -> None:
        """Computes many documents together, up to the capacity."""
        wanted = {_digest(tokens): tokens for tokens in documents}
        keys = [key for key in wanted if key not in self._kept][: self._capacity]
        values = self._compute([wanted[key] for key in keys]) if keys else []
        with self._lock:
            self._kept.update(zip(keys, values, strict=True))

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        key = _digest(tokens)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._compute([tokens])[0]
                if len(self._kept) > self._capacity:
                    self._kept.popitem(last=False)
            return self._kept[key]


def _digest(tokens: np.ndarray) -> bytes:
    import hashlib

    return hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=16).digest()


class CrossFittedNgrams:
    """Entropies from n-gram counts of the half of the training text a document is not in.

    Counts that saw a document make it look too predictable, which shifts its patch sizes.
    """

    def __init__(self, halves: tuple[NgramEntropy, NgramEntropy]):
        self._halves = halves

    @classmethod
    def build(cls, documents: Iterable[np.ndarray], order: int) -> "CrossFittedNgrams":
        parts: tuple[list, list] = ([], [])
        for tokens in documents:
            parts[_digest(tokens)[0] % 2].append(tokens)
        if not all(parts):
            raise ValueError("n-gram entropies need at least two different training documents")
        return cls((ngram_entropy(parts[1], order), ngram_entropy(parts[0], order)))

    def __call__(self, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._halves[_digest(tokens)[0] % 2](tokens) for tokens in documents]


def model_entropies(
    model: blt.EntropyModel,
    params: Any,
    documents: Sequence[np.ndarray],
    *,
    reset_at_newline: bool = False,
    chunk: int = 1024,
    batch_size: int = 8,
) -> list[np.ndarray]:
    """H[t] in nats after each token of whole documents, float32 [n] each.

    Documents are cut into pieces of `chunk` tokens that are preceded by all the tokens the
    windowed layers can reach, so the cut changes nothing.
    """
    stack = model.config.transformer
    longest = max((len(tokens) for tokens in documents), default=0)
    context = min(stack.num_layers * (stack.window - 1) if stack.window else longest, longest)
    chunk = min(chunk, -(-longest // 256) * 256)
    pieces = [
        (number, start)
        for number, tokens in enumerate(documents)
        for start in range(0, len(tokens), chunk)
    ]
    values = [np.empty(len(tokens), np.float32) for tokens in documents]
    for first in range(0, len(pieces), batch_size):
        batch = pieces[first : first + batch_size]
        rows = np.zeros((batch_size, context + chunk), np.int32)
        segments = np.zeros_like(rows)
        for row, (number, start) in enumerate(batch):
            low = max(0, start - context)
            piece = documents[number][low : start + chunk]
            rows[row, : len(piece)] = piece
            segments[row, : len(piece)] = 1
        found = np.asarray(_entropies_of_rows(model, params, rows, segments, reset_at_newline))
        for row, (number, start) in enumerate(batch):
            low = max(0, start - context)
            stop = min(start + chunk, len(documents[number]))
            values[number][start:stop] = found[row, start - low : stop - low]
    return values


@functools.partial(jax.jit, static_argnums=(0, 4))
def _entropies_of_rows(model, params, tokens, segment_ids, reset_at_newline):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    if reset_at_newline:
        segment_ids, positions = reset_segments(tokens, segment_ids)
    output = model.apply({"params": params}, tokens, segment_ids, positions)
    return blt.entropies(output.logits)
