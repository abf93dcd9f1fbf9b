"""Generates text: python -m blt_jax.generate --workdir=runs/blt --prompt="def "

The model is that of a run (--workdir) or of a converted or Hugging Face folder (--model). Without
--prompt, prompts are read from the terminal until an empty line or Ctrl-D. With --window they are
one conversation without end, at constant memory: each one comes after all that was said before, of
which the model keeps the --sinks first and the --window last tokens. A Megalodon keeps a state of
constant size by itself and holds a conversation with --conversation.
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

from absl import flags

from blt_jax.dist.huge_pages import use_huge_pages


@dataclasses.dataclass
class LoadedModel:
    """A model from disk with what generation needs; the BLT's own parts are None otherwise."""

    model: Any
    params: Any
    tokenizer: Any
    patcher: Any = None
    entropy_model: Any = None
    entropy_params: Any = None

    @property
    def endless(self) -> bool:
        """Whether rows may be as long as counters reach, without a StreamingConfig."""
        from blt_jax.models.megalodon import Megalodon

        return isinstance(self.model, Megalodon)

    def decoder(self, capacity: int, streaming: Any = None, truncate_chunks: int = 0):
        """The model's Decoder for rows of at most `capacity` tokens, or with a StreamingConfig for
        rows without end; truncate_chunks: of a Megalodon's TruncatedDecoder, 0 for none. ValueError
        or TypeError for a model that cannot do that."""
        from blt_jax.decoding.decoder import token_decoder
        from blt_jax.decoding.streaming_blt import StreamingBLTDecoder
        from blt_jax.decoding.streaming_decoder import streaming_decoder
        from blt_jax.models.blt_decode import BLTDecoder
        from blt_jax.models.megalodon_truncated import TruncatedDecoder

        if truncate_chunks:
            if not self.endless:
                raise TypeError(
                    f"truncate_chunks={truncate_chunks}: the model is a "
                    f"{type(self.model).__name__}, only a Megalodon has statistics to replace"
                )
            return TruncatedDecoder.create(self.model, self.params, capacity, truncate_chunks)
        if self.patcher is None:
            if streaming is not None:
                return streaming_decoder(self.model, self.params, streaming)
            return token_decoder(self.model, self.params, capacity)
        decoder = BLTDecoder.create(
            self.model,
            self.params,
            self.patcher,
            capacity,
            self.entropy_model,
            self.entropy_params,
        )
        if streaming is not None:
            return StreamingBLTDecoder.create(decoder, streaming)
        return decoder


def load(path: pathlib.Path, averaged: bool = False) -> LoadedModel:
    """Reads the folder of a run, of `blt_jax.convert`, or of Hugging Face.

    Raises FileNotFoundError or ValueError saying what is missing or wrong.
    """
    from blt_jax.interop import hugging_face, model_files
    from blt_jax.models.blt import BLT
    from blt_jax.models.llama3 import Llama3
    from blt_jax.models.megalodon import Megalodon

    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if (path / "model.json").exists():
        model, params = model_files.load_model(path, averaged=averaged)
        has_entropy = (path / model_files.ENTROPY_MODEL / "model.json").exists()
        files: Any = model_files
    elif (path / "config.json").exists():
        model, params = hugging_face.load_pretrained(path)
        has_entropy, files = hugging_face.has_entropy_model(path), hugging_face
    else:
        raise FileNotFoundError(f"{path} holds neither model.json (ours) nor config.json")
    if isinstance(model, Llama3 | Megalodon):
        return LoadedModel(model, params, load_tokenizer(path, model.config.vocab_size))
    if not isinstance(model, BLT):
        raise ValueError(f"{path} holds a {type(model).__name__}: it cannot generate text")
    loaded = LoadedModel(model, params, load_tokenizer(path, 260), files.load_patcher(path))
    if has_entropy:
        part = files.load_pretrained if files is hugging_face else files.load_model
        loaded.entropy_model, loaded.entropy_params = part(path, part="entropy_model")
    return loaded


def load_tokenizer(path: pathlib.Path, vocab_size: int):
    """The tokenizer of a model folder: its file, or bytes where there is none.

    Raises ValueError if it has more ids than the model's vocabulary.
    """
    from blt_jax.data.tokenizers import TokenizerConfig, TokenizerKind, check_vocabulary

    config = TokenizerConfig()
    if vocab_size != 260:
        kinds = {
            "tokenizer.json": TokenizerKind.HUGGING_FACE,
            "tokenizer.model": TokenizerKind.TIKTOKEN_LLAMA3,
        }
        found = [name for name in kinds if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} has none of {list(kinds)} for {vocab_size} ids")
        config = TokenizerConfig(kind=kinds[found[0]], path=str(path / found[0]))
    tokenizer = config.build()
    check_vocabulary(tokenizer, vocab_size, path)
    return tokenizer


