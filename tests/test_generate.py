"""The program that samples from a folder on disk."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax import generate
from blt_jax.decoding import streaming_llm
from blt_jax.decoding.generator import format_statistics, statistics
from blt_jax.dist.sharding import init_params
from blt_jax.interop import model_files
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models import blt, llama3, megalodon
from blt_jax.models.blt_decode import BLTDecoder
from blt_jax.models.blt_ngrams import build_ngram_tables
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind


def stack(window=0):
    return TransformerConfig(num_layers=1, d_model=16, num_heads=2, mlp_dim=32, window=window)


def made(config):
    model = config.build()
    return model, init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def blt_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "blt"
    config = blt.BLTConfig(
        local_encoder=stack(8),
        latent=stack(),
        local_decoder=stack(8),
        ngrams=blt.NgramConfig(sizes=(3,), vocab_size=53),
    )
    entropy_model = made(blt.EntropyModelConfig(transformer=stack(8)))
    patcher = PatcherConfig(threshold=5.0, max_patch_length=4)
    model_files.save_model(path, *made(config), entropy_model=entropy_model, patcher=patcher)
    return path


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    model_files.save_model(path, *made(llama3.byte_level(num_layers=1, d_model=16, num_heads=2)))
    return path


def run(*arguments):
    return generate.main(["generate", *arguments])


def test_blt_with_its_entropy_model(blt_folder, capsys):
    flags = (f"--model={blt_folder}", "--prompt=def ", "--max_new_bytes=24", "--num_samples=2")
    assert run(*flags, "--top_k=20", "--seed=3") == 0
    out, err = capsys.readouterr()
    assert out.count("def ") == 2
    assert "patches" in err and "global steps per byte" in err
    assert run(*flags, "--top_k=20", "--seed=3") == 0
    assert capsys.readouterr().out == out


def test_blt_with_exact_ngram_tables(tmp_path, capsys):
    config = blt.BLTConfig(
        local_encoder=stack(8),
        latent=stack(),
        local_decoder=stack(8),
        ngrams=blt.NgramConfig(kind=blt.NgramKind.EXACT, sizes=(2, 3), vocab_size=24),
    )
    documents = [np.frombuffer(b"def f(x):\n    return f(x)\n" * 4, np.uint8).astype(np.int32) + 4]
    model = config.build(ngram_tables=build_ngram_tables(documents, (2, 3), 24))
    params = init_params(model, jax.random.key(0))
    patcher = PatcherConfig(kind=PatcherKind.SPACE)
    model_files.save_model(tmp_path / "model", model, params, patcher=patcher)
    assert run(f"--model={tmp_path / 'model'}", "--prompt=def ", "--max_new_bytes=8") == 0
    assert capsys.readouterr().out.startswith("def ")

    loaded, params = model_files.load_model(tmp_path / "model")
    tokens = jnp.concatenate([jnp.array([1]), documents[0][:19]])[None].astype(jnp.int32)
    starts = patcher.starts(tokens)
    full = jax.jit(loaded.apply)({"params": params}, tokens, starts).logits
    decoder = BLTDecoder.create(loaded, params, patcher, 32).prepare()
    logits, cache = jax.jit(BLTDecoder.prefill)(decoder, tokens[:, :3], jnp.array([3]))
    step = jax.jit(BLTDecoder.step)
    for index in range(3, 20):
        np.testing.assert_allclose(logits[0], full[0, index - 1], atol=1e-4)
        logits, cache = step(decoder, tokens[:, index], cache)


def test_prompts_are_read_until_an_empty_line(llama_folder, capsys, monkeypatch):
    lines = iter(["import", "class", "", "never"])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    assert run(f"--workdir={llama_folder}", "--max_new_bytes=8", "--temperature=0") == 0
    out, err = capsys.readouterr()
    assert out.startswith("import") and "\nclass" in out and "never" not in out
    assert err.count("compiled") == 1, "both prompts have one padded length"


def check_conversation(decoder, tokenizer, lines, out):
    """After every line 5 bytes, the most probable ones of the decoder that has read all before
    token by token; returns its cache."""
    decoder = decoder.prepare()
    cache, logits, step = decoder.new_cache(1), None, jax.jit(type(decoder).step)
    for number, line in enumerate(lines):
        for token in tokenizer.encode(line, bos=number == 0):
            logits, cache = step(decoder, jnp.asarray([token]), cache)
        answer = []
        for _ in range(5):
            answer.append(int(logits[0].argmax()))
            logits, cache = step(decoder, jnp.asarray(answer[-1:]), cache)
        assert f"{line}{tokenizer.decode(answer).decode(errors='replace')}\n" in out
    return cache


@pytest.fixture
def converse(capsys, monkeypatch):
    """(lines, flags) -> what a conversation of these lines prints, and its messages."""

    def run_lines(lines, *flags):
        answers = iter([*lines, ""])
        monkeypatch.setattr(builtins, "input", lambda _: next(answers))
        assert run("--max_new_bytes=5", "--temperature=0", *flags) == 0
        return capsys.readouterr()

    return run_lines


@pytest.mark.parametrize("sinks", [2, 0])
def test_prompts_are_one_conversation_at_constant_memory(sinks, llama_folder, converse):
    lines = ["import", "x" * 70, "class A"]
    out, err = converse(lines, f"--workdir={llama_folder}", "--window=8", f"--sinks={sinks}")
    assert err.count("compiled") == 3, "the first prompt, and two lengths of later ones"

    loaded = generate.load(llama_folder)
    config = streaming_llm.sinks(2, 8) if sinks else streaming_llm.window(8)
    cache = check_conversation(loaded.decoder(0, config), loaded.tokenizer, lines, out)
    assert cache.layers[0].slots == sinks + 8


@pytest.fixture(scope="module")
def megalodon_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "megalodon"
    model, params = made(megalodon.small(vocab_size=260, num_layers=1, d_model=16, chunk_size=4))
    # Norms that matter, so that other statistics give other text.
    params["layers"]["norm_weight"] += 3.0
    model_files.save_model(path, model, params)
    return path


@pytest.mark.parametrize("truncate_chunks", [0, 4])
def test_a_megalodon_holds_a_conversation(truncate_chunks, megalodon_folder, converse):
    lines = ["import", "x" * 33, "class A"]
    flags = ("--conversation", f"--truncate_chunks={truncate_chunks}")
    out, _ = converse(lines, f"--model={megalodon_folder}", *flags)

    loaded = generate.load(megalodon_folder)
    decoder = loaded.decoder(2**31 - 1, truncate_chunks=truncate_chunks)
    check_conversation(decoder, loaded.tokenizer, lines, out)


def test_what_a_model_cannot_do(megalodon_folder, llama_folder, capsys):
    flags = (f"--model={llama_folder}", "--prompt=a")
    assert run(f"--model={megalodon_folder}", "--prompt=a", "--window=8") == 1
    assert "constant size already" in capsys.readouterr().err
    assert run(*flags, "--conversation") == 1
    assert "--conversation: a Llama3 needs --window" in capsys.readouterr().err
    assert run(*flags, "--truncate_chunks=8") == 1
    assert "truncate_chunks=8: the model is a Llama3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--workdir"),
        (("--workdir=a", "--model=b"), "one of them"),
        (("--model=a", "--temperature=-1"), "temperature=-1.0"),
        (("--model=a", "--top_p=2"), "top_p=2.0"),
        (("--model=a", "--max_new_bytes=0"), "max_new_bytes"),
        (("--model=a", "extra"), "extra"),
        (("--model=a", "--sinks=2"), "--sinks=2: needs --window"),
        (("--model=a", "--window=-1"), "window"),
        (("--model=a", "--window=8", "--truncate_chunks=8"), "not with --window"),
        (("--model=a", "--truncate_chunks=3"), "--truncate_chunks=3: must be 0 or >= 4"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_missing_folders_and_files(tmp_path, capsys):
    assert run(f"--model={tmp_path / 'none'}") == 1
    assert "no such folder" in capsys.readouterr().err
    assert run(f"--workdir={tmp_path}") == 1
    assert "neither model.json" in capsys.readouterr().err


def test_an_entropy_model_alone_generates_nothing(blt_folder, capsys):
    assert run(f"--model={blt_folder / 'entropy_model'}", "--prompt=a") == 1
    assert "cannot generate" in capsys.readouterr().err


def test_statistics():
    counters = {"bytes": np.array([9, 11]), "patches": np.array([3, 4]), "latent_runs": [5, 5]}
    stats = statistics(20, 0.5, counters)
    assert stats == {
        "bytes": 20,
        "bytes_per_second": 40.0,
        "patches": 7,
        "global_steps_per_byte": 0.5,
    }
    assert (
        format_statistics(stats)
        == "20 bytes, 40 bytes per second, 7 patches, 0.5 global steps per byte"
    )
