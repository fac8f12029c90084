"""Record what llama.cpp itself generates, for the tests that compare batchcore with it.

Run by hand after a bump of vendor/llama.cpp, with llama-completion built from that commit and
reference_tokens built as its first lines say:

    cmake -S $L -B $B -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF
    cmake --build $B --target llama-completion
    python tests/tools/record_reference_completions.py $B/bin/llama-completion ./reference_tokens

Token ids come from reference_tokens, because the text of llama-completion can't be turned back into
ids without doubt; llama-completion then generates from the same prompt, and its text has to be that
of those ids. Kernels differ between CPUs: `margins` tell tests where two tokens are nearly equal.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from batchcore import models

TARGET = Path(__file__).parents[1] / "python" / "data" / "reference_completions.json"
PRESETS = ("smollm2-135m", "gemma3-270m")
N_PREDICT = 32

LONG_PROMPT = " ".join(
    f"On day {day} the river rose by {day * 3 % 7} centimetres and the keeper wrote it down."
    for day in range(1, 25)
)
PROMPTS = {
    "short": "The capital of France is",
    "one_word": "Once",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "list": "Shopping list:\n- milk\n- bread\n-",
    "german": "Die schönste Straße der Stadt führt über die große Brücke zum",
    "japanese": "日本の首都は東京です。フランスの首都は",
    "emoji": "I love pizza 🍕 and pasta 🍝 because",
    "long": f"{LONG_PROMPT} On day 25",
}

COMPLETION_FLAGS = (
    f"-n {N_PREDICT} -c 2048 -t 2 --temp 0 --samplers temperature -no-cnv --no-warmup "
    "--no-display-prompt --simple-io --no-escape"
)


def completion_text(tool: Path, model: Path, prompt: Path) -> str:
    """What llama-completion prints."""
    result = subprocess.run(
        [tool, "-m", model, "-f", prompt, *COMPLETION_FLAGS.split()],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    return result.stdout.decode("utf-8", "replace")


def same_text(printed: str, pieces: bytes) -> bool:
    """Whether two texts agree; the tool trims its end, and adds a word when generation stops."""
    text = pieces.decode("utf-8", "replace").strip().rstrip("\ufffd")
    return printed.replace("[end of text]", "").strip().rstrip("\ufffd") == text


def record(completion: Path, reference: Path, name: str, folder: Path) -> dict[str, Any]:
    """Generate from all prompts with one model."""
    model = models.resolve(name)
    files = []
    for key, prompt in PROMPTS.items():
        file = folder / key
        file.write_bytes(prompt.encode())
        files.append(file)
    lines = subprocess.run(
        [reference, model, str(N_PREDICT), *files], capture_output=True, check=True, text=True
    ).stdout.splitlines()
    entries = {}
    for (key, prompt), file, line in zip(PROMPTS.items(), files, lines, strict=True):
        entry = {"prompt": prompt, **json.loads(line)}
        raw = bytes.fromhex(entry.pop("text_hex"))
        entry["text"] = raw.decode("utf-8", "replace")
        printed = completion_text(completion, model, file)
        print(f"{name} {key}: {entry['finish_reason']}, margin {min(entry['margins'])}")
        if not same_text(printed, raw):
            raise SystemExit(f"llama-completion says otherwise:\n{printed!r}\n{entry['text']!r}")
        entries[key] = entry
    return entries


def main() -> None:
    """Run both tools and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("completion", type=Path, help="llama-completion")
    parser.add_argument("reference", type=Path, help="reference_tokens")
    options = parser.parse_args()
    said = subprocess.run([options.completion, "--version"], capture_output=True, check=True)
    commit = re.search(rb"commit (\w+)", said.stdout + said.stderr)
    assert commit is not None, "llama-completion doesn't say its commit"
    hashes = {preset.name: preset.sha256 for preset in models.list_presets()}
    with tempfile.TemporaryDirectory() as folder:
        recorded = {
            name: {
                "sha256": hashes[name],
                "prompts": record(options.completion, options.reference, name, Path(folder)),
            }
            for name in PRESETS
        }
    document = {
        "about": (
            "Greedy generations of llama.cpp, by tests/tools/record_reference_completions.py. "
            "margins: logit of the token minus that of the runner-up. With finish_reason stop, "
            "the last id is the end-of-generation token; text is without it."
        ),
        "llama_cpp_commit": commit[1].decode(),
        "commands": {
            "token_ids": f"reference_tokens MODEL {N_PREDICT} PROMPT_FILE...",
            "checked_against": f"llama-completion -m MODEL -f PROMPT_FILE {COMPLETION_FLAGS}",
        },
        "n_predict": N_PREDICT,
        "models": recorded,
    }
    TARGET.parent.mkdir(exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False)
    # Lists of numbers on one line each: read and compared by people.
    text = re.sub(r"\[[-\d.,\s]+\]", lambda found: " ".join(found[0].split()), text)
    TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
