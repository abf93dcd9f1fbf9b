"""Rewrites the results table of the README from the kept results.json files.

python docs/results/make_table.py
"""

import json
import pathlib

HERE = pathlib.Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"

ROWS = (
    ("blt_tiny", "BLT `tiny`, held-out bits per byte", "bits_per_byte"),
    ("blt_proof_seeds", "BLT, strided patches of 4", "strided_4"),
    ("blt_proof_seeds", "BLT, entropy patches of 4", "entropy_4"),
    ("blt_proof_seeds", "BLT, entropy patches of 4, no hash n-grams", "entropy_4_no_ngrams"),
    ("blt_proof_seeds", "BLT, space patches", "space"),
    ("blt_proof_seeds", "BLT, entropy patches of that size", "entropy_as_space"),
    ("blt_baseline", "Byte-level Llama 3 of the FLOPs of BLT `tiny`", "byte_llama"),
    ("blt_baseline", "BPE Llama 3 of the FLOPs of BLT `tiny`", "bpe_llama"),
    ("llama3_tiny", "Byte-level Llama 3 `tiny`, held-out bits per byte", "bits_per_byte"),
    ("llama3_proof_seeds", "Llama 3, constant learning rate", "constant"),
    ("llama3_proof_seeds", "Llama 3, last fifth annealed", "annealed"),
    ("megalodon_tiny", "Megalodon `tiny`, held-out bits per byte", "bits_per_byte"),
    (
        "megalodon_proof_seeds",
        "Llama 3 trained on rows of 512, bytes 512 to 8,192",
        "llama/bits_per_byte_beyond",
    ),
    (
        "megalodon_proof_seeds",
        "Megalodon of that size, the same",
        "megalodon/bits_per_byte_beyond",
    ),
    ("megalodon_ablation_seeds", "Small Megalodon, held-out", "full"),
    ("megalodon_ablation_seeds", "The same without its moving average", "no_average"),
)


def table() -> str:
    """Markdown table with one line per kept number, over seeds its 95 % interval; runs that are not
    kept have none."""
    lines = ["| run | bits per byte | minutes | device, date |", "|---|---|---|---|"]
    for name, label, key in ROWS:
        file = HERE / f"{name}.json"
        if not file.exists():
            continue
        results = json.loads(file.read_text())
        numbers = results["numbers"]
        value = f"{numbers.get(key, numbers.get(f'{key}/bits_per_byte')):.3f}"
        interval = numbers.get(f"{key.split('/')[0]}/interval")
        value += f" ± {interval:.3f}" if interval is not None else ""
        minutes = f"{results['wall_time_seconds'] / 60:.0f}"
        where = f"{results['device_count']} × {results['device']}, {results['date'][:10]}"
        lines.append(f"| {label} | {value} | {minutes} | {where} |")
    return "\n".join(lines)


def updated(readme: str) -> str:
    """The README with the table between its two markers replaced."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
