"""What next-token models share: the loss, in chunks where the logits are large."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blt_jax.layers.embed import head_logits
from blt_jax.layers.losses import chunked_cross_entropy_sums, cross_entropy_sums
from blt_jax.layers.model import LossSums, Model

LOGITS_PER_DEVICE = 2**26


class NextTokenModel(Model):
    """A model over tokens whose `__call__` has a `compute_logits` argument and whose config has
    `vocab_size`, `tied_embeddings`, `z_loss` and `logits_chunk` (tokens per row whose logits exist
    at once in the loss; 0 takes all unless that is more than 2^26 logits per device)."""

    def inputs(self, batch: dict[str, jax.Array]) -> tuple:
        """Positional arguments of `__call__` from a batch."""
        raise NotImplementedError(f"{type(self).__name__} has no inputs()")

    def loss(self, params, batch: dict[str, jax.Array], key: jax.Array | None = None) -> LossSums:
        """Next-token cross-entropy; needs targets, target_mask, target_bytes and what `inputs`
        reads. key: of the dropout of a model that has one."""
        inputs = self.inputs(batch)
        options = {} if key is None or not self.has_dropout() else {"key": key}
        goal = (batch["targets"], batch["target_mask"], batch["target_bytes"])
        chunk = self.logits_chunk(batch["targets"].shape)
        if chunk == batch["targets"].shape[1]:
            output = self.apply({"params": params}, *inputs, **options)
            return cross_entropy_sums(output.logits, *goal, self.config.z_loss)
        output = self.apply({"params": params}, *inputs, compute_logits=False, **options)

        def logits(x):
            return head_logits(x, self.output_kernel(params), self.sharding)

        return chunked_cross_entropy_sums(logits, output.hidden, *goal, self.config.z_loss, chunk)

    def has_dropout(self) -> bool:
        """Whether `__call__` takes a `key` in training."""
        return False

    def logits_chunk(self, shape: tuple[int, int]) -> int:
        """Tokens per row whose logits exist at once in the loss of a [B, T] batch."""
        B, T = shape
        if self.config.logits_chunk:
            return min(self.config.logits_chunk, T)
        mesh = jax.sharding.get_abstract_mesh()
        budget = LOGITS_PER_DEVICE * (1 if mesh.empty else mesh.size)
        return max(1, min(T, budget // (B * self.config.vocab_size)))

    def output_kernel(self, params) -> Float[Array, "D V"]:
        """The output projection: the head's, or the embedding table's transpose when tied."""
        if self.config.tied_embeddings:
            return params["embed"]["table"].T
        return params["head"]["kernel"]

    def token_logits(self, params, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits of hidden states, on one device: for decoding."""
        kernel = self.output_kernel(params).astype(x.dtype)
        return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
