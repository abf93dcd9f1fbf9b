"""Run by test_multihost.py in each of two processes: port, process id, workdir."""

import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)
port, process, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)

from blt_jax.dist.mesh import MeshConfig, make_mesh  # noqa: E402
from blt_jax.train.pretraining import CheckpointingConfig, make_context  # noqa: E402
from tests.train.tiny_model import tiny_experiment  # noqa: E402

experiment = tiny_experiment(
    steps=4, accumulation=2, checkpointing=CheckpointingConfig(every=2, keep=3)
)
context = make_context(workdir, make_mesh(MeshConfig(fsdp=2)), jax.random.key(0))
print("bits_per_byte", experiment.fit(context).metrics["bits_per_byte"])
