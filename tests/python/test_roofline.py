"""Costs of synthetic models by hand, of real ones against llama.cpp's figures, and verdicts."""

from __future__ import annotations

import json
import sys

import gguf
import pytest
from batchcore.bench import peaks as peaks_module
from batchcore.bench.gguf_header import read_header, type_bytes
from batchcore.bench.layer_cost import AttentionLayer, CostMetadata
from batchcore.bench.roofline import ModelCost, Peaks, Roofline, measure_peaks
from batchcore.errors import BatchcoreError, ConfigError, ModelLoadError
from batchcore.lowlevel import Context
from batchcore.testing import synthetic_gguf

# synthetic_gguf's llama: 2 layers, width 64, 4 heads of 16, 2 of them for keys and values, 128 wide
# feed-forward, 512 tokens, f32.
LAYER_WEIGHTS = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
NORM_WEIGHTS = 2 * 2 * 64 + 64
LAYER_BYTES = 4 * (2 * LAYER_WEIGHTS + NORM_WEIGHTS)
HEAD_BYTES = 4 * 64 * 512
ROW_BYTES = 4 * 64
KV_BYTES = 2 * 2 * (2 * 16) * 2


@pytest.fixture
def make(tmp_path):
    def cost(*args, types=None, **options) -> ModelCost:
        return ModelCost.from_gguf(
            synthetic_gguf(tmp_path / "m.gguf", *args, **options), **(types or {})
        )

    return cost


# -- weights --------------------------------------------------------------------------------------


def test_llama_by_hand(make):
    cost = make()
    assert (LAYER_BYTES, HEAD_BYTES, ROW_BYTES, KV_BYTES) == (296_192, 131_072, 256, 256)
    assert cost.layer_bytes == LAYER_BYTES
    assert cost.layer_flops_per_row == 147_456
    assert cost.head_bytes == HEAD_BYTES
    assert cost.head_flops_per_output == 65_536
    assert cost.embedding_bytes_per_row == ROW_BYTES
    assert cost.tensor_bytes == LAYER_BYTES + 2 * HEAD_BYTES
    assert not cost.has_tied_head
    assert cost.attention == (AttentionLayer(128, 256, None),) * 2


def test_an_embedding_table_of_its_own_counts_by_the_rows_read(make):
    cost = make()
    assert cost.weight_bytes() == LAYER_BYTES + HEAD_BYTES + ROW_BYTES
    assert cost.weight_bytes(8) == LAYER_BYTES + HEAD_BYTES + 8 * ROW_BYTES
    assert cost.weight_bytes(8, outputs=0) == LAYER_BYTES + 8 * ROW_BYTES


def test_a_tied_embedding_table_counts_as_the_head(make):
    cost = make(tie_embeddings=True)
    assert cost.has_tied_head
    assert cost.weight_bytes(1) == cost.weight_bytes(8) == cost.tensor_bytes
    assert cost.weight_bytes(8, outputs=0) == LAYER_BYTES + 8 * ROW_BYTES


def test_steps_by_hand(make):
    cost = make()
    weights = LAYER_BYTES + HEAD_BYTES
    assert cost.step_bytes(2, 100) == weights + 2 * ROW_BYTES + 2 * 100 * KV_BYTES
    assert cost.step_bytes(64, 64, outputs=1, sequences=1) == (
        weights + 64 * ROW_BYTES + 64 * KV_BYTES
    )
    # rows * (2 * weights + attention) + head of the rows with logits
    assert cost.step_flops(2, 1, 100) == 2 * (147_456 + 2 * 256 * 100) + 65_536
    assert cost.step_flops(3) == 3 * (147_456 + 65_536)
    assert cost.intensity(2, 100) == cost.step_flops(2, 2, 100) / cost.step_bytes(2, 100)
    assert cost.intensity(4) > 3.5 * cost.intensity(1)


@pytest.mark.parametrize(("rows", "outputs"), [(0, None), (2, 3), (2, -1)])
def test_impossible_calls_are_refused(make, rows, outputs):
    with pytest.raises(ConfigError, match="outputs"):
        make().step_flops(rows, outputs)


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "q4_k_m", "bf16"])
def test_bytes_are_those_of_the_file(tmp_path, quant):
    path = synthetic_gguf(tmp_path / "m.gguf", quant=quant, n_embd=256, n_ff=512)
    reader = gguf.GGUFReader(path)
    cost = ModelCost.from_gguf(path)
    assert cost.tensor_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    table = next(t for t in reader.tensors if t.name == "token_embd.weight")
    assert cost.embedding_bytes_per_row == int(table.n_bytes) // 512


