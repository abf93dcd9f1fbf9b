"""What an optimised XLA program does, from its text: loops, collectives, bytes of memory."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|body|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_COLLECTIVE = re.compile(
    r"^(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)"
    r"(-start)?$"
)
# Instructions that move nothing themselves, or whose bytes are those of other instructions.
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"),
        *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
        *("copy-start", "copy-done", "async-start", "async-update", "async-done"),
        *("add-dependency", "all-gather-done", "all-reduce-done", "collective-permute-done"),
    )
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name; result: text of its type; opcode; rest: operands and attributes as text."""

    name: str
    result: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    @property
    def called(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", " ".join(_CALLED.findall(self.rest)))


@dataclasses.dataclass(frozen=True)
class Collective:
    """`count` runs per step of one collective over mesh `axes`, on buffers of `bytes` per device.

    bytes: of the whole (gathered) array; sent: what crosses a device's links in all runs, as a ring
    does it. between_slices: over the data centre's network, which the host's runtime does with what
    the device sends it; axes are empty then.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    sent: float
    between_slices: bool = False


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes per device and step between memory and core: of matrix products (kernels included), and
    of everything else."""

    products: float
    others: float


def array_bytes(text: str, memory_only: bool = False) -> list[int]:
    """Bytes of every array of a type; memory_only: 0 for those in another memory than HBM."""
    sizes = []
    for dtype, shape, layout in _ARRAY.findall(text):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
        elements = math.prod(int(n) for n in shape.split(",") if n)
        near = memory_only and re.search(r"S\(\d+\)", layout)
        sizes.append(0 if near else elements * bits // 8)
    return sizes


class Program:
    """A parsed program; `text` is what XLA dumps after optimisation."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        entry, current = None, {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations[match.group(2)] = {}
                entry = match.group(2) if match.group(1) else entry
            elif match := _INSTRUCTION.match(line):
                current[match.group(1)] = Instruction(*match.groups())
        if entry is None:
            raise ValueError("the text holds no HLO program (no ENTRY computation)")
        self.entry = entry

    def executed(self) -> Iterator[tuple[str, int, bool]]:
        """(computation, runs per step, whether it is the body of a fusion) from the entry on."""
        waiting = [(self.entry, 1, False)]
        while waiting:
            name, times, fused = waiting.pop()
            yield name, times, fused
            for instruction in self.computations[name].values():
                trips = self.trip_count(instruction) if instruction.opcode == "while" else 1
                trips = 1 if trips is None else trips
                inside = fused or instruction.opcode == "fusion"
                waiting += [(called, times * trips, inside) for called in instruction.called]

    def trip_count(self, loop: Instruction) -> int | None:
        """Runs of a while loop that counts from 0 to a constant; None where they depend on data."""
        condition = re.search(r"condition=%([\w.\-]+)", loop.rest).group(1)
        body = self.computations[condition].values()
        numbers = [
            int(match.group(1))
            for x in body
            if x.opcode == "constant" and (match := re.match(r"(\d+)\)", x.rest))
        ]
        return numbers[0] if len(numbers) == 1 else None

    def counts_all_loops(self) -> bool:
        """Whether every loop has a known length; the others are counted as if they ran once."""
        loops = (
            x
            for name, _, _ in self.executed()
            for x in self.computations[name].values()
            if x.opcode == "while"
        )
        return all(self.trip_count(x) is not None for x in loops)

    def collectives(self, mesh_shape: dict[str, int]) -> list[Collective]:
        """Collectives of a step, equal ones together, largest traffic first."""
        seen, found = set(), {}
        for name, times, _ in self.executed():
            for x in self.computations[name].values():
                match = _COLLECTIVE.match(x.opcode)
                channel = re.search(r"channel_id=(\d+)", x.rest)
                # Parts of one asynchronous collective share a channel.
                key = channel.group(1) if channel else (name, x.name)
                if match is None or key in seen:
                    continue
                seen.add(key)
                operands = sum(self._operand_bytes(name, x, memory_only=False))
                results = array_bytes(x.result)
                size = max(operands, max(results) if match.group(2) else sum(results))
                axes = group_axes(x.rest, mesh_shape)
                opcode = match.group(1)
                if name.startswith("all-reduce-scatter"):  # of which devices keep their parts
                    opcode = "reduce-scatter"
                kind = (opcode, axes, size)
                found[kind] = found.get(kind, 0) + times
        rows = [
            Collective(kind, axes, count, size, count * _sent(kind, size, axes, mesh_shape))
            for (kind, axes, size), count in found.items()
        ]
        return sorted(rows + self._between_slices(), key=lambda row: -row.sent)

    def _between_slices(self) -> list[Collective]:
        """What is sent to the runtime that connects slices (a host transfer per collective)."""
        found = {}
        for name, times, _ in self.executed():
            for x in self.computations[name].values():
                kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.rest)
                if x.opcode == "send" and kind:
                    key = (
                        kind[1].lower().replace("_", "-"),
                        self._operand_bytes(name, x, False)[0],
                    )
                    found[key] = found.get(key, 0) + times
        return [
            Collective(kind, (), count, size, float(count * size), between_slices=True)
            for (kind, size), count in found.items()
        ]

    def traffic(self) -> Traffic:
        """Memory traffic of all executed instructions, loops times their trip counts."""
        products = others = 0.0
        for name, times, fused in self.executed():
            if fused:
                continue
            for x in self.computations[name].values():
                if x.opcode in _FREE or _COLLECTIVE.match(x.opcode):
                    continue
                moved = times * self._moved(name, x)
                if self._is_product(x):
                    products += moved
                else:
                    others += moved
        return Traffic(products, others)

    def _is_product(self, x: Instruction) -> bool:
        if x.opcode in ("dot", "convolution") or "tpu_custom_call" in x.rest:
            return True
        inside = [y for name in x.called for y in self.computations[name].values()]
        return x.opcode == "fusion" and any(map(self._is_product, inside))

    def _operand_bytes(self, name: str, x: Instruction, memory_only: bool = True) -> list[int]:
        known = self.computations[name]
        types = [known[operand].result for operand in x.operands if operand in known]
        return [sum(array_bytes(text, memory_only)) for text in types]

    def _moved(self, name: str, x: Instruction) -> float:
        """Bytes read and written, only the parts where arrays are sliced or updated in place."""
        results = sum(array_bytes(x.result, memory_only=True))
        operands = self._operand_bytes(name, x)
        if x.opcode == "custom-call" and "tpu_custom_call" not in x.rest:
            return 0.0
        if x.opcode in ("dynamic-slice", "slice", "gather"):
            return 2.0 * results
        if x.opcode in ("dynamic-update-slice", "scatter"):
            return 2.0 * sum(operands[1:])
        if x.opcode != "fusion":
            return float(results + sum(operands))
        body = self.computations[x.called[0]]
        parameters = {y.name: y for y in body.values() if y.opcode == "parameter"}
        total = 0.0
        for parameter in parameters.values():
            index = int(parameter.rest.split(")")[0])
            full = operands[index] if index < len(operands) else 0
            total += min(full, self._read(body, parameter.name, full))
        return total + min(results, self._written(body, results))

    def _written(self, body: dict[str, Instruction], full: int) -> int:
        """Bytes that a fusion writes: its results, or what it updates of them in place."""
        written = [
            sum(array_bytes(body[y.operands[1]].result))
            for y in body.values()
            if y.opcode == "dynamic-update-slice"
        ]
        for y in body.values():
            if y.opcode == "fusion":
                size = sum(array_bytes(y.result))
                inside = self._written(self.computations[y.called[0]], size)
                written += [inside] if inside < size else []
        return sum(written) if written else full

    def _read(self, body: dict[str, Instruction], name: str, full: int) -> float:
        """Bytes of a fusion's parameter that are read: all, or those of its slices."""
        total = 0.0
        for y in body.values():
            if name not in y.operands:
                continue
            if y.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(array_bytes(y.result))
            elif y.opcode == "bitcast":
                total += self._read(body, y.name, full)
            elif y.opcode == "fusion":
                inner = self.computations[y.called[0]]
                index = y.operands.index(name)
                parameter = next(
                    z.name
                    for z in inner.values()
                    if z.opcode == "parameter" and z.rest.startswith(f"{index})")
                )
                total += self._read(inner, parameter, full)
            elif y.opcode == "dynamic-update-slice" and y.operands[0] == name:
                continue
            else:
                return float(full)
        return total


def group_axes(text: str, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes over which a collective's device groups extend, from its attributes.

    Raises ValueError for groups written in a way that is not known here.
    """
    sizes = tuple(mesh_shape.values())
    index = np.stack(np.unravel_index(_first_group(text, math.prod(sizes)), sizes))
    varying = (index != index[:, :1]).any(axis=1)
    return tuple(name for name, varies in zip(mesh_shape, varying, strict=True) if varies)


def _first_group(text: str, devices: int) -> np.ndarray:
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:,?\s*device_ids=([^{]*))? ?\{", text):
        if match.group(2):
            raise ValueError(f"device groups {match.group(0)}: order of devices not known")
        names = re.findall(r"'(\w+)'=(\d+)", match.group(1))
        used = re.findall(r"'(\w+)'", re.match(r"[^}]*", text[match.end() :]).group(0))
        grid = np.arange(math.prod(int(n) for _, n in names)).reshape([int(n) for _, n in names])
        return grid[tuple(slice(None) if name in used else 0 for name, _ in names)].ravel()
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        grid = np.arange(devices).reshape([int(n) for n in match.group(3).split(",")])
        if match.group(4):
            grid = grid.transpose([int(n) for n in match.group(4).split(",")])
        return grid.reshape(int(match.group(1)), int(match.group(2)))[0]
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text):
        return np.array([int(n) for n in match.group(1).split(",")])
    if re.search(r"replica_groups=\{\}", text):
        return np.arange(devices)
    raise ValueError(f"device groups of a collective: cannot read {text[:200]!r}")


def _sent(kind: str, size: int, axes: tuple[str, ...], mesh_shape: dict[str, int]) -> float:
    parts = math.prod(mesh_shape[axis] for axis in axes)
    if kind == "collective-permute" or parts == 1:
        return float(size)
    return size * (parts - 1) / parts * (2 if kind == "all-reduce" else 1)
