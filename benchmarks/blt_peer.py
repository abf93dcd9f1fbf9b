"""The peer of the BLT benchmarks: `transformers.BltForCausalLM` on PyTorch, CPU, sdpa attention.

One configuration for both sides: encoder 1x128, decoder 3x128, global 4x256, four heads each, two
vectors per patch, window 512, three hash tables of 4001 rows, vocabulary 260 (6,424,064
parameters without the patcher).
"""

import numpy as np

PEER_PARAMETERS = 6_424_064
NUM_PATCH_VECTORS, WINDOW, HASH_SIZES, HASH_VOCAB = 2, 512, (3, 4, 5), 4001
LOCAL_WIDTH, LATENT_WIDTH, HEADS = 128, 256, 4
LOCAL_MLP, LATENT_MLP = 512, 768
ENCODER_LAYERS, LATENT_LAYERS, DECODER_LAYERS = 1, 4, 3


def strided_lengths(num_bytes: int, stride: int = 4) -> np.ndarray:
    """Patch lengths over num_bytes + 1 tokens: one token, then patches of `stride`."""
    full, rest = divmod(num_bytes, stride)
    return np.array([1] + [stride] * full + ([rest] if rest else []), np.int64)


def variable_lengths(num_bytes: int, seed: int = 0) -> np.ndarray:
    """As many patches as `strided_lengths`, of 1 to 12 tokens each, over num_bytes + 1 tokens."""
    count = len(strided_lengths(num_bytes)) - 1
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.25, count), 12)
    while (difference := num_bytes - lengths.sum()) != 0:
        index = rng.integers(count)
        step = int(np.sign(difference))
        if 1 <= lengths[index] + step <= 12:
            lengths[index] += step
    return np.concatenate([[1], lengths]).astype(np.int64)


def make_peer(max_bytes: int):
    """The peer with random weights, and its number of parameters without the patcher."""
    import torch
    from transformers import BltConfig, BltForCausalLM

    torch.manual_seed(0)
    local = dict(
        hidden_size=LOCAL_WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=LOCAL_MLP,
        cross_attn_k=NUM_PATCH_VECTORS,
        hidden_size_global=LATENT_WIDTH,
        max_position_embeddings=max_bytes,
    )
    config = BltConfig(
        patch_in_forward=False,
        local_attention_window_len=WINDOW,
        cross_attn_k=NUM_PATCH_VECTORS,
        encoder_hash_byte_group_size=list(HASH_SIZES),
        encoder_hash_byte_group_vocab=HASH_VOCAB,
        encoder_hash_byte_group_nb_functions=1,
        max_position_embeddings=max_bytes,
        patcher_config=dict(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        ),
        encoder_config=dict(local, num_hidden_layers=ENCODER_LAYERS, cross_attn_all_layers=False),
        decoder_config=dict(local, num_hidden_layers=DECODER_LAYERS, cross_attn_all_layers=True),
        global_config=dict(
            hidden_size=LATENT_WIDTH,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            num_hidden_layers=LATENT_LAYERS,
            intermediate_size=LATENT_MLP,
            max_position_embeddings=max_bytes,
        ),
    )
    model = BltForCausalLM._from_config(config, attn_implementation="sdpa")
    count = sum(p.numel() for name, p in model.named_parameters() if "patcher" not in name)
    if count != PEER_PARAMETERS:
        raise RuntimeError(f"the peer has {count} parameters, expected {PEER_PARAMETERS}")
    return model


def peer_train_step(tokens: np.ndarray, lengths: np.ndarray):
    """A function that makes one AdamW step (clip 1.0) on tokens [B, N + 1] and returns the loss."""
    import torch

    torch.set_num_threads(2)
    model = make_peer(tokens.shape[1]).train()
    params = [p for name, p in model.named_parameters() if "patcher" not in name]
    optimizer = torch.optim.AdamW(params, lr=4e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ids = torch.from_numpy(tokens.astype(np.int64))
    patch_lengths = torch.from_numpy(np.tile(lengths, (len(tokens), 1)))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=ids[:, :-1], patch_lengths=patch_lengths, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step