def test_experts_count_as_often_as_they_are_used(make):
    cost = make(n_expert=4, n_expert_used=2)
    assert cost.expert_bytes == 4 * 2 * 4 * 3 * 64 * 128
    assert cost.expert_flops_per_row == 2 * 2 * 2 * 3 * 64 * 128
    assert (cost.expert_count, cost.expert_used_count) == (4, 2)
    always = cost.layer_bytes + cost.head_bytes
    # One row takes half of them, and two rows three quarters on average.
    assert cost.weight_bytes(1) == always + ROW_BYTES + 0.5 * cost.expert_bytes
    assert cost.weight_bytes(2) == always + 2 * ROW_BYTES + 0.75 * cost.expert_bytes
    per_row = cost.layer_flops_per_row + cost.expert_flops_per_row + cost.head_flops_per_output
    assert cost.step_flops(3) == 3 * per_row
    # All but the experts: attention, and the routers.
    assert cost.layer_flops_per_row == 2 * 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 64 * 4)


def test_layers_that_predict_further_tokens_do_not_count(make):
    cost = make(metadata={"llama.nextn_predict_layers": 1})
    assert cost.layer_bytes == 4 * (LAYER_WEIGHTS + 2 * 64 + 64)
    assert len(cost.attention) == 1


# -- context --------------------------------------------------------------------------------------


def test_windowed_layers_read_the_window_at_most(make):
    cost = make("gemma3", sliding_window=32, sliding_window_pattern=2)
    assert [layer.window_tokens for layer in cost.attention] == [32, None]
    assert cost.context_bytes(20) == 2 * 20 * 128
    assert cost.context_bytes(100) == (32 + 100) * 128
    assert cost.step_flops(1, 0, 100) == cost.layer_flops_per_row + (32 + 100) * 256


@pytest.mark.parametrize(
    ("arch", "pattern", "unwindowed"),
    [
        ("gemma3", None, [5, 11]),
        ("gpt-oss", None, [1, 3, 5, 7, 9, 11]),
        ("smallthinker", None, [0, 4, 8]),
        ("lfm2", None, []),
        ("llama", None, list(range(12))),  # llama.cpp ignores the window
        ("gemma3", 3, [2, 5, 8, 11]),
        ("gemma3", 0, []),
        ("anything", [True] * 11 + [False], [11]),
    ],
)
def test_which_layers_have_a_window(arch, pattern, unwindowed):
    pairs = {
        "general.architecture": arch,
        f"{arch}.block_count": 12,
        f"{arch}.embedding_length": 64,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.sliding_window": 512,
    }
    if pattern is not None:
        pairs[f"{arch}.attention.sliding_window_pattern"] = pattern
    meta = CostMetadata(pairs)
    windows = [meta.attention(i, "f16", "f16").window_tokens for i in range(12)]
    assert windows == [None if i in unwindowed else 512 for i in range(12)]


def test_windowed_layers_may_have_heads_of_their_own():
    pairs = {
        "general.architecture": "x",
        "x.attention.head_count": [8, 8],
        "x.attention.head_count_kv": [2, 1],
        "x.attention.key_length": 64,
        "x.attention.value_length": 32,
        "x.attention.key_length_swa": 16,
        "x.attention.value_length_swa": 16,
        "x.attention.sliding_window": 128,
        "x.attention.sliding_window_pattern": [True, False],
    }
    meta = CostMetadata(pairs)
    assert meta.attention(0, "f16", "f16") == AttentionLayer(2 * 2 * 32, 2 * 8 * 32, 128)
    assert meta.attention(1, "f16", "f16") == AttentionLayer(2 * 1 * 96, 2 * 8 * 96, None)


def test_latent_attention_keeps_no_values():
    pairs = {
        "general.architecture": "deepseek2",
        "deepseek2.attention.head_count": 16,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.key_length": 576,
        "deepseek2.attention.value_length": 512,
        "deepseek2.attention.key_length_mla": 192,
    }
    layer = CostMetadata(pairs).attention(0, "f16", "f16")
    assert layer == AttentionLayer(2 * 576, 2 * 16 * (576 + 512), None)


def test_quantised_kv_cells_are_smaller(make):
    cost = make(types={"type_k": "q8_0", "type_v": "f16"})
    assert cost.attention[0].bytes_per_token == 34 + 64


