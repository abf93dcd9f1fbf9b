"""Pre-training of a plain language model that ends with generated text.

The byte-level and BPE baselines of the suite are runs of this recipe.
"""

import dataclasses

import jax

from blt_jax.data.loader import open_documents
from blt_jax.data.tokenizers import Tokenizer, train_bpe
from blt_jax.decoding.decoder import token_decoder
from blt_jax.decoding.sampling import SamplingConfig
from blt_jax.models.llama3 import Llama3Config
from blt_jax.models.megalodon import MegalodonConfig
from blt_jax.recipes.samples import encode_prompts, generate_texts, samples_wanted
from blt_jax.train.pretraining import Context, Fit, Pretraining


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class LanguageModel(Pretraining):
    """`Pretraining`, then text generated from the prompts.

    bpe_vocab_size: trains a byte-level BPE of that size on the training split first; 0 takes the
    tokenizer of the data config. prompts, sample_tokens: what is generated at the end.
    """

    bpe_vocab_size: int = 0
    prompts: tuple[str, ...] = ("def ", "import ", "class ")
    sample_tokens: int = 200

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.model, Llama3Config | MegalodonConfig):
            raise ValueError(
                f"LanguageModel.model={self.model}: must be a Llama3Config or a MegalodonConfig"
            )
        for name in ("bpe_vocab_size", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"LanguageModel.{name}={getattr(self, name)}: must be >= 0")
        if self.bpe_vocab_size and self.bpe_vocab_size != self.model.vocab_size:
            raise ValueError(
                f"LanguageModel.bpe_vocab_size={self.bpe_vocab_size}: the model has "
                f"vocab_size={self.model.vocab_size}"
            )

    def run(self, context: Context) -> dict[str, float]:
        """`Pretraining.run`, and the speed of generation."""
        tokenizer = self._tokenizer(context)
        fit = self.fit(context, tokenizer=tokenizer)
        numbers = dict(fit.metrics) | self.after_training(context, fit)
        if samples_wanted(self.prompts, self.sample_tokens):
            _, lengths = encode_prompts(tokenizer, self.prompts)
            capacity = int(lengths.max()) + self.sample_tokens
            decoder = token_decoder(fit.model, fit.params, capacity)
            numbers |= generate_texts(
                context,
                decoder,
                tokenizer,
                self.prompts,
                SamplingConfig(temperature=0.8),
                self.sample_tokens,
            )
        return numbers

    def after_training(self, context: Context, fit: Fit) -> dict[str, float]:
        """Further numbers of the trained model; recipes that build on this one add theirs."""
        del context, fit
        return {}

    def _tokenizer(self, context: Context) -> Tokenizer:
        if not self.bpe_vocab_size:
            return self.data.tokenizer.build()
        documents = open_documents(self.data)
        texts = (documents[index].text for index in range(len(documents)))
        path = str(context.workdir / "tokenizer.json") if jax.process_index() == 0 else ""
        return train_bpe(texts, self.bpe_vocab_size, path)
