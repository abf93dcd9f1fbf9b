import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from blt_jax.interop import hugging_face_llama, meta_llama
from blt_jax.interop.weights import foreign_reader, foreign_shapes
from blt_jax.layers.rope import RopeLayout
from blt_jax.models import llama3
from tests.interop import small

PARAMS = dict(
    dim=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=37,
    multiple_of=8,
    ffn_dim_multiplier=1.3,
    norm_eps=1e-5,
    rope_theta=500000.0,
    use_scaled_rope=True,
)


def write(path, changes=(), drop=(), attributes=PARAMS):
    """A folder as Meta's, and the model it holds."""
    config = meta_llama.read_params_json(dict(PARAMS))
    model = config.build()
    params = small.random_params(model)
    table = meta_llama.meta_table(config)
    read = foreign_reader(table, params)
    tensors = {name: np.ascontiguousarray(read(name)) for name in foreign_shapes(table, model)}
    tensors = {k: v for k, v in tensors.items() if k not in drop} | dict(changes)
    save_file(tensors, path / "consolidated.00.safetensors")
    (path / "params.json").write_text(json.dumps(attributes))
    return model, params, tensors


def test_loads(tmp_path):
    model, params, tensors = write(tmp_path, {"rope.freqs": np.ones(6, np.float32)})
    loaded, again = meta_llama.load_meta(tmp_path)
    assert loaded == model
    small.assert_equal(params, again)
    rope = loaded.config.transformer.rope
    assert rope.layout is RopeLayout.INTERLEAVED and rope.scaling_factor == 8
    # Rows (2i, 2i + 1) of a head rotate together here as there: nothing is reordered.
    expected = tensors["layers.1.attention.wq.weight"].reshape(4, 12, 48).transpose(2, 0, 1)
    query = again["transformer"]["layers"]["attention"]["query"]
    np.testing.assert_array_equal(query[1], expected)
    np.testing.assert_array_equal(
        again["transformer"]["layers"]["mlp"]["up"][0], tensors["layers.0.feed_forward.w3.weight"].T
    )


def test_interleaved_path_equals_half_split_path(tmp_path):
    write(tmp_path)
    model, params = meta_llama.load_meta(tmp_path)
    half = hugging_face_llama.with_rope_layout(model, params, RopeLayout.HALF_SPLIT)
    tokens = jnp.arange(34, dtype=jnp.int32).reshape(2, 17)
    expected = model.apply({"params": params}, tokens).logits
    np.testing.assert_allclose(
        half[0].apply({"params": half[1]}, tokens).logits, expected, atol=2e-5
    )
    # The wrong layout for the weights is not an error but another function.
    wrong = half[0].apply({"params": params}, tokens).logits
    assert float(jnp.abs(wrong - expected).max()) > 1e-2
    # The released permutation of transformers gives the half-split weights from Meta's.
    w = np.random.default_rng(0).normal(size=(48, 48)).astype(np.float32)
    permuted = w.reshape(4, 6, 2, 48).transpose(0, 2, 1, 3).reshape(48, 48)
    weight = hugging_face_llama.llama_table(model.config)[2]
    assert weight.name.endswith("q_proj.weight")
    ours = w.reshape(4, 12, 48).transpose(2, 0, 1)
    np.testing.assert_array_equal(weight.to_theirs(ours), permuted)
    np.testing.assert_array_equal(weight.to_ours(permuted), ours)


def test_widths_of_the_released_models():
    released = [
        (dict(dim=4096, n_heads=32, n_layers=32, multiple_of=1024), llama3.llama31_8b()),
        (dict(dim=8192, n_heads=64, n_layers=80, multiple_of=4096), llama3.llama31_70b()),
        (
            dict(dim=16384, n_heads=128, n_layers=126, multiple_of=4096, ffn_dim_multiplier=1.2),
            llama3.llama31_405b(),
        ),
    ]
    for sizes, config in released:
        attributes = PARAMS | dict(n_kv_heads=8, vocab_size=128_256) | sizes
        assert meta_llama.read_params_json(attributes) == config
    unscaled = {k: v for k, v in attributes.items() if k != "use_scaled_rope"}
    assert meta_llama.read_params_json(unscaled) == llama3.llama3_405b()


def test_tied_when_there_is_no_output(tmp_path):
    write(tmp_path, drop=["output.weight"])
    model, params = meta_llama.load_meta(tmp_path)
    assert model.config.tied_embeddings and "head" not in params


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        meta_llama.load_meta(tmp_path / "nowhere")
    (tmp_path / "consolidated.00.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth.*refused.*weights_only=True"):
        meta_llama.load_meta(tmp_path)
    write(tmp_path, {"extra": np.ones(2, np.float32)}, ["layers.1.ffn_norm.weight"])
    with pytest.raises(
        ValueError, match=r"missing.*layers\.1\.ffn_norm\.weight.*unexpected.*'extra'"
    ):
        meta_llama.load_meta(tmp_path)
    write(tmp_path, attributes=PARAMS | {"moe_args": {}})
    with pytest.raises(ValueError, match=r"params\.json: unknown attributes.*moe_args"):
        meta_llama.load_meta(tmp_path)
    write(tmp_path, attributes=PARAMS | {"dim": 96})
    with pytest.raises(ValueError, match="the config says"):
        meta_llama.load_meta(tmp_path)
