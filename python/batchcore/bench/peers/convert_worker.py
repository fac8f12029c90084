"""Converts a GGUF file with the packages of a peer's Python, which runs this file by its path.

It imports nothing but the standard library and those packages: that Python may have nothing of
ours. Everything is computed from the GGUF, and nothing is fetched.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def to_hugging_face(source: Path, folder: Path) -> None:
    """Dequantise into a Hugging Face directory of bfloat16 weights, with tokenizer files."""
    import torch  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415
    import transformers  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    options: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.float32}
    # Newer releases keep weights packed unless they are told otherwise, and can't save those.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **options)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)


def to_openvino(source: Path, folder: Path) -> None:
    """Export with int8 weights, a scale per channel, and OpenVINO's tokenizer and detokenizer."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as between:
        to_hugging_face(source, Path(between))
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        command += ["--model", between, "--library", "transformers"]
        command += ["--task", "text-generation-with-past", "--weight-format", "int8"]
        subprocess.run([*command, str(folder)], check=True)


FORMATS = {"hf-bf16": to_hugging_face, "openvino-int8": to_openvino}


def main() -> None:
    """Convert: the arguments are a format, the GGUF file and an empty folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    FORMATS[sys.argv[1]](Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve())


if __name__ == "__main__":
    main()
