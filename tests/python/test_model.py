"""Model: loading and its errors, the log, progress, tokenising exactly, metadata."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import pytest
from batchcore import _core, _log, errors
from batchcore.errors import ConfigError, InvalidRequestError, ModelLoadError
from batchcore.model import Model
from hypothesis import example, given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.model


def test_every_native_error_has_a_python_twin() -> None:
    assert len(_core._error_names) > 8
    for name in _core._error_names:
        with pytest.raises(getattr(errors, name)) as caught:
            _core._raise(name)
        assert type(caught.value).__name__ == name
        assert str(caught.value) == "sample"


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("PromptTooLongError", {"num_tokens": 9, "limit": 8}),
        ("QueueFullError", {"capacity": 7}),
        ("DecodeError", {"status": -3}),
    ],
)
def test_native_errors_keep_their_attributes(name: str, attributes: dict[str, int]) -> None:
    with pytest.raises(getattr(errors, name)) as caught:
        _core._raise(name)
    assert {key: getattr(caught.value, key) for key in attributes} == attributes


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file"):
        Model(tmp_path / "none.gguf")
    with pytest.raises(ModelLoadError, match="no such model file"):
        _core.Model(str(tmp_path / "none.gguf"))


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="folder"):
        Model(tmp_path)
    with pytest.raises(ModelLoadError, match="is a directory"):
        _core.Model(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model at all", b"PK\x03\x04" * 100])
def test_not_a_gguf(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelLoadError, match="is not a GGUF file"):
        Model(file)


@pytest.mark.parametrize("size", [4, 8, 24, 100, 10_000, 1_000_000, 2_000_000, 50_000_000])
def test_truncated(tmp_path: Path, smollm2_path: Path, size: int) -> None:
    file = tmp_path / "model.gguf"
    with smollm2_path.open("rb") as source:
        file.write_bytes(source.read(size))
    with pytest.raises(ModelLoadError, match=r"can't be loaded: .*[a-z]") as caught:
        Model(file)
    # What llama.cpp says about it, not only that it failed.
    assert "failed to load model" not in str(caught.value)
    assert "gave no reason" not in str(caught.value)


def test_unknown_architecture(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "abacus")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="unknown model architecture: 'abacus'"):
        Model(file)


def test_bad_parameters(smollm2_path: Path) -> None:
    with pytest.raises(ConfigError, match="split_mode must be none, layer or row"):
        Model(smollm2_path, split_mode="columns")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no device 'CUDA99'; this build and machine have CPU"):
        Model(smollm2_path, devices=["CUDA99"])
    with pytest.raises(ConfigError, match="tensor_split"):
        Model(smollm2_path, tensor_split=[1.0] * 10_000)


def test_devices_cpu_only(smollm2_path: Path) -> None:
    assert Model(smollm2_path, devices=["CPU"], vocab_only=True).n_vocab == 49152


def test_log_goes_to_logging(smollm2_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="batchcore.llama"):
        Model(smollm2_path, vocab_only=True)
    lines = [record.getMessage() for record in caplog.records if record.name == "batchcore.llama"]
    assert any("general.architecture" in line for line in lines)
    assert all("\n" not in line for line in lines)


def test_log_is_quiet_by_default(
    smollm2_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    with smollm2_path.open("rb") as source:
        file.write_bytes(source.read(10_000))
    with pytest.raises(ModelLoadError):
        Model(file)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_log_buffer_is_bounded(smollm2_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _log.forward()
    for _ in range(80):  # more than sixty lines each, and nobody drains
        _core.Model(str(smollm2_path), vocab_only=True)
    lines, dropped = _core.drain_log()
    assert len(lines) == 4096
    assert dropped > 0
    assert _core.drain_log() == ([], 0)


def test_progress(smollm2_path: Path) -> None:
    seen: list[float] = []
    Model(smollm2_path, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0


def test_progress_cancels(smollm2_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="was cancelled"):
        Model(smollm2_path, progress=lambda _: False)


def test_progress_errors_propagate(smollm2_path: Path) -> None:
    def explode(_: float) -> None:
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        Model(smollm2_path, progress=explode)


def test_progress_bar(smollm2_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Model(smollm2_path, progress=True)
    assert "100%" in capfd.readouterr().err


def test_load_releases_the_gil(smollm2_path: Path) -> None:
    ticks = 0
    done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    Model(smollm2_path, check_tensors=True)
    done.set()
    thread.join()
    assert ticks > 5


def test_metadata(smollm2: Model, gemma3: Model) -> None:
    assert smollm2.architecture == "llama"
    assert smollm2.metadata["general.architecture"] == "llama"
    assert (smollm2.n_vocab, smollm2.n_layer, smollm2.n_embd) == (49152, 30, 576)
    assert (smollm2.n_head, smollm2.n_head_kv, smollm2.n_ctx_train) == (9, 3, 8192)
    assert smollm2.n_params == 134_515_008
    assert smollm2.size_bytes == 96_576_768
    assert smollm2.memory_kind == "attention"
    assert not smollm2.has_encoder
    assert not smollm2.is_recurrent
    assert not smollm2.is_hybrid
    assert smollm2.has_decoder
    assert smollm2.can_generate
    assert smollm2.end_of_generation == [0, 2, 4]
    assert (smollm2.special_tokens.bos, smollm2.special_tokens.eos) == (1, 2)
    assert not smollm2.special_tokens.add_bos
    assert smollm2.special_tokens.sep is None
    assert (gemma3.n_vocab, gemma3.n_swa, gemma3.memory_kind) == (262144, 512, "sliding_window")
    assert gemma3.special_tokens.add_bos
    assert "llama" in repr(smollm2)


def test_vocab_only_can_not_generate(smollm2_path: Path) -> None:
    model = Model(smollm2_path, vocab_only=True)
    assert not model.can_generate
    assert model.tokenize("Hello world") == [19556, 905]


# SmolLM2's vocabulary has no token for these bytes, the first six of which are also characters.
UNKNOWN_TO_SMOLLM2 = bytes.fromhex("04061314161dc0c1f1f2f5f6f7f8f9fafbfcfdfeff")

TEXTS = st.text(max_size=200) | st.lists(
    st.sampled_from(
        ["▁", " ", "  ", "\n", "\t", "\0", "a", "Hello", "é", "😀", "<bos>", "<|im_end|>"]
    )
).map("".join)


@given(text=TEXTS, add_special=st.booleans())
@example(text="▁▁ a▁", add_special=True)
@example(text="👩‍👩‍👧‍👦 e\u0301 \u202e \ufeff", add_special=True)
@example(text="Hello\0world\0", add_special=False)
def test_round_trip_of_text(gemma3: Model, smollm2: Model, text: str, add_special: bool) -> None:
    for model in (gemma3, smollm2):
        if model is smollm2 and any(byte in UNKNOWN_TO_SMOLLM2 for byte in text.encode()):
            continue
        tokens = model.tokenize(text, add_special=add_special)
        assert model.detokenize(tokens) == text
        assert model.detokenize_bytes(tokens) == text.encode()


@given(data=st.binary(max_size=200), add_special=st.booleans())
@example(data=b"\xff\xfe\x00", add_special=True)
@example(data="é".encode()[:1] + b"a", add_special=False)
@example(data=b"\xed\xa0\x80\xc0\x80\xf4\x90\x80\x80", add_special=False)
def test_round_trip_of_bytes(gemma3: Model, smollm2: Model, data: bytes, add_special: bool) -> None:
    tokens = gemma3.tokenize(data, add_special=add_special)
    assert gemma3.detokenize_bytes(tokens) == data
    known = data.translate(None, UNKNOWN_TO_SMOLLM2)
    tokens = smollm2.tokenize(known, add_special=add_special)
    assert smollm2.detokenize_bytes(tokens) == known


@pytest.mark.parametrize("text", ["▁a" * 20_000, "\xff" * 20_000, "a" * 100_000, " " * 100_000])
def test_long_odd_texts(gemma3: Model, smollm2: Model, text: str) -> None:
    for model in (gemma3, smollm2):
        assert model.detokenize(model.tokenize(text)) == text


def test_a_byte_without_a_token_is_lost_and_nothing_else(smollm2: Model) -> None:
    assert smollm2.detokenize(smollm2.tokenize("a\x04b")) == "ab"


def test_lone_surrogates_are_served(gemma3: Model) -> None:
    tokens = gemma3.tokenize("a\ud800b")
    assert gemma3.detokenize_bytes(tokens) == b"a\xed\xa0\x80b"
    assert gemma3.detokenize(tokens) == "a\ufffd\ufffd\ufffdb"


def test_special_tokens_in_text(smollm2: Model, gemma3: Model) -> None:
    assert smollm2.tokenize("<|im_start|>", parse_special=True) == [1]
    assert len(smollm2.tokenize("<|im_start|>")) > 1
    assert smollm2.detokenize([1, 19556], skip_special=False) == "<|im_start|>Hello"
    assert smollm2.detokenize([1, 19556]) == "Hello"
    assert gemma3.tokenize("Hello world") == [2, 9259, 1902]
    assert gemma3.tokenize("") == [2]
    assert gemma3.tokenize("", add_special=False) == []


def test_detokenize_refuses_unknown_tokens(smollm2: Model) -> None:
    for token in (-1, smollm2.n_vocab):
        with pytest.raises(InvalidRequestError, match=f"token {token} is not in the vocabulary"):
            smollm2.detokenize([token])
        with pytest.raises(InvalidRequestError):
            smollm2.token_bytes(token)


def test_tokenize_from_many_threads(smollm2: Model) -> None:
    texts = [f"thread {i} says hello ▁ {i * i}" for i in range(8)]
    expected = [smollm2.tokenize(text) for text in texts]
    wrong: list[str] = []

    def work(index: int) -> None:
        results = [smollm2.tokenize(texts[index]) for _ in range(200)]
        wrong.extend(texts[index] for tokens in results if tokens != expected[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