def test_recurrent_layers_have_a_state_and_no_cells(make):
    cost = make("mamba2")
    assert cost.attention == ()
    per_layer = 4 * (128 * 128 + 3 * (128 + 2 * 128))
    assert cost.state_bytes_per_sequence == 2 * per_layer == 140_288
    assert cost.context_bytes(10) == cost.context_bytes(1000) == 140_288


def test_hybrids_have_both(make):
    cost = make("falcon-h1")
    assert len(cost.attention) == 2
    assert cost.context_bytes(10) == cost.state_bytes_per_sequence + 10 * KV_BYTES
    cost = make("lfm2")
    assert len(cost.attention) == 1
    assert cost.state_bytes_per_sequence == 4 * 64 * 2


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["t5", "bert"])
def test_encoders_are_refused(make, arch):
    with pytest.raises(ConfigError, match="encoder"):
        make(arch)


def test_all_files_of_a_split_model_count(tmp_path):
    whole = synthetic_gguf(tmp_path / "whole.gguf", n_layer=1)
    first = synthetic_gguf(
        tmp_path / "m-00001-of-00002.gguf", n_layer=1, metadata={"split.count": 2}
    )
    with pytest.raises(ModelLoadError, match="00002-of-00002"):
        read_header(first)
    synthetic_gguf(tmp_path / "m-00002-of-00002.gguf", n_layer=1)
    assert len(read_header(first)[1]) == 2 * len(read_header(whole)[1])
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(ModelLoadError, match="not the first file"):
        read_header(tmp_path / "other.gguf")


def test_damaged_files_are_named(tmp_path):
    path = synthetic_gguf(tmp_path / "m.gguf", n_layer=1)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelLoadError, match=r"m\.gguf: truncated"):
        ModelCost.from_gguf(path)
    path.write_bytes(b"GGML")
    with pytest.raises(ModelLoadError, match="not a GGUF"):
        ModelCost.from_gguf(path)


def test_without_gguf_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'batchcore\[lab\]'"):
        ModelCost.from_gguf("m.gguf")


def test_types_have_blocks():
    assert type_bytes("q4_K", 512) == 2 * 144
    with pytest.raises(ConfigError, match="don't fill"):
        type_bytes("q8_0", 33)
    with pytest.raises(ConfigError, match="unknown tensor type"):
        type_bytes("f17", 1)


def test_costs_become_json(make):
    values = json.loads(json.dumps(make().to_dict()))
    assert values["layer_bytes"] == LAYER_BYTES
    assert values["attention"][1] == {
        "bytes_per_token": 128,
        "flops_per_token": 256,
        "window_tokens": None,
    }


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models_agree_with_llama_cpp(request, name):
    model = request.getfixturevalue(name)
    path = request.getfixturevalue(f"{name}_path")
    cost = ModelCost.from_gguf(path)
    assert cost.has_tied_head
    assert cost.weight_bytes(1) == cost.tensor_bytes == model.size_bytes
    assert 0.97 < cost.weight_bytes(1) / path.stat().st_size < 1
    # Without norms, all parameters are factors of a matrix product.
    flops = cost.layer_flops_per_row + cost.head_flops_per_output
    assert 0.999 < flops / (2 * model.n_params) < 1
    with Context(model, n_ctx=512, n_outputs_max=1) as context:
        assert context.memory_usage()["context_bytes"] == cost.context_bytes(512)


# -- peaks ----------------------------------------------------------------------------------------


def test_peaks_are_measured():
    peaks = measure_peaks(1, seconds=0.001)
    assert peaks.bytes_per_s > 0
    assert peaks.flops_per_s > 0
    assert peaks.num_threads == 1
    assert peaks.flops_source == "float32 matmul"


def test_a_measurement_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(peaks_module.sys, "executable", "/nowhere/python")
    with pytest.raises(BatchcoreError, match="/nowhere/python"):
        measure_peaks(1)


