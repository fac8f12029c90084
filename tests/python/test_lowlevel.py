"""batchcore.lowlevel: it computes what llama.cpp does, and every misuse raises."""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from batchcore.errors import (
    BatchcoreError,
    ConfigError,
    DecodeError,
    EngineClosedError,
    EngineError,
    InvalidRequestError,
    StaleViewError,
    ViewInUseError,
)
from batchcore.lowlevel import Batch, Context
from batchcore.model import Model
from batchcore.testing import synthetic_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.model

LAYOUTS = ["unified", "streams"]


def make_context(model: Model, **options: Any) -> Context:
    """With one thread, which does not compete for a busy machine."""
    return Context(model, **{"n_threads": 1, **options})


@pytest.fixture(params=LAYOUTS)
def context(request: pytest.FixtureRequest, smollm2: Model) -> Iterator[Context]:
    with make_context(
        smollm2, n_ctx=1024, n_seq_max=4, n_batch=256, n_ubatch=64, kv_layout=request.param
    ) as context:
        yield context


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """Small models of architectures that have no small real one."""
    folder = tmp_path_factory.mktemp("models")

    def make(arch: str, **options: Any) -> Model:
        return Model(synthetic_gguf(folder / f"{arch}.gguf", arch, **options))

    return make


def prompt(tokens: list[int], seq_id: int = 0, start: int = 0) -> Batch:
    positions = range(start, start + len(tokens))
    return Batch.from_arrays(tokens, list(positions), [seq_id] * len(tokens))


def greedy(context: Context, tokens: list[int], count: int, seq_id: int = 0) -> list[int]:
    result: list[int] = []
    position = context.seq_pos_max(seq_id) + 1
    while len(result) < count:
        context.decode(prompt(tokens, seq_id, position))
        position += len(tokens)
        tokens = [context.logits().argmax()]
        result += tokens
    return result


def test_generates_text(context: Context, smollm2: Model) -> None:
    tokens = smollm2.tokenize("The capital of France is")
    assert smollm2.detokenize(greedy(context, tokens, 5)) == " Paris.\n\nThe"


def test_generates_what_llama_cpp_does(smollm2_path: Path) -> None:
    """With ggml's kernels: where two tokens are nearly level, ours choose the other."""
    model = Model(smollm2_path, kernels="ggml")
    tokens = model.tokenize("The capital of France is")
    with make_context(model, n_ctx=256) as context:
        assert model.detokenize(greedy(context, tokens, 8)) == " Paris.\n\nThe United States has"


def test_rows_of_several_sequences(context: Context, smollm2: Model) -> None:
    prompts = [smollm2.tokenize(text) for text in ("The capital of France is", "Two plus", "One")]
    alone = []
    for tokens in prompts:
        context.decode(prompt(tokens))
        alone.append(context.logits().copy())
        context.clear()
    batch = Batch()
    rows = []
    for seq_id, tokens in enumerate(prompts):
        for position, token in enumerate(tokens):
            batch.add(token, position, [seq_id], position == len(tokens) - 1)
        rows.append(len(batch) - 1)
    context.decode(batch)
    together = context.logits_all()
    assert together.shape == (3, smollm2.n_vocab)
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(together[index], context.logits(row))
        if smollm2.kernels == "ggml":
            np.testing.assert_allclose(together[index], alone[index], atol=0.35)
        else:
            np.testing.assert_array_equal(together[index], alone[index])
        assert together.argmax()[index] == alone[index].argmax()


