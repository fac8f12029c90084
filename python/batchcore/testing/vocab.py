"""Vocabularies for synthetic models: from nothing, from a GGUF, or one of llama.cpp's own.

llama.cpp keeps vocabularies without weights in models/ggml-vocab-*.gguf. They are in the source
distribution that the build takes llama.cpp from, but the build does not unpack them.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchcore import models
from batchcore.errors import ConfigError, ModelDownloadError, ModelLoadError
from batchcore.testing.gguf_pairs import read_pairs

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["SDIST_NAME", "SDIST_SHA256", "SDIST_VERSION", "Vocab", "load_vocab", "require_gguf"]

# The pin of vendor/llama.cpp.lock, which is not part of an installed package.
SDIST_NAME = "llama-cpp-python"
SDIST_VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

# Token types of llama.cpp's SentencePiece vocabularies.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_N_SPECIAL = 3


@dataclass(frozen=True)
class Vocab:
    """The `tokenizer.*` pairs of a GGUF: key, value, type, and element type of an array."""

    n_tokens: int
    pairs: tuple[tuple[str, Any, Any, Any], ...]

    def write(self, writer: Any, skip: Collection[str] = ()) -> None:
        """Add the pairs to a GGUFWriter, except the keys in `skip`."""
        for key, value, kind, element_kind in self.pairs:
            if key not in skip:
                writer.add_key_value(key, value, kind, element_kind)


def require_gguf() -> Any:
    """The gguf package, or an error that says how to get it."""
    try:
        import gguf  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "synthetic models need the gguf package: pip install 'batchcore[testing]'"
        ) from error
    return gguf


def load_vocab(vocab: str | os.PathLike[str] | int) -> Vocab:
    """Find and read a vocabulary; see `synthetic_gguf` for what `vocab` may be.

    Raises:
        ConfigError: An int is too small.
        ModelLoadError: There is no such vocabulary, or its file can't be read.
    """
    if isinstance(vocab, int):
        return _byte_vocab(vocab)
    name = os.fspath(vocab)
    if Path(name).is_file():
        return _read_vocab(Path(name))
    if name in {preset.name for preset in models.list_presets()}:
        return _read_vocab(models.resolve(name))
    if not isinstance(vocab, str) or os.sep in name or name.endswith(".gguf"):
        raise ModelLoadError(f"no such file: {name}")
    return _read_vocab(_llama_cpp_vocab(name))


def _byte_vocab(n_tokens: int) -> Vocab:
    """A SentencePiece vocabulary of the 256 bytes and as many words as are asked for.

    Any text can be tokenised; the words are never produced by tokenising, only by generating.
    """
    if n_tokens < _N_SPECIAL + 256:
        raise ConfigError(f"vocab: {n_tokens} tokens can't hold {_N_SPECIAL} special and 256 bytes")
    kinds = require_gguf().GGUFValueType
    words = (f"▁w{index}" for index in range(n_tokens - _N_SPECIAL - 256))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256
    types += [_NORMAL] * (n_tokens - len(types))
    scores = [0.0] * (_N_SPECIAL + 256)
    scores += [-float(index) for index in range(n_tokens - len(scores))]
    prefix = "tokenizer.ggml"
    return Vocab(
        n_tokens,
        (
            (f"{prefix}.model", "llama", kinds.STRING, None),
            (f"{prefix}.tokens", tokens, kinds.ARRAY, kinds.STRING),
            (f"{prefix}.scores", scores, kinds.ARRAY, kinds.FLOAT32),
            (f"{prefix}.token_type", types, kinds.ARRAY, kinds.INT32),
            (f"{prefix}.unknown_token_id", 0, kinds.UINT32, None),
            (f"{prefix}.bos_token_id", 1, kinds.UINT32, None),
            (f"{prefix}.eos_token_id", 2, kinds.UINT32, None),
            (f"{prefix}.add_bos_token", True, kinds.BOOL, None),
            (f"{prefix}.add_eos_token", False, kinds.BOOL, None),
            (f"{prefix}.add_space_prefix", False, kinds.BOOL, None),
        ),
    )


def _read_vocab(path: Path) -> Vocab:
    kinds = require_gguf().GGUFValueType
    try:
        found = [pair for pair in read_pairs(path) if pair[0].startswith("tokenizer.")]
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{path} is not a GGUF with a vocabulary: {error}") from error
    n_tokens = next((len(pair[1]) for pair in found if pair[0] == "tokenizer.ggml.tokens"), 0)
    if n_tokens == 0:
        raise ModelLoadError(f"{path} has no vocabulary")
    pairs = (
        (key, value, kinds(kind), None if element is None else kinds(element))
        for key, value, kind, element in found
        if value != []  # the writer refuses an empty array, and nothing is lost without it
    )
    return Vocab(n_tokens, tuple(pairs))


def _llama_cpp_vocab(name: str) -> Path:
    file_name = f"ggml-vocab-{name}.gguf"
    repository = Path(__file__).resolve().parents[3]
    trees = [os.environ.get("BATCHCORE_LLAMA_CPP_DIR"), repository / "vendor" / "llama.cpp"]
    for tree in trees:
        if tree and (found := Path(tree) / "models" / file_name).is_file():
            return found
    kept = models.cache_dir() / "vocabs" / file_name
    if not kept.is_file():
        _unpack(_find_sdist(), file_name, kept)
    return kept


def _find_sdist() -> Path:
    given = os.environ.get("BATCHCORE_LLAMA_CPP_SDIST")
    if given:
        return Path(given).expanduser()
    folder = models.cache_dir() / "sdist"
    sdist = folder / f"{SDIST_NAME.replace('-', '_')}-{SDIST_VERSION}.tar.gz"
    from batchcore.models.assemble import disk_errors, file_sha256  # noqa: PLC0415
    from batchcore.models.cache import exclusive_lock  # noqa: PLC0415
    from batchcore.models.pip_download import download_sdist  # noqa: PLC0415
    from batchcore.models.presets import Package  # noqa: PLC0415

    with disk_errors("could not get llama.cpp's vocabularies", folder), exclusive_lock("sdist"):
        if not sdist.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            sdist = download_sdist(Package(SDIST_NAME, SDIST_VERSION, 0), folder)
        if file_sha256(sdist) != SDIST_SHA256:
            sdist.unlink()
            raise ModelDownloadError(
                f"{sdist.name} does not have the expected SHA-256 and has been removed; try again",
                reason="corrupt",
            )
    return sdist


def _unpack(sdist: Path, file_name: str, target: Path) -> None:
    wanted = f"vendor/llama.cpp/models/{file_name}"
    names = []
    try:
        with tarfile.open(sdist, "r|*") as archive:
            for member in archive:
                inner = member.name.partition("/")[2]
                if inner == wanted and (source := archive.extractfile(member)) is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
                    partial.write_bytes(source.read())
                    partial.replace(target)
                    return
                if "ggml-vocab-" in inner and inner.endswith(".gguf"):
                    names.append(inner.rpartition("ggml-vocab-")[2].removesuffix(".gguf"))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ModelLoadError(f"can't read {sdist}: {error}") from error
    raise ModelLoadError(
        f"llama.cpp has no vocabulary {file_name!r}; it has: {', '.join(sorted(names))}"
    )
