"""KL divergence from the dequantised F32 model, with batchcore's kernels and with ggml's.

The reference is the same file with every tensor dequantised to F32, run with ggml's kernels and an
F32 KV cache, so that neither side is favoured. The text is that of the bundled prompts. Means are
over its tokens, in nats; ± is the standard error. "difference" is ours minus ggml's, token by
token; "rms" the root mean square error of log-probabilities; "top-1" the share of tokens with the
same most likely one. A standard error says how much the text decides. Which of two kernels of the
same precision is ahead also changes by a percent or two with the weights, so that synthetic models
are made from several seeds; the range of "ours/ggml" is over them.

    python benchmarks/kernel_quality.py --json kernel_quality.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from batchcore import Model, prompts
from batchcore.testing import synthetic_gguf
from batchcore.testing.blocks import FORMATS
from batchcore.testing.quality import Divergence, compare_distributions, write_f32
from common import parser as make_parser
from common import report, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

SHAPE: dict[str, Any] = {"n_layer": 4, "n_embd": 256, "n_ff": 768, "vocab": 2048}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def compare(path: Path, folder: Path, options: Any) -> dict[str, Divergence]:
    """One file with both kinds of kernels beside its dequantised copy."""
    copy = write_f32(path, folder / "f32.gguf")
    try:
        reference = Model(copy, kernels="ggml")
        models = {"ours": Model(path), "ggml": Model(path, kernels="ggml")}
        tokens = reference.tokenize("\n\n".join(prompts.load()))[: options.tokens]
        return compare_distributions(
            reference, models, tokens, chunk=options.chunk, n_threads=options.threads
        )
    finally:
        copy.unlink()


def summarise(name: str, files: Sequence[dict[str, Divergence]]) -> dict[str, Any]:
    """A row: the tokens of all files together, and the ratio of each."""
    kl = {key: [value for file in files for value in file[key].kl] for key in ("ours", "ggml")}
    kl["difference"] = np.subtract(kl["ours"], kl["ggml"]).tolist()
    columns: dict[str, Any] = {"model": name, "tokens": len(kl["ours"])}
    figures = {}
    for label, values in kl.items():
        mean, error = mean_and_error(values)
        columns[f"KL, {label}" if label != "difference" else label] = f"{mean:.3g} ± {error:.1g}"
        figures[label] = {"mean": mean, "standard_error": error}
    ratios = [float(np.mean(file["ours"].kl) / np.mean(file["ggml"].kl)) for file in files]
    columns["ours/ggml"] = f"{np.mean(ratios):.3g}"
    if len(ratios) > 1:
        columns["ours/ggml"] += f" ({min(ratios):.3g}..{max(ratios):.3g})"
    for label in ("ours", "ggml"):
        errors = [value for file in files for value in file[label].squared_error]
        columns[f"rms, {label}"] = float(np.sqrt(np.mean(errors)))
    for label in ("ours", "ggml"):
        same = [value for file in files for value in file[label].same_top]
        columns[f"top-1, {label}"] = f"{np.mean(same):.2%}"
    return {**columns, "kl": figures, "ratios": ratios}


def main() -> None:
    """Compare presets and synthetic models of every format."""
    options = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    options.add_argument("--tokens", type=int, default=2048, help="of the text")
    options.add_argument("--chunk", type=int, default=256, help="tokens computed together")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument(
        "--formats", nargs="*", default=[*FORMATS, "q4_k_m"], help="of synthetic models"
    )
    options.add_argument("--seeds", type=int, default=4, help="synthetic models of each format")
    given = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in given.model or given.default_models:
            path = Path(Model(model).path)
            rows.append(summarise(path.stem, [compare(path, folder, given)]))
        path = folder / "synthetic.gguf"
        for quant in given.formats:
            files = []
            for seed in range(given.seeds):
                synthetic_gguf(path, quant=quant, seed=seed, **SHAPE)
                files.append(compare(path, folder, given))
            rows.append(summarise(f"synthetic {quant}", files))
    kernels = Model.available_kernels()
    report(
        f"{kernels} (ours) and ggml beside F32: KL divergence in nats per token",
        [{k: v for k, v in row.items() if k not in {"kl", "ratios"}} for row in rows],
    )
    write_json(given, rows)


if __name__ == "__main__":
    main()
