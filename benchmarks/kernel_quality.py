"""KL divergence from the dequantised F32 model, with batchcore's kernels and with ggml's.

The reference is the same file with every tensor dequantised to F32, run with ggml's kernels and an
F32 KV cache, so that neither side is favoured. The text is that of the bundled prompts. Means are
over its tokens, in nats; ± is the standard error. "difference" is ours minus ggml's, token by
token; "rms" the root mean square error of log-probabilities; "top-1" the share of tokens with the
same most likely one.

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
from batchcore.testing.quality import compare_distributions, write_f32
from common import parser as make_parser
from common import report, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

SHAPE: dict[str, Any] = {"n_layer": 4, "n_embd": 256, "n_ff": 768, "vocab": 2048}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def measure(name: str, path: Path, folder: Path, options: Any) -> dict[str, Any]:
    """A row: one file with both kinds of kernels beside its dequantised copy."""
    copy = write_f32(path, folder / "f32.gguf")
    try:
        reference = Model(copy, kernels="ggml")
        models = {"ours": Model(path), "ggml": Model(path, kernels="ggml")}
        tokens = reference.tokenize("\n\n".join(prompts.load()))[: options.tokens]
        found = compare_distributions(
            reference, models, tokens, chunk=options.chunk, n_threads=options.threads
        )
    finally:
        copy.unlink()
    ours, ggml = found["ours"], found["ggml"]
    columns: dict[str, Any] = {"model": name, "tokens": len(ours.kl)}
    figures = {}
    difference = np.subtract(ours.kl, ggml.kl).tolist()
    for label, values in (("ours", ours.kl), ("ggml", ggml.kl), ("difference", difference)):
        mean, error = mean_and_error(values)
        columns[f"KL, {label}" if label != "difference" else label] = f"{mean:.3g} ± {error:.1g}"
        figures[label] = {"mean": mean, "standard_error": error}
    columns["ours/ggml"] = figures["ours"]["mean"] / max(figures["ggml"]["mean"], 1e-300)
    for label, of in (("ours", ours), ("ggml", ggml)):
        columns[f"rms, {label}"] = float(np.sqrt(np.mean(of.squared_error)))
    for label, of in (("ours", ours), ("ggml", ggml)):
        columns[f"top-1, {label}"] = f"{np.mean(of.same_top):.2%}"
    return {"columns": columns, "kl": figures}


def main() -> None:
    """Compare presets and synthetic models of every format."""
    options = make_parser(__doc__, ["smollm2-135m", "gemma3-270m"])
    options.add_argument("--tokens", type=int, default=2048, help="of the text")
    options.add_argument("--chunk", type=int, default=256, help="tokens computed together")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument(
        "--formats", nargs="*", default=[*FORMATS, "q4_k_m"], help="of synthetic models"
    )
    given = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in given.model or given.default_models:
            path = Path(Model(model).path)
            rows.append(measure(path.stem, path, folder, given))
        for quant in given.formats:
            path = synthetic_gguf(folder / "synthetic.gguf", quant=quant, **SHAPE)
            rows.append(measure(f"synthetic {quant}", path, folder, given))
    kernels = Model.available_kernels()
    report(
        f"{kernels} (ours) and ggml beside F32: KL divergence in nats per token",
        [row["columns"] for row in rows],
    )
    write_json(given, [{**row["columns"], "kl": row["kl"]} for row in rows])


if __name__ == "__main__":
    main()
