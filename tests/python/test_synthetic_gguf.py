"""Structure of synthetic GGUFs; that llama.cpp runs them is shown where batchcore loads them."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from batchcore.errors import ConfigError, ModelDownloadError, ModelLoadError
from batchcore.testing import ARCHITECTURES, LLAMA_8B, synthetic_gguf
from batchcore.testing import vocab as vocab_module
from batchcore.testing.architectures import Shape, blueprint
from batchcore.testing.blocks import FORMATS, random_rows
from batchcore.testing.gguf_pairs import read_pairs
from batchcore.testing.vocab import load_vocab

QUANTISED = [name for name in FORMATS if FORMATS[name].elements > 1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("BATCHCORE_LLAMA_CPP_SDIST", "BATCHCORE_LLAMA_CPP_DIR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "cache"
    monkeypatch.setenv("BATCHCORE_CACHE", str(folder))
    # Away from the repository's own vendor folder, which may have the vocabularies or not.
    monkeypatch.setattr(vocab_module, "__file__", str(tmp_path / "a/b/c/d/vocab.py"))
    return folder


def open_gguf(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def value(path: Path, key: str) -> Any:
    return {name: found for name, found, _, _ in read_pairs(path)}[key]


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_a_readable_gguf(arch: str, tmp_path: Path) -> None:
    path = synthetic_gguf(tmp_path / "m.gguf", arch)
    reader = open_gguf(path)
    assert reader.fields["general.architecture"].contents() == arch
    assert reader.fields[f"{arch}.block_count"].contents() == 2
    assert reader.fields[f"{arch}.embedding_length"].contents() == 64
    assert reader.fields[f"{arch}.vocab_size"].contents() == 512
    names = {tensor.name for tensor in reader.tensors}
    assert "token_embd.weight" in names
    assert any(".0." in name for name in names)
    assert any(".1." in name for name in names)
    assert not any(".2." in name for name in names)
    for tensor in reader.tensors:
        assert np.isfinite(tensor.data).all(), tensor.name
    last = reader.tensors[-1]
    assert path.stat().st_size >= last.data_offset + last.n_bytes
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_llama_has_exactly_the_tensors_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    reader = open_gguf(synthetic_gguf(tmp_path / "m.gguf", n_layer=1))
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    assert shapes == {
        "token_embd.weight": (64, 512),
        "output_norm.weight": (64,),
        "output.weight": (64, 512),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (64, 32),
        "blk.0.attn_v.weight": (64, 32),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.ffn_gate.weight": (64, 128),
        "blk.0.ffn_up.weight": (64, 128),
        "blk.0.ffn_down.weight": (128, 64),
    }


def test_same_arguments_give_the_same_bytes_and_seeds_differ(tmp_path: Path) -> None:
    first = synthetic_gguf(tmp_path / "a", quant="q8_0").read_bytes()
    assert synthetic_gguf(tmp_path / "b", quant="q8_0").read_bytes() == first
    assert synthetic_gguf(tmp_path / "c", quant="q8_0", seed=1).read_bytes() != first


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    reader = open_gguf(synthetic_gguf(tmp_path / "m.gguf", tie_embeddings=True))
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}


def test_metadata_wins(tmp_path: Path) -> None:
    path = synthetic_gguf(
        tmp_path / "m.gguf",
        metadata={"llama.rope.freq_base": 5e5, "general.name": "x", "a.flag": True, "a.list": [1]},
    )
    assert value(path, "llama.rope.freq_base") == 5e5
    assert value(path, "general.name") == "x"
    assert value(path, "a.flag") is True
    assert value(path, "a.list") == [1]


@pytest.mark.parametrize("quant", [*FORMATS, "q4_k_m", "Q8_0"])
def test_quant_is_used_for_matrices_and_norms_stay_f32(quant: str, tmp_path: Path) -> None:
    path = synthetic_gguf(tmp_path / "m.gguf", n_embd=256, n_ff=256, quant=quant, n_layer=1)
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in open_gguf(path).tensors}
    expected = "q4_k" if quant == "q4_k_m" else quant.lower()
    assert kinds["blk.0.attn_q.weight"] == expected
    assert kinds["token_embd.weight"] == expected
    assert kinds["output.weight"] == ("q6_k" if quant == "q4_k_m" else expected)
    assert kinds["blk.0.attn_norm.weight"] == "f32"


def test_rows_that_do_not_fit_a_block_get_another_format(tmp_path: Path) -> None:
    def kind(**sizes: int) -> str:
        path = synthetic_gguf(tmp_path / "m.gguf", quant="q4_k", **sizes)
        tensors = {tensor.name: tensor.tensor_type.name for tensor in open_gguf(path).tensors}
        return tensors["blk.0.attn_q.weight"]

    assert kind(n_embd=256) == "Q4_K"
    assert kind(n_embd=64) == "Q5_0"
    assert kind(n_embd=48, n_head=2, n_head_kv=2) == "F16"


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be stored"):
        synthetic_gguf(tmp_path / "m.gguf", metadata={"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_8b_shape_has_8b_weights() -> None:
    options = dict(LLAMA_8B)
    n_vocab = options.pop("vocab")
    arch = options.pop("arch")
    plan = blueprint(arch, Shape(**options, n_vocab=n_vocab, tie_embeddings=False), {})
    weights = sum(int(np.prod(tensor.shape)) for tensor in plan.tensors)
    assert weights == 8_030_261_248  # what Meta's Llama 3 8B has


def test_memory_is_bounded_by_the_chunk(tmp_path: Path) -> None:
    # A process of its own: the peak of this one is set by other tests.
    code = (
        "import resource, sys\n"
        "from batchcore.testing import synthetic_gguf\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "synthetic_gguf(sys.argv[1], quant='q8_0')\n"
        "before = peak()\n"
        "path = synthetic_gguf(sys.argv[1], quant='q8_0', n_embd=4096, n_ff=16384, n_layer=1)\n"
        "print(path.stat().st_size // 1024, peak() - before)\n"
    )
    pytest.importorskip("resource", reason="the peak is not known on Windows")
    command = [sys.executable, "-c", code, str(tmp_path / "m.gguf")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    size, growth = map(int, out.stdout.split())
    if sys.platform == "darwin":
        growth //= 1024  # bytes there, KiB elsewhere
    assert size > 200_000
    assert growth < 100_000


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gpt-9"}, "unknown architecture"),
        ({"quant": "q9_9"}, "unknown quant"),
        ({"sliding_window": 8}, "llama has no option sliding_window"),
        ({"n_head": 5}, "not a multiple of n_head"),
        ({"n_head_kv": 3}, "not a multiple of n_head_kv"),
        ({"vocab": 100}, "can't hold"),
        ({"arch": "mamba2", "ssm_head_dim": 50}, "not a multiple of ssm_head_dim"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        synthetic_gguf(tmp_path / "m.gguf", **options)


def test_options_of_architectures(tmp_path: Path) -> None:
    gemma = synthetic_gguf(tmp_path / "g", "gemma3", sliding_window=8, sliding_window_pattern=3)
    assert value(gemma, "gemma3.attention.sliding_window") == 8
    assert value(gemma, "gemma3.attention.sliding_window_pattern") == 3
    lfm2 = synthetic_gguf(tmp_path / "l", "lfm2", n_layer=4, attention_every=4)
    assert value(lfm2, "lfm2.attention.head_count_kv") == [0, 0, 0, 2]
    experts = open_gguf(synthetic_gguf(tmp_path / "e", n_expert=4))
    shapes = {tensor.name: tuple(tensor.shape) for tensor in experts.tensors}
    assert shapes["blk.0.ffn_down_exps.weight"] == (128, 64, 4)
    wide = open_gguf(synthetic_gguf(tmp_path / "w", "qwen3", head_dim=32))
    shapes = {tensor.name: tuple(tensor.shape) for tensor in wide.tensors}
    assert shapes["blk.0.attn_q.weight"] == (64, 128)
    assert shapes["blk.0.attn_q_norm.weight"] == (32,)


def test_without_gguf_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'batchcore\[testing\]'"):
        synthetic_gguf(tmp_path / "m.gguf")


# -- random blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "bf16"])
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_blocks_have_mean_zero_and_the_wanted_deviation(name: str, std: float) -> None:
    fmt = FORMATS[name]
    n_blocks = -(-400_000 // fmt.elements)
    blocks = random_rows(np.random.default_rng(1), fmt, n_blocks, std)
    assert blocks.shape == (n_blocks, fmt.block_bytes)
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert gguf.GGML_QUANT_SIZES[kind] == (fmt.elements, fmt.block_bytes)
    if name in QUANTISED:
        weights = gguf.dequantize(blocks, kind)
    else:
        weights = blocks.view({"f32": np.float32, "f16": np.float16}[name]).astype(np.float32)
    assert weights.std() == pytest.approx(std, rel=0.03)
    assert abs(weights.mean()) < 0.01 * std
    # No common mean per row either, which is what would add up in a model.
    rows = weights.reshape(-1)[: weights.size // 4096 * 4096].reshape(-1, 4096)
    assert np.abs(rows.mean(axis=1)).max() < 0.12 * std


def test_bf16_keeps_the_upper_half() -> None:
    rows = random_rows(np.random.default_rng(1), FORMATS["bf16"], 10_000, 1.0, 1.0)
    widened = np.zeros((10_000, 4), np.uint8)
    widened[:, 2:] = rows
    weights = widened.view(np.float32)
    assert weights.std() == pytest.approx(1.0, rel=0.05)
    assert weights.mean() == pytest.approx(1.0, rel=0.05)


# -- vocabularies ---------------------------------------------------------------------------------


def test_byte_vocabulary_spells_every_byte() -> None:
    pairs = {key: found for key, found, _, _ in load_vocab(300).pairs}
    tokens = pairs["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == 300
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(tokens)
    assert len(pairs["tokenizer.ggml.scores"]) == len(pairs["tokenizer.ggml.token_type"]) == 300


def test_vocabulary_of_a_gguf_is_copied_whole(tmp_path: Path) -> None:
    first = synthetic_gguf(
        tmp_path / "a.gguf", vocab=400, metadata={"tokenizer.chat_template": "{{ messages }}"}
    )
    second = synthetic_gguf(tmp_path / "b.gguf", "qwen3", vocab=first)

    def tokenizer(path: Path) -> list[tuple[str, Any, int, int | None]]:
        pairs = [pair for pair in read_pairs(path) if pair[0].startswith("tokenizer.")]
        return sorted(pairs, key=lambda pair: pair[0])

    assert tokenizer(second) == tokenizer(first)
    assert value(second, "tokenizer.chat_template") == "{{ messages }}"
    assert value(second, "qwen3.vocab_size") == 400


def test_pairs_are_read_as_gguf_reads_them(tmp_path: Path) -> None:
    path = synthetic_gguf(tmp_path / "m.gguf", "lfm2", metadata={"x.f": 0.5, "x.b": False})
    fields = open_gguf(path).fields
    for key, found, kind, _ in read_pairs(path):
        assert fields[key].contents() == found
        assert fields[key].types[0] == kind


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(40), b"GGUF" + b"\xff" * 40])
def test_file_without_a_vocabulary(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError):
        load_vocab(path)


def test_damaged_count_is_not_allocated(tmp_path: Path) -> None:
    path = synthetic_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    key = b"tokenizer.ggml.scores"
    at = data.index(key) + len(key) + 8  # behind the types of value and elements
    path.write_bytes(data[:at] + (1 << 60).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(ModelLoadError, match="truncated"):
        load_vocab(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = synthetic_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelLoadError, match="truncated"):
        load_vocab(path)


def make_sdist(path: Path, vocabularies: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / "tree"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in vocabularies.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            archive.add(file, f"p-1.0/vendor/llama.cpp/models/ggml-vocab-{name}.gguf")
    return path


@pytest.fixture
def vocabulary(tmp_path: Path) -> bytes:
    return synthetic_gguf(tmp_path / "source.gguf", vocab=333).read_bytes()


def test_vocabulary_from_a_checkout(
    cache: Path, vocabulary: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "checkout/models/ggml-vocab-toy.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(vocabulary)
    monkeypatch.setenv("BATCHCORE_LLAMA_CPP_DIR", str(tmp_path / "checkout"))
    assert load_vocab("toy").n_tokens == 333


def test_vocabulary_from_a_given_sdist_is_kept(
    cache: Path, vocabulary: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdist = make_sdist(tmp_path / "s.tar.gz", {"other": b"", "toy": vocabulary})
    monkeypatch.setenv("BATCHCORE_LLAMA_CPP_SDIST", str(sdist))
    assert load_vocab("toy").n_tokens == 333
    sdist.unlink()
    assert load_vocab("toy").n_tokens == 333
    assert [file.name for file in (cache / "vocabs").iterdir()] == ["ggml-vocab-toy.gguf"]


def test_unknown_vocabulary_lists_what_there_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdist = make_sdist(tmp_path / "s.tar.gz", {"qwen2": b"", "bert-bge": b""})
    monkeypatch.setenv("BATCHCORE_LLAMA_CPP_SDIST", str(sdist))
    with pytest.raises(ModelLoadError, match="it has: bert-bge, qwen2"):
        load_vocab("toy")
    monkeypatch.setenv("BATCHCORE_LLAMA_CPP_SDIST", str(tmp_path / "none"))
    with pytest.raises(ModelLoadError, match="can't read"):
        load_vocab("toy")


def test_damaged_sdist_in_the_cache_is_removed(cache: Path, vocabulary: bytes) -> None:
    sdist = make_sdist(cache / "sdist/llama_cpp_python-0.3.36.tar.gz", {"toy": vocabulary})
    with pytest.raises(ModelDownloadError, match="SHA-256"):
        load_vocab("toy")
    assert not sdist.exists()


def test_missing_path_is_not_taken_for_a_name(cache: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file"):
        load_vocab("missing.gguf")
    with pytest.raises(ModelLoadError, match="no such file"):
        load_vocab(Path("missing"))


def test_pin_is_that_of_the_lock_file() -> None:
    lock = Path(__file__).parents[2] / "vendor" / "llama.cpp.lock"
    lines = [line.partition("=") for line in lock.read_text().splitlines() if "=" in line]
    pin = {key.strip(): text.strip() for key, _, text in lines}
    assert pin["package"] == vocab_module.SDIST_NAME
    assert pin["version"] == vocab_module.SDIST_VERSION
    assert pin["sha256"] == vocab_module.SDIST_SHA256


# -- the preset as a source of vocabulary ----------------------------------------------------------


@pytest.mark.model
def test_vocabulary_of_a_preset(tmp_path: Path) -> None:
    path = synthetic_gguf(tmp_path / "m.gguf", vocab="smollm2-135m", quant="q8_0")
    assert value(path, "llama.vocab_size") == 49152
    assert value(path, "tokenizer.ggml.model") == "gpt2"
    assert "<|im_start|>" in value(path, "tokenizer.chat_template")