def test_a_measurement_that_fails_shows_its_error(monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(BatchcoreError, match=r"measuring the peaks failed: .+"):
        measure_peaks(1)


@pytest.mark.parametrize(("num_threads", "seconds"), [(0, 1), (1, 0), (1, float("nan"))])
def test_peaks_need_threads_and_time(num_threads, seconds):
    with pytest.raises(ConfigError, match="above 0"):
        measure_peaks(num_threads, seconds=seconds)


def test_prefill_can_be_the_compute_peak(make):
    cost = make()
    peaks = Peaks(1000.0, 5.0, 2).with_prefill(cost, 100, context_tokens=50)
    assert peaks == Peaks(1000.0, 100.0 * (147_456 + 2 * 256 * 50), 2, "llama.cpp prefill")
    with pytest.raises(ConfigError, match="tokens_per_s"):
        peaks.with_prefill(cost, 0)


def test_peaks_become_json():
    assert Peaks(10.0, 50.0, 2).to_dict() == {
        "bytes_per_s": 10.0,
        "flops_per_s": 50.0,
        "num_threads": 2,
        "flops_source": "float32 matmul",
        "ridge_flops_per_byte": 5.0,
    }


# -- verdicts -------------------------------------------------------------------------------------


@pytest.fixture
def roofline() -> Roofline:
    """1 GB read per step, 2 GFLOP per row, 100 kB per token of context; 1 GB/s and 10 GFLOP/s."""
    cost = ModelCost(
        name="m.gguf",
        architecture="llama",
        tensor_bytes=10**9,
        layer_bytes=10**9,
        layer_flops_per_row=2 * 10**9,
        head_bytes=0,
        head_flops_per_output=0,
        has_tied_head=False,
        embedding_bytes_per_row=0,
        lookup_bytes_per_row=0,
        expert_bytes=0,
        expert_flops_per_row=0,
        expert_count=0,
        expert_used_count=0,
        state_bytes_per_sequence=0,
        attention=(AttentionLayer(10**5, 0, None),),
    )
    return Roofline(cost, Peaks(1e9, 10e9, 1))


def test_few_rows_are_memory_bound(roofline):
    point = roofline.classify(1, 1.25)
    assert point.verdict == "memory-bound"
    assert (point.intensity_flops_per_byte, point.ridge_flops_per_byte) == (2, 10)
    assert (point.memory_s, point.compute_s) == (1, 0.2)
    assert (point.memory_fraction, point.compute_fraction) == pytest.approx((0.8, 0.16))
    assert point.explanation == (
        "memory-bound: 1 row must read 1000 MB and compute 2 GFLOP, 2 operations per byte, below "
        "the ridge point of 10. Its 1250 ms are 80 % of the memory peak (1 GB/s) and 16 % of "
        "the compute peak (10 GFLOP/s, float32 matmul)."
    )


def test_many_rows_are_compute_bound(roofline):
    point = roofline.classify(10, 2.5)
    assert point.verdict == "compute-bound"
    assert (point.step_bytes, point.step_flops, point.outputs) == (10**9, 2 * 10**10, 10)
    assert point.compute_fraction == pytest.approx(0.8)
    assert "above the ridge point" in point.explanation


def test_steps_far_from_both_peaks_are_overhead(roofline):
    point = roofline.classify(10, 5.0)
    assert point.verdict == "neither (overhead)"
    assert point.explanation.endswith(
        "Less than 50 % of either: most of the step is something else."
    )
    assert roofline.classify(10, 5.0, threshold=0.4).verdict == "compute-bound"


def test_more_than_a_peak_is_explained(roofline):
    point = roofline.classify(1, 0.5)
    assert point.memory_fraction == 2
    assert point.explanation.endswith(
        "Above the memory peak: part of the weights stays in the cache."
    )
    point = roofline.classify(10, 1.5)
    assert point.compute_fraction == pytest.approx(4 / 3)
    assert "Above the compute peak" in point.explanation
    assert "Above the memory peak" not in point.explanation


def test_context_moves_a_step_towards_memory(roofline):
    assert roofline.ridge_rows() == 5
    # 20,000 tokens of context: another 2 GB for each row.
    point = roofline.classify(10, 22.0, context_tokens=20_000)
    assert point.verdict == "memory-bound"
    assert point.memory_s == 21
    assert roofline.ridge_rows(20_000, max_rows=100) is None
    # The rows of a prompt share their context.
    assert roofline.classify(10, 4.0, context_tokens=20_000, sequences=1).memory_s == 3


def test_the_least_time_is_the_longer_of_both(roofline):
    assert roofline.step_seconds(1) == 1
    assert roofline.step_seconds(10) == 2


def test_points_become_json(roofline):
    values = json.loads(json.dumps(roofline.classify(1, 1.25, context_tokens=3).to_dict()))
    assert values["verdict"] == "memory-bound"
    assert values["context_tokens"] == 3


def test_steps_take_time(roofline):
    with pytest.raises(ConfigError, match="seconds_per_step"):
        roofline.classify(1, 0)