def test_batch_holds_what_was_put_in() -> None:
    batch = Batch.from_arrays(
        np.array([5, 6]),
        np.array([0, 1], dtype=np.int16),
        np.array([1, 1]),
        np.array([True, False]),
    )
    batch.add(7, 2, [1, 3])
    batch.extend([8], [3], [[1, 3]])
    assert batch.tokens == [5, 6, 7, 8]
    assert batch.pos == [0, 1, 2, 3]
    assert batch.seq_ids == [[1], [1], [1, 3], [1, 3]]
    assert batch.logits == [True, False, False, True]
    batch.clear()
    assert len(batch) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (([1, 2], [0], [0, 0]), "equally long"),
        (([1, 2], [0, 1], [0]), "equally long"),
        (([1, 2], [0, 1], [0, 0], [True]), "equally long"),
        (([1.5], [0], [0]), "tokens must be one-dimensional and of integers"),
        (([[1]], [0], [0]), "tokens must be one-dimensional"),
        (([1], [2**31], [0]), "pos has a value that is out of range: 2147483648"),
        (([2**32 + 1], [0], [0]), "tokens has a value that is out of range"),
        (([1], [0], [[]]), "must belong to a sequence"),
    ],
)
def test_arrays_that_make_no_batch(arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        Batch.from_arrays(*arguments)


def batch_of(*rows: tuple[int, int, list[int]]) -> Batch:
    batch = Batch()
    for token, position, seq_ids in rows:
        batch.add(token, position, seq_ids, True)
    return batch


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (Batch(), "the batch is empty"),
        (batch_of((-1, 0, [0])), "token -1 is not in the vocabulary"),
        (batch_of((49152, 0, [0])), "token 49152 is not in the vocabulary"),
        (batch_of((1, 0, [4])), "no sequence 4: n_seq_max is 4"),
        (batch_of((1, 0, [-1])), "no sequence -1"),
        (batch_of((1, -1, [0])), "position -1 is out of range"),
        (batch_of((1, 2**31 - 1, [0])), "position 2147483647 is out of range"),
        (batch_of((1, 0, [0]), (1, 2, [0])), "must go on at position 1, not 2"),
        (batch_of((1, 0, [0]), (1, 0, [0])), "must go on at position 1, not 0"),
        (batch_of((1, 1, [0]), (1, 0, [0])), "must go on at position 2, not 0"),
        (prompt([1] * 257), "257 tokens, more than n_batch"),
    ],
)
def test_bad_batches(context: Context, batch: Batch, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        context.decode(batch)
    assert greedy(context, [1], 1)  # and nothing is broken


def test_a_sequence_goes_on_where_it_ended(context: Context) -> None:
    context.decode(prompt([1, 2, 3]))
    for position in (0, 2, 4):
        with pytest.raises(InvalidRequestError, match=f"at position 3, not {position}"):
            context.decode(prompt([4], start=position))
    context.decode(prompt([4], start=3))


def test_too_many_outputs(smollm2: Model) -> None:
    with make_context(smollm2, n_ctx=256, n_outputs_max=2) as context:
        context.decode(batch_of((1, 0, [0]), (1, 1, [0])))
        with pytest.raises(InvalidRequestError, match="3 rows of logits, more than n_outputs_max"):
            context.decode(batch_of((1, 2, [0]), (1, 3, [0]), (1, 4, [0])))


def test_shared_tokens_need_a_unified_layout(smollm2: Model) -> None:
    shared = batch_of((1, 0, [0, 1]), (2, 1, [0, 1]))
    with make_context(smollm2, n_ctx=512, n_seq_max=2) as context:
        context.decode(shared)
        assert context.seq_pos_max(1) == 1
        context.seq_rm(1, 0, 1)
        with pytest.raises(DecodeError, match="diver") as caught:  # llama.cpp's own check
            context.decode(batch_of((1, 2, [0, 1])))
        assert caught.value.status == -1
    with (
        make_context(smollm2, n_ctx=512, n_seq_max=2, kv_layout="streams") as context,
        pytest.raises(InvalidRequestError, match="several sequences in a unified"),
    ):
        context.decode(shared)


def test_no_room(smollm2: Model) -> None:
    with make_context(smollm2, n_ctx=256) as context:
        context.decode(prompt([1] * 256))
        with pytest.raises(DecodeError, match="no room") as caught:
            context.decode(prompt([1], start=256))
        assert caught.value.status == 1
        assert context.seq_pos_max(0) == 255  # nothing changed
        context.seq_rm(0, 200)
        context.decode(prompt([1], start=200))


def test_rows_that_were_not_asked_for(context: Context) -> None:
    with pytest.raises(InvalidRequestError, match="has no token -1"):
        context.logits()
    with pytest.raises(InvalidRequestError, match="no batch with outputs"):
        context.logits_all()
    context.decode(prompt([1, 2, 3]))
    assert context.logits(2).argmax() == context.logits(-1).argmax()
    for index in (0, 1, -2, -3):
        with pytest.raises(InvalidRequestError, match="did not ask for an output"):
            context.logits(index)
    for index in (3, -4, 10**12):
        with pytest.raises(InvalidRequestError, match=f"has no token {index}"):
            context.logits(index)
    with pytest.raises(InvalidRequestError, match="embeddings=True"):
        context.embeddings()
    context.decode(Batch.from_arrays([4], [3], [0], [False]))
    with pytest.raises(InvalidRequestError, match="no batch with outputs"):
        context.logits_all()


def test_views_are_read_only_and_not_copies(context: Context, smollm2: Model) -> None:
    context.decode(prompt([1, 2, 3]))
    view = context.logits()
    first, second = np.asarray(view), np.asarray(view)
    assert first.dtype == np.float32
    assert first.shape == view.shape == (smollm2.n_vocab,)
    assert len(view) == smollm2.n_vocab
    assert np.shares_memory(first, second)
    assert not first.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        first.flags.writeable = True
    copy = view.copy()
    assert copy.flags.writeable
    assert not np.shares_memory(copy, first)
    np.testing.assert_array_equal(copy, first)
    assert view[5] == first[5]
    assert view.argmax() == int(first.argmax())
    assert np.asarray(view, dtype=np.float64).dtype == np.float64
    assert np.array(view, copy=True).flags.writeable


def test_a_stale_view_raises(context: Context) -> None:
    context.decode(prompt([1, 2, 3]))
    view, rows = context.logits(), context.logits_all()
    context.decode(prompt([4], start=3))
    uses: list[Callable[[], object]] = [
        lambda: view[0],
        lambda: len(view),
        lambda: view.shape,
        view.argmax,
        view.copy,
        lambda: np.asarray(view),
        lambda: np.array(view),
        lambda: rows[0, 0],
    ]
    for use in uses:
        with pytest.raises(StaleViewError, match="older than the context's last decode"):
            use()


@pytest.mark.parametrize(
    "hold", [np.asarray, lambda v: v[2:5], lambda v: np.asarray(v).reshape(1, -1), memoryview]
)
def test_no_decode_while_an_array_lives(context: Context, hold: Callable[[Any], object]) -> None:
    context.decode(prompt([1, 2, 3]))
    view = context.logits()
    held = hold(np.asarray(view)) if hold is memoryview else hold(view)
    with pytest.raises(ViewInUseError, match="delete or copy them first"):
        context.decode(prompt([4], start=3))
    with pytest.raises(BufferError):  # bytearray's contract, and its error
        context.close()
    assert view[0] is not None  # the refused calls left everything as it was
    del held
    gc.collect()
    context.decode(prompt([4], start=3))


def test_an_array_keeps_its_memory(smollm2: Model) -> None:
    context = make_context(smollm2, n_ctx=256)
    context.decode(prompt([1, 2, 3]))
    array = np.asarray(context.logits())
    expected = array.copy()
    del context
    gc.collect()
    np.testing.assert_array_equal(array, expected)


def test_after_close(context: Context) -> None:
    context.decode(prompt([1]))
    view = context.logits()
    assert not context.closed
    context.close()
    context.close()
    assert context.closed
    uses: list[Callable[[], object]] = [
        lambda: view[0],
        lambda: context.decode(prompt([1])),
        lambda: context.encode(prompt([1])),
        context.logits,
        context.logits_all,
        lambda: context.seq_rm(0),
        lambda: context.seq_cp(0, 1),
        lambda: context.seq_keep(0),
        lambda: context.seq_pos_max(0),
        context.clear,
        lambda: context.state_save(0),
        lambda: context.state_restore(0, b""),
        context.memory_usage,
    ]
    for use in uses:
        with pytest.raises(EngineClosedError):
            use()
    context.interrupt()
    assert context.n_seq_max == 4


def test_two_threads_at_once(smollm2: Model) -> None:
    with make_context(smollm2, n_ctx=2048, n_batch=512) as context:
        thread = threading.Thread(target=context.decode, args=(prompt([1] * 512),))
        thread.start()
        errors: list[BatchcoreError] = []
        while thread.is_alive():
            try:
                context.seq_pos_max(0)
            except EngineError as error:
                errors.append(error)
            time.sleep(0.001)
        thread.join()
        assert errors
        assert "another thread" in str(errors[0])
        assert context.seq_pos_max(0) == 511


def test_interrupt(smollm2: Model) -> None:
    with make_context(smollm2, n_ctx=2048, n_batch=1024, n_ubatch=128) as context:
        timer = threading.Timer(0.2, context.interrupt)
        timer.start()
        with pytest.raises(DecodeError, match="interrupted") as caught:
            context.decode(prompt([1] * 1024))
        timer.join()
        assert caught.value.status == 2
        held = context.seq_pos_max(0) + 1
        assert held < 1024
        assert held % 128 == 0
        context.decode(prompt([1], start=held))


def test_sequence_operations(context: Context) -> None:
    context.decode(prompt([1, 2, 3, 4]))
    expected = context.logits().copy()
    context.seq_cp(0, 1)
    assert (context.seq_pos_min(1), context.seq_pos_max(1)) == (0, 3)
    assert context.seq_rm(1, 3)
    context.decode(prompt([4], seq_id=1, start=3))
    np.testing.assert_allclose(context.logits().copy(), expected, atol=0.2)
    context.seq_cp(1, 2)
    context.seq_keep(1)
    assert [context.seq_pos_max(s) for s in range(4)] == [-1, 3, -1, -1]
    context.clear()
    assert context.seq_pos_max(1) == -1
    assert context.seq_pos_min(1) == -1


@pytest.mark.parametrize("seq_id", [-1, 4, 10**6])
def test_sequences_out_of_range(context: Context, seq_id: int) -> None:
    uses: list[Callable[[], object]] = [
        lambda: context.seq_rm(seq_id),
        lambda: context.seq_cp(seq_id, 0),
        lambda: context.seq_cp(0, seq_id),
        lambda: context.seq_keep(seq_id),
        lambda: context.seq_pos_min(seq_id),
        lambda: context.seq_pos_max(seq_id),
        lambda: context.state_save(seq_id),
        lambda: context.state_restore(seq_id, b"x" * 100),
    ]
    for use in uses:
        with pytest.raises(InvalidRequestError, match=f"no sequence {seq_id}"):
            use()


def test_copies_between_streams_are_whole(smollm2: Model) -> None:
    with make_context(smollm2, n_ctx=1024, n_seq_max=4, kv_layout="streams") as context:
        context.decode(prompt([1, 2, 3, 4]))
        for p0, p1 in ((1, -1), (0, 3), (-1, 2)):
            with pytest.raises(InvalidRequestError, match="only whole sequences"):
                context.seq_cp(0, 1, p0, p1)
        context.seq_cp(0, 1, 0, 4)
        with pytest.raises(InvalidRequestError, match="is not empty"):
            context.seq_cp(0, 1)
        with pytest.raises(InvalidRequestError, match="save it after that"):
            context.state_save(1)
        state = context.state_save(0)
        for seq_id in (0, 1):
            with pytest.raises(InvalidRequestError, match="restore it after that"):
                context.state_restore(seq_id, state)
        context.decode(prompt([5], start=4))
        context.state_restore(1, state)


def test_unified_copies_share_cells(smollm2: Model) -> None:
    with make_context(smollm2, n_ctx=256, n_seq_max=3) as context:
        context.decode(prompt([1] * 200))
        context.seq_cp(0, 1, 0, 100)
        context.seq_cp(0, 2)
        assert [context.seq_pos_max(s) for s in range(3)] == [199, 99, 199]
        context.decode(prompt([2] * 56, seq_id=1, start=100))  # exactly what is left


def test_state_goes_to_another_sequence_and_context(context: Context, smollm2: Model) -> None:
    context.decode(prompt([1, 2, 3, 4]))
    state = context.state_save(0)
    expected = greedy(context, [5], 5)
    context.state_restore(3, state)
    assert context.seq_pos_max(3) == 3
    assert greedy(context, [5], 5, seq_id=3) == expected
    layout: Any = "unified" if context.n_ctx_seq == context.n_ctx else "streams"
    with make_context(smollm2, n_ctx=1024, n_seq_max=4, kv_layout=layout) as other:
        other.state_restore(0, state)
        assert greedy(other, [5], 5) == expected


def test_bad_states(context: Context, smollm2: Model) -> None:
    with pytest.raises(InvalidRequestError, match="is empty"):
        context.state_save(0)
    context.decode(prompt([1, 2, 3, 4]))
    state = context.state_save(0)
    damaged = bytearray(state)
    damaged[len(state) // 2] ^= 1
    for bad, reason in [
        (b"", "not a state"),
        (b"x" * 1000, "not a state"),
        (state[:40], "damaged"),
        (state[:-1], "damaged"),
        (state + b"\0", "damaged"),
        (bytes(damaged), "damaged"),
    ]:
        with pytest.raises(InvalidRequestError, match=reason):
            context.state_restore(0, bad)
    assert context.seq_pos_max(0) == 3  # refused states leave the sequence alone
    layout: Any = "streams" if context.n_ctx_seq == context.n_ctx else "unified"
    for options in ({"kv_layout": layout}, {"type_k": "q8_0"}):
        other = make_context(smollm2, n_ctx=1024, n_seq_max=4, **options)
        with pytest.raises(InvalidRequestError, match="another KV layout or other cache types"):
            other.state_restore(0, state)
        other.close()


def test_a_state_without_room(smollm2: Model) -> None:
    with make_context(smollm2, n_ctx=256, n_seq_max=2) as context:
        context.decode(prompt([1] * 200))
        state = context.state_save(0)
        with pytest.raises(EngineError, match="can't be restored"):
            context.state_restore(1, state)
        assert context.seq_pos_max(1) == -1
        assert context.seq_pos_max(0) == 199


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n_seq_max": 0}, "number of sequences must be from 1 to 256"),
        ({"n_seq_max": 257}, "number of sequences must be from 1 to 256"),
        ({"n_seq_max": 64, "n_ubatch": 32}, "must not exceed n_ubatch"),
        ({"n_seq_max": 8, "n_outputs_max": 4}, "max_outputs must be from 8"),
        ({"n_ctx": -1}, "n_ctx must be from"),
        ({"n_ubatch": 0, "n_batch": 0}, "n_ubatch must be from"),
        ({"n_threads": 10_000}, "n_threads must be from"),
        ({"poll": 101}, "poll must be from"),
        ({"type_k": "q4_k"}, "type_k must be one of f32, f16"),
        ({"type_v": "int8"}, "type_v must be one of"),
        ({"type_v": "q8_0", "flash_attn": False}, "requires flash_attn"),
        ({"kv_layout": "paged"}, "kv_layout must be one of streams, unified"),
        ({"pooling": "max"}, "pooling must be one of"),
    ],
)
def test_bad_parameters(smollm2: Model, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_context(smollm2, **{"n_ctx": 256, **options})


def test_too_large_a_context_is_an_error_not_a_kill(smollm2: Model) -> None:
    with pytest.raises(EngineError, match="no memory for a context"):
        make_context(smollm2, n_ctx=500_000_000)


def test_vocab_only(smollm2_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_only"):
        make_context(Model(smollm2_path, vocab_only=True), n_ctx=256)


def test_effective_parameters(smollm2: Model) -> None:
    with Context(smollm2, n_ctx=1000, n_seq_max=3, kv_layout="streams", n_threads=1) as context:
        assert (context.n_ctx, context.n_ctx_seq, context.n_seq_max) == (1536, 512, 3)
        assert (context.n_batch, context.n_ubatch, context.n_outputs_max) == (1000, 512, 1000)
        assert (context.n_threads, context.n_threads_batch) == (1, 1)
        assert context.memory_usage()["context_bytes"] == 1536 * 30 * 2 * 192 * 2
        assert context.warnings == []
        for position in range(4):
            context.decode(prompt([1], start=position))
        assert context.num_graphs_reused >= 2
    with make_context(smollm2, n_ctx=16384) as context:
        assert "trained with 8192" in context.warnings[0]


def test_embeddings_of_tokens(smollm2: Model) -> None:
    with make_context(smollm2, n_ctx=256, embeddings=True, pooling="none") as context:
        context.decode(prompt([1, 2, 3]))
        assert context.embeddings_all().shape == (3, 576)
        assert context.embeddings(0).shape == (576,)
        np.testing.assert_array_equal(context.embeddings_all()[2], context.embeddings(-1))
        assert np.linalg.norm(context.embeddings()) > 1
        assert context.logits_all().shape == (3, smollm2.n_vocab)
        with pytest.raises(InvalidRequestError, match="no pooled embedding of sequence 0"):
            context.embeddings_seq(0)


def test_embeddings_of_sequences(smollm2: Model) -> None:
    with make_context(smollm2, n_ctx=256, n_seq_max=2, embeddings=True, pooling="mean") as context:
        context.decode(batch_of((1, 0, [0]), (2, 1, [0]), (3, 0, [1])))
        first = context.embeddings_seq(0)
        assert first.shape == (576,)
        assert not np.allclose(first, context.embeddings_seq(1))
        with pytest.raises(InvalidRequestError, match="this context pools"):
            context.embeddings()
        del first
        with pytest.raises(InvalidRequestError, match="more than n_ubatch"):
            context.decode(prompt([1] * 513))


def test_encoder(synthetic: Callable[..., Model]) -> None:
    model = synthetic("bert")
    assert not model.can_generate
    assert model.memory_kind == "none"
    with make_context(model, n_ctx=512, n_seq_max=2, embeddings=True) as context:
        with pytest.raises(InvalidRequestError, match=r"use encode\(\)"):
            context.decode(prompt([1, 2]))
        context.encode(batch_of((5, 0, [0]), (6, 1, [0]), (7, 0, [1])))
        assert context.embeddings_seq(0).shape == (model.n_embd,)
        assert not np.allclose(context.embeddings_seq(0), context.embeddings_seq(1))
        with pytest.raises(InvalidRequestError, match="no logits"):
            context.logits()
        with pytest.raises(InvalidRequestError, match="more than n_ubatch"):
            context.encode(prompt([1] * 513))
        with pytest.raises(InvalidRequestError, match="is empty"):
            context.state_save(0)
        assert context.seq_rm(0)
        context.clear()


def test_learned_positions_end(synthetic: Callable[..., Model]) -> None:
    model = synthetic("bert", n_ctx_train=64)
    with make_context(model, n_ctx=256, embeddings=True) as context:
        with pytest.raises(InvalidRequestError, match="position 64 is out of range"):
            context.encode(prompt([5] * 65))
        context.encode(prompt([5] * 64))


def test_encoder_and_decoder(synthetic: Callable[..., Model]) -> None:
    model = synthetic("t5")
    assert not model.can_generate
    with make_context(model, n_ctx=256) as context:
        with pytest.raises(InvalidRequestError, match=r"encode\(\) its input first"):
            context.decode(prompt([1]))
        context.encode(prompt([5, 6, 7]))
        context.decode(prompt([0]))
        assert context.logits().shape == (model.n_vocab,)


def test_decoder_has_no_encoder(context: Context) -> None:
    with pytest.raises(InvalidRequestError, match="has no encoder"):
        context.encode(prompt([1]))


@pytest.mark.parametrize("arch", ["mamba2", "falcon-h1", "lfm2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recurrent(synthetic: Callable[..., Model], arch: str, layout: Any) -> None:
    model = synthetic(arch)
    assert model.memory_kind in ("recurrent", "hybrid")
    with make_context(model, n_ctx=1024, n_seq_max=4, kv_layout=layout) as context:
        context.decode(prompt([5, 6, 7, 8]))
        state = context.state_save(0)
        assert not context.seq_rm(0, 2)  # can't be cut back
        with pytest.raises(InvalidRequestError, match="can only be copied whole"):
            context.seq_cp(0, 1, 0, 2)
        context.seq_cp(0, 1)
        expected = greedy(context, [9], 5)
        assert greedy(context, [9], 5, seq_id=1) == expected
        context.state_restore(2, state)
        assert greedy(context, [9], 5, seq_id=2) == expected
        assert context.seq_rm(0)
        with pytest.raises(InvalidRequestError, match="several sequences"):
            context.decode(batch_of((1, 0, [0, 3])))
        with pytest.raises(InvalidRequestError, match="another model"):
            context.state_restore(2, state[:8] + bytes(8) + state[16:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("swa_full", [True, False])
def test_sliding_window(gemma3: Model, layout: Any, swa_full: bool) -> None:
    tokens = gemma3.tokenize("One two three, and four. " * 120)[:700]
    with make_context(
        gemma3, n_ctx=4096, n_seq_max=2, n_ubatch=64, kv_layout=layout, swa_full=swa_full
    ) as context:
        context.decode(prompt(tokens))
        state = context.state_save(0)
        expected = greedy(context, [9], 5)
        context.state_restore(1, state)
        # The window is all that a state holds of such layers, and all that is needed to go on.
        assert (context.seq_pos_min(1), context.seq_pos_max(1)) == (700 - 512, 699)
        assert greedy(context, [9], 5, seq_id=1) == expected