def parse(argv: list[str]) -> flags.FlagValues:
    """Parsed flags of a command line, with the program's name; flags.Error says what is wrong."""
    values = flags.FlagValues()
    string, number = flags.DEFINE_string, flags.DEFINE_float
    string("workdir", None, "folder of a run", flag_values=values)
    string("model", None, "converted or Hugging Face folder", flag_values=values)
    string("prompt", None, "text to continue; none: read prompts", flag_values=values)
    number("temperature", 0.8, "divides the logits, 0 is greedy", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "most probable tokens kept, 0 all", flag_values=values)
    number("top_p", 1.0, "probability that is kept", flag_values=values)
    number("min_p", 0.0, "least share of the highest probability", flag_values=values)
    number("repetition_penalty", 1.0, "of ids already in the text, 1 none", flag_values=values)
    new_help = "bytes at most per sample (tokens, for a model that has a tokenizer)"
    flags.DEFINE_integer("max_new_bytes", 256, new_help, 1, flag_values=values)
    window_help = (
        "last tokens that a conversation keeps (patches, of a BLT); 0: all, of a Megalodon"
    )
    flags.DEFINE_integer("window", 0, window_help, 0, flag_values=values)
    sinks_help = "first tokens (patches) that a conversation keeps beside the last ones"
    flags.DEFINE_integer("sinks", 4, sinks_help, 0, flag_values=values)
    conversation_help = "each prompt comes after all before; all but a Megalodon need --window too"
    flags.DEFINE_bool("conversation", False, conversation_help, flag_values=values)
    chunks_help = "a Megalodon's norms know recent chunks alone after so many (released: 8); 0: all"
    flags.DEFINE_integer("truncate_chunks", 0, chunks_help, 0, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the random draws", flag_values=values)
    flags.DEFINE_integer("num_samples", 1, "continuations per prompt", 1, flag_values=values)
    flags.DEFINE_bool("averaged", False, "averaged parameters of a run", flag_values=values)
    flags.DEFINE_bool("help", False, "shows this help", short_name="h", flag_values=values)
    rest = values(argv)[1:]
    if rest:
        raise flags.Error(f"unexpected argument {rest[0]!r}")
    if not values.help and (values.workdir is None) == (values.model is None):
        raise flags.Error("give --workdir=<run> or --model=<folder>, one of them")
    if values["sinks"].present and not values.window:
        raise flags.Error(f"--sinks={values.sinks}: needs --window")
    if values.truncate_chunks and values.window:
        raise flags.Error(f"--truncate_chunks={values.truncate_chunks}: not with --window")
    return values


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 for an error of the files, 2 for a wrong line."""
    try:
        values = parse(list(sys.argv if argv is None else argv))
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        from blt_jax.decoding.generator import Generator, format_statistics
        from blt_jax.decoding.sampling import SamplingConfig
        from blt_jax.decoding.streaming_llm import sinks, window
        from blt_jax.models.megalodon_truncated import PERIOD

        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        sampling = SamplingConfig(**{name: values[name].value for name in names})
        if 0 < values.truncate_chunks < 2 * PERIOD:
            raise flags.Error(
                f"--truncate_chunks={values.truncate_chunks}: must be 0 or >= {2 * PERIOD}"
            )
        streaming = None
        if values.window:
            recent = values.window
            streaming = sinks(values.sinks, recent) if values.sinks else window(recent)
    except (ValueError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import jax

    try:
        loaded = load(pathlib.Path(values.workdir or values.model), values.averaged)
        conversation = values.conversation or streaming is not None
        make_decoder = _make_decoder(loaded, streaming, values.truncate_chunks, conversation)
        settings = (sampling, values.max_new_bytes, values.num_samples, conversation)
        generator = Generator(make_decoder, loaded.tokenizer, *settings)
        prompts = [values.prompt] if values.prompt is not None else _read_prompts()
        for number, prompt in enumerate(prompts):
            texts, stats = generator(
                prompt, jax.random.fold_in(jax.random.key(values.seed), number)
            )
            for text in texts:
                print(f"{prompt}{text.decode(errors='replace')}\n", flush=True)
            print(f"({format_statistics(stats)})", file=sys.stderr, flush=True)
    except (ValueError, TypeError, OSError, LookupError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _make_decoder(loaded: LoadedModel, streaming: Any, truncate_chunks: int, conversation: bool):
    """(capacity) -> Decoder, of a conversation one whose rows never run full."""
    options = dict(streaming=streaming, truncate_chunks=truncate_chunks)
    if not conversation or streaming is not None:
        return functools.partial(loaded.decoder, **options)
    if not loaded.endless:
        name = type(loaded.model).__name__
        raise ValueError(f"--conversation: a {name} needs --window as well")
    decoder = loaded.decoder(2**31 - 1, **options)
    return lambda capacity: decoder


def _read_prompts():
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return
        if not prompt:
            return
        yield prompt


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main())
