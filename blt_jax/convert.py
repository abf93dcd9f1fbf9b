"""Converts checkpoints between folders of Hugging Face, Meta or Megalodon's authors and ours.

python -m blt_jax.convert --from=hf --input=Llama-3.1-8B --output=models/llama31_8b
python -m blt_jax.convert --from=meta --input=Meta-Llama-3-8B --output=models/llama3_8b
python -m blt_jax.convert --to=hf --input=runs/blt --output=runs/blt_hf
python -m blt_jax.convert --to=megalodon --input=runs/megalodon --output=runs/megalodon_theirs

Hugging Face folders hold config.json and safetensors of a Llama or a BLT, Meta folders params.json
and safetensors, folders of Megalodon's authors config.json and safetensors (interop/megalodon.py);
ours are made by this program or by a run. A BLT brings its entropy model and patching rule along,
and files of the tokenizer are copied.
"""

import pathlib
import shutil
import sys

from absl import flags

SOURCES = ("hf", "meta", "megalodon")
TARGETS = ("hf", "megalodon")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
TYPES = ("float32", "bfloat16", "float16")


def from_hugging_face(
    source: pathlib.Path, target: pathlib.Path, *, dtype: str, window: int | None = None
) -> None:
    """A Hugging Face folder into ours, parameters of type `dtype`; window as in load_pretrained."""
    from blt_jax.interop import hugging_face, model_files

    options = {"dtype": _dtype(dtype), "window": window}
    model, params = hugging_face.load_pretrained(source, **options)
    parts = {}
    if hugging_face.has_entropy_model(source):
        part = hugging_face.ENTROPY_MODEL
        parts["entropy_model"] = hugging_face.load_pretrained(source, part=part, **options)
        parts["patcher"] = hugging_face.load_patcher(source)
    model_files.save_model(target, model, params, **parts)
    copy_tokenizer(source, target)


def from_meta(source: pathlib.Path, target: pathlib.Path, *, dtype: str) -> None:
    """Meta's folder into ours, parameters of type `dtype`."""
    from blt_jax.interop import meta_llama, model_files

    model_files.save_model(target, *meta_llama.load_meta(source, dtype=_dtype(dtype)))
    copy_tokenizer(source, target)


def from_megalodon(source: pathlib.Path, target: pathlib.Path, *, dtype: str) -> None:
    """A folder of Megalodon's authors into ours, parameters of type `dtype`."""
    from blt_jax.interop import megalodon, model_files

    model_files.save_model(target, *megalodon.load_megalodon(source, dtype=_dtype(dtype)))
    copy_tokenizer(source, target)


def to_megalodon(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    dtype: str,
    max_shard_bytes: int,
    averaged: bool = False,
) -> None:
    """Our folder into one of Megalodon's authors, projections of type `dtype`."""
    from blt_jax.interop import megalodon, model_files

    model, params = model_files.load_model(source, averaged=averaged)
    options = {"max_shard_bytes": max_shard_bytes, "dtype": _dtype(dtype)}
    megalodon.save_megalodon(model, params, target, **options)
    copy_tokenizer(source, target)


def to_hugging_face(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    dtype: str,
    max_shard_bytes: int,
    averaged: bool = False,
) -> None:
    """Our folder, converted or of a run, into a Hugging Face one with tensors of type `dtype`."""
    from blt_jax.interop import hugging_face, model_files

    model, params = model_files.load_model(source, averaged=averaged)
    parts = {}
    if (source / model_files.ENTROPY_MODEL).is_dir():
        part = model_files.ENTROPY_MODEL
        parts["entropy_model"] = model_files.load_model(source, part=part)
    if (source / model_files.PATCHER_FILE).exists():
        parts["patcher"] = model_files.load_patcher(source)
    hugging_face.save_pretrained(
        model, params, target, max_shard_bytes=max_shard_bytes, dtype=_dtype(dtype), **parts
    )
    copy_tokenizer(source, target)


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the tokenizer's files that are there."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def _dtype(name: str):
    import jax.numpy as jnp

    return jnp.dtype(name)


def parse(argv: list[str]) -> flags.FlagValues:
    """Parsed flags of a command line, with the program's name; flags.Error says what is wrong."""
    values = flags.FlagValues()
    flags.DEFINE_enum("from", None, SOURCES, "kind of the input folder", flag_values=values)
    flags.DEFINE_enum("to", None, TARGETS, "kind of the output folder", flag_values=values)
    flags.DEFINE_string("input", None, "folder to read", flag_values=values)
    flags.DEFINE_string("output", None, "folder to write", flag_values=values)
    flags.DEFINE_enum(
        "dtype", None, TYPES, "parameters; default bfloat16 to hf, else float32", flag_values=values
    )
    flags.DEFINE_integer(
        "max_shard_bytes", 5_000_000_000, "largest safetensors file", 1, flag_values=values
    )
    flags.DEFINE_integer(
        "window", None, "window of a BLT whose config has none, 0: none", 0, flag_values=values
    )
    flags.DEFINE_bool("averaged", False, "the averaged parameters of a run", flag_values=values)
    flags.DEFINE_bool("help", False, "shows this help", short_name="h", flag_values=values)
    rest = values(argv)[1:]
    if rest:
        raise flags.Error(f"unexpected argument {rest[0]!r}")
    if values.help:
        return values
    if (values["from"].value is None) == (values.to is None):
        raise flags.Error(f"give one of --from={'|'.join(SOURCES)} and --to={'|'.join(TARGETS)}")
    for name in ("input", "output"):
        if not values[name].value:
            raise flags.Error(f"--{name}=<folder> is missing")
    if values.window is not None and values["from"].value != "hf":
        raise flags.Error("--window: only with --from=hf")
    if values.averaged and values.to is None:
        raise flags.Error("--averaged: only with --to")
    return values


def convert(source: pathlib.Path, target: pathlib.Path, values: flags.FlagValues) -> None:
    """What the flags ask for."""
    if values.to is not None:
        write = to_hugging_face if values.to == "hf" else to_megalodon
        write(
            source,
            target,
            dtype=values.dtype or ("bfloat16" if values.to == "hf" else "float32"),
            max_shard_bytes=values.max_shard_bytes,
            averaged=values.averaged,
        )
        return
    dtype = values.dtype or "float32"
    if values["from"].value == "hf":
        from_hugging_face(source, target, dtype=dtype, window=values.window)
    elif values["from"].value == "meta":
        from_meta(source, target, dtype=dtype)
    else:
        from_megalodon(source, target, dtype=dtype)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 for an error of the files, 2 for a wrong line."""
    try:
        values = parse(list(sys.argv if argv is None else argv))
    except flags.Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if values.help:
        print(f"{__doc__}\n{values.get_help()}")
        return 0
    source, target = pathlib.Path(values.input), pathlib.Path(values.output)
    try:
        convert(source, target, values)
    except (ValueError, OSError, LookupError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
