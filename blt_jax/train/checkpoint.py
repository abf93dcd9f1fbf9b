"""Checkpoints of a run: parameters, average, optimizer, data order; restored exactly or refused."""

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from blt_jax.dist.multihost import gather
from blt_jax.train.optimizer import path_name
from blt_jax.train.state import TrainState


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class CheckpointingConfig:
    """every: steps between checkpoints, 0 for the last step only. keep: how many are kept.

    directory: where, "" for `checkpoints` in the workdir; hosts of a pod need a shared one.
    """

    every: int = 0
    keep: int = 2
    directory: str = ""

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"CheckpointingConfig.every={self.every}: must be >= 0")
        if self.keep < 1:
            raise ValueError(f"CheckpointingConfig.keep={self.keep}: must be >= 1")


def encode_data_state(state: Any) -> Any:
    """The state of a data iterator as JSON values; bytes and numpy values are marked."""
    if isinstance(state, bytes):
        return {"__bytes__": base64.b64encode(state).decode()}
    if isinstance(state, np.ndarray):
        return {"__array__": state.tolist(), "dtype": str(state.dtype)}
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, dict):
        return {str(key): encode_data_state(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return {"__tuple__": [encode_data_state(value) for value in state]}
    if isinstance(state, list):
        return [encode_data_state(value) for value in state]
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"data iterator state holds a {type(state).__name__}: it cannot be saved")


def decode_data_state(value: Any) -> Any:
    """Inverse of `encode_data_state`."""
    if isinstance(value, dict):
        if "__bytes__" in value:
            return base64.b64decode(value["__bytes__"])
        if "__array__" in value:
            return np.asarray(value["__array__"], dtype=value["dtype"])
        if "__tuple__" in value:
            return tuple(decode_data_state(item) for item in value["__tuple__"])
        return {key: decode_data_state(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode_data_state(item) for item in value]
    return value


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def unite_states(states: list[Any]) -> Any:
    """One state from those of all processes: equal, or dictionaries of other or equal parts.

    Raises ValueError where the processes disagree.
    """
    first = states[0]
    if all(state == first for state in states[1:]):
        return first
    if not all(isinstance(state, dict) for state in states):
        raise ValueError(
            f"the data iterators of the processes disagree: {states}; every process must go "
            "through the same batches"
        )
    names = dict.fromkeys(name for state in states for name in state)
    return {name: unite_states([s[name] for s in states if name in s]) for name in names}


def _leaves(tree: Any) -> dict[str, list]:
    return {
        path_name(path): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _items(state: TrainState) -> dict[str, Any]:
    items = {
        "params": state.params,
        "optimizer": {"step": state.step, "opt_state": state.opt_state, "key": state.key},
    }
    if state.average is not None:
        items["average"] = {"params": state.average.params, "count": state.average.count}
    return items


def _check_leaves(found: dict[str, list], wanted: dict[str, list], where: str) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in wanted or name not in found:
            state = "has" if name in found else "lacks"
            raise ValueError(f"{where} {state} the array {name!r}, unlike this configuration")
        if found[name] != wanted[name]:
            (old_shape, old_type), (shape, dtype) = found[name], wanted[name]
            raise ValueError(
                f"{where}: array {name!r} is {old_type}{old_shape}, "
                f"but this configuration needs {dtype}{shape}"
            )


class Checkpoints:
    """The checkpoints of one run, written asynchronously; a directory per step."""

    def __init__(self, directory: str | pathlib.Path, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.directory = str(directory)
        if "://" not in self.directory:
            self.directory = str(pathlib.Path(directory).absolute())
        self._report_unfinished()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
        )

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in increasing order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, data_state: Any, extra: dict[str, Any]) -> None:
        """Starts to save; arrays are copied before this returns, files are written later.

        data_state: of this process's data iterator; those of all processes are united, so that
        any number of processes can continue. extra: JSON values.
        """
        ocp, items = self._ocp, _items(state)
        encoded = json.dumps(encode_data_state(data_state))
        meta = {
            "leaves": {name: _leaves(tree) for name, tree in items.items()},
            "data": unite_states([json.loads(text) for text in gather(encoded)]),
            "extra": extra,
        }
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["meta"] = ocp.args.JsonSave(meta)
        with self._as_checkpoint_error():
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def wait(self) -> None:
        """Blocks until all saves have reached the disk; CheckpointError if one did not."""
        with self._as_checkpoint_error():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _as_checkpoint_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # tensorstore's messages are long; the number of the system's error says why.
            found = re.search(r"code='(\d+)'", str(error))
            reason = os.strerror(int(found[1])) if found else str(error) or type(error).__name__
            raise CheckpointError(
                f"a checkpoint could not be written to {self.directory}: {reason}"
            ) from error

    def _report_unfinished(self) -> None:
        from etils import epath

        folder = epath.Path(self.directory)
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        for name in sorted(name for name in names if ".orbax-checkpoint-tmp" in name):
            _say(f"checkpoint {name.split('.')[0]} in {self.directory} was never finished: removed")

    def reached_preemption(self, step: int) -> bool:
        """True when the cluster announced that the machine will be taken away."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for the saves and releases the threads; CheckpointError if one was not written."""
        with self._as_checkpoint_error():
            self._manager.close()

    def _reader(self) -> Any:
        """Reads without waiting for other processes: one of them may find its files damaged."""
        ocp, own = self._ocp, jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=options)
        )
        return ocp.Checkpointer(handler, multiprocessing_options=options)

    def _read(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        from etils import epath

        args, folder = self._ocp.args, epath.Path(self.directory) / str(step)
        with contextlib.closing(self._reader()) as reader:
            meta = reader.restore(folder, args.Composite(meta=args.JsonRestore()))["meta"]
            for name, tree in items.items():
                where = f"checkpoint {step} in {self.directory}"
                if name not in meta["leaves"]:
                    raise LookupError(f"{where} has no {name!r}, only {sorted(meta['leaves'])}")
                _check_leaves(meta["leaves"][name], _leaves(tree), where)
            wanted = {name: args.StandardRestore(tree) for name, tree in items.items()}
            restored = reader.restore(folder, args.Composite(**wanted))
        return {name: restored[name] for name in items}, meta

    def restore(self, abstract: TrainState) -> tuple[TrainState, Any, dict[str, Any]] | None:
        """(state, data state, extra) of the newest readable checkpoint, or None if there is none.

        abstract: shapes with shardings of this run's mesh. A damaged checkpoint is moved to
        `<directory>.damaged`, with a message, and the one before is taken. Arrays of another
        name, shape or type raise ValueError.
        """
        for step in reversed(self.steps()):
            problem = ""
            try:
                items, meta = self._read(step, _items(abstract))
            except Exception as error:
                if _is_mismatch(error):
                    raise
                reason = str(error).strip().splitlines()
                problem = f"{type(error).__name__}: {reason[0] if reason else ''}"
            # Damage may be in the files of one process: all must go back together.
            problem = next(filter(None, gather(problem)), "")
            if problem:
                self._set_aside(step, problem)
                continue
            average = abstract.average
            if average is not None:
                average = average.replace(**items["average"])
            state = TrainState(params=items["params"], average=average, **items["optimizer"])
            return state, decode_data_state(meta["data"]), meta["extra"]
        return None

    def restore_params(self, abstract: Any, *, averaged: bool = False, step: int = 0) -> Any:
        """Parameters (or their running average) after `step`, 0 for the newest checkpoint's."""
        steps = self.steps()
        if not steps or (step and step not in steps):
            raise FileNotFoundError(
                f"no checkpoint{f' of step {step}' if step else ''} in {self.directory}, "
                f"which has steps {steps}"
            )
        step = step or steps[-1]
        if not averaged:
            return self._read(step, {"params": abstract})[0]["params"]
        count = jax.ShapeDtypeStruct((), np.int32)
        average = self._read(step, {"average": {"params": abstract, "count": count}})[0]
        return average["average"]["params"]

    def _set_aside(self, step: int, problem: str) -> None:
        _say(
            f"checkpoint {step} in {self.directory} is damaged ({problem}): "
            "falling back to the one before"
        )
        from etils import epath

        if jax.process_index() == 0:
            source = epath.Path(self.directory) / str(step)
            target = epath.Path(f"{self.directory}.damaged") / str(step)
            if target.exists():
                target.rmtree()
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"set aside checkpoint {step}")
        self._manager.reload()


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _is_mismatch(error: Exception) -> bool:
    return isinstance(error, ValueError) and "this configuration" in str(error)


def load_params(
    workdir: str | pathlib.Path, abstract: Any, *, averaged: bool = False, step: int = 0
) -> Any:
    """Parameters in `workdir/checkpoints` (see `abstract_params`), after `step`, 0 the newest.

    Raises FileNotFoundError if there is none, ValueError naming the array that does not fit.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    if not directory.exists():
        raise FileNotFoundError(f"{directory} does not exist")
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.restore_params(abstract, averaged=averaged, step=step)
    finally:
        checkpoints.close()
