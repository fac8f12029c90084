from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

_Integers: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
_Flags: TypeAlias = Sequence[bool] | npt.NDArray[np.bool_]
_SeqIds: TypeAlias = _Integers | Sequence[Sequence[int]]

__version__: str

class _BuildInfo(TypedDict):
    version: str
    llama_cpp_version: str
    llama_cpp_commit: str
    compiler: str
    build_type: str
    cpu_features: list[str]
    backends: list[str]

class _Device(TypedDict):
    name: str
    description: str
    type: str
    backend: str
    memory_total_bytes: int
    memory_free_bytes: int

def build_info() -> _BuildInfo: ...
def devices() -> list[_Device]: ...

_error_names: tuple[str, ...]

def _raise(name: str) -> NoReturn: ...
def drain_log() -> tuple[list[tuple[int, str]], int]: ...
def set_log_level(level: int) -> None: ...

class _SpecialTokens(TypedDict):
    bos: int | None
    eos: int | None
    eot: int | None
    sep: int | None
    nl: int | None
    pad: int | None
    mask: int | None
    add_bos: bool
    add_eos: bool

class Model:
    def __init__(
        self,
        path: str,
        *,
        n_gpu_layers: int = -1,
        use_mmap: bool = True,
        use_mlock: bool = False,
        devices: Sequence[str] = [],
        split_mode: str = "layer",
        main_gpu: int = 0,
        tensor_split: Sequence[float] = [],
        vocab_only: bool = False,
        check_tensors: bool = False,
        progress: Callable[[float], bool | None] | None = None,
    ) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def n_params(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_embd_out(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_head_kv(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_swa(self) -> int: ...
    @property
    def has_encoder(self) -> bool: ...
    @property
    def has_decoder(self) -> bool: ...
    @property
    def is_recurrent(self) -> bool: ...
    @property
    def is_hybrid(self) -> bool: ...
    @property
    def is_diffusion(self) -> bool: ...
    @property
    def memory_kind(
        self,
    ) -> Literal["none", "attention", "sliding_window", "recurrent", "hybrid"]: ...
    @property
    def why_no_generation(self) -> str: ...
    @property
    def special_tokens(self) -> _SpecialTokens: ...
    @property
    def end_of_generation(self) -> list[int]: ...
    def chat_template(self, name: str = "") -> str | None: ...
    def tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> list[int]: ...
    def detokenize(self, tokens: Sequence[int], skip_special: bool) -> bytes: ...
    def token_piece(self, token: int, special: bool) -> bytes: ...

class Batch:
    """Tokens for one decode or encode call."""

    def __init__(self) -> None: ...
    @staticmethod
    def from_arrays(
        tokens: _Integers, pos: _Integers, seq_ids: _SeqIds, logits: _Flags | None = None
    ) -> Batch:
        """Make a batch of equally long arrays.

        Args:
            tokens: The tokens.
            pos: Their positions, from 0, without gaps in a sequence.
            seq_ids: The sequence of each token; or lists of several, which need a unified layout.
            logits: Which tokens ask for an output; None means the last one only.
        """

    def add(self, token: int, pos: int, seq_ids: Sequence[int], logits: bool = False) -> None:
        """Append one token."""

    def extend(
        self, tokens: _Integers, pos: _Integers, seq_ids: _SeqIds, logits: _Flags | None = None
    ) -> None:
        """Append arrays as `from_arrays` takes them."""

    def clear(self) -> None: ...
    def __len__(self) -> int: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def pos(self) -> list[int]: ...
    @property
    def seq_ids(self) -> list[list[int]]: ...
    @property
    def logits(self) -> list[bool]: ...

class ResultView:
    """Rows of llama.cpp's output buffer, readable until the context computes again.

    `numpy.asarray(view)` is a read-only array without a copy; as long as it lives, the context
    refuses to decode (ViewInUseError). A view that is read after the next decode raises
    StaleViewError.
    """

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]: ...
    def __getitem__(self, key: Any) -> Any: ...
    def __len__(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def argmax(self) -> Any:
        """Index of the largest value: an int of one row, an array of several."""

    def copy(self) -> npt.NDArray[np.float32]:
        """An array of its own, to keep."""

class LowLevelContext:
    def __init__(self, model: Model, options: dict[str, Any]) -> None: ...
    def close(self) -> None:
        """Free everything. Refused while arrays over the last result live."""

    @property
    def closed(self) -> bool: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_ctx_seq(self) -> int: ...
    @property
    def n_batch(self) -> int: ...
    @property
    def n_ubatch(self) -> int: ...
    @property
    def n_seq_max(self) -> int: ...
    @property
    def n_outputs_max(self) -> int: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def n_threads_batch(self) -> int: ...
    @property
    def warnings(self) -> list[str]: ...
    @property
    def num_graphs_reused(self) -> int: ...
    def memory_usage(self) -> dict[str, int]:
        """Bytes over all devices: `model_bytes`, `context_bytes`, `compute_bytes`."""

    def decode(self, batch: Batch) -> None:
        """Compute a batch and keep its tokens in memory.

        Raises:
            InvalidRequestError: llama.cpp can't take the batch.
            ViewInUseError: An array over the last result is alive.
            DecodeError: llama.cpp failed; `status` is what it returned.
        """

    def encode(self, batch: Batch) -> None:
        """Compute a batch with an encoder. Raises what `decode` does."""

    def interrupt(self) -> None:
        """Make the running decode, or else the next one, fail with status 2. Any thread."""

    def logits(self, index: int = -1) -> ResultView:
        """Logits of one token of the last batch; negative counts from its end."""

    def logits_all(self) -> ResultView:
        """Logits of all tokens that asked for them, in the order of the batch."""

    def embeddings(self, index: int = -1) -> ResultView:
        """Embedding of one token, where nothing is pooled."""

    def embeddings_all(self) -> ResultView:
        """Embeddings of all tokens of the last batch, where nothing is pooled."""

    def embeddings_seq(self, seq_id: int) -> ResultView:
        """Pooled embedding of a sequence of the last batch."""

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> bool:
        """Forget positions [p0, p1); negative means from the start or to the end.

        Returns False where this memory can't forget a part (recurrent models).
        """

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        """Make the empty sequence `dst` hold positions [p0, p1) of `src`.

        A unified layout shares the cells; between streams only whole sequences can be copied, which
        happens at the next decode.
        """

    def seq_keep(self, seq_id: int) -> None:
        """Forget all other sequences."""

    def seq_pos_min(self, seq_id: int) -> int:
        """First position that is held, -1 where there is none."""

    def seq_pos_max(self, seq_id: int) -> int:
        """Last position that is held, -1 where there is none."""

    def clear(self) -> None:
        """Forget everything."""

    def state_save(self, seq_id: int) -> bytes:
        """The state of a sequence, for `state_restore` into any sequence of an equal context."""

    def state_restore(self, seq_id: int, state: bytes) -> None:
        """Replace a sequence by a saved one.

        Raises:
            InvalidRequestError: The bytes are damaged or not of an equal context.
            EngineError: llama.cpp can't restore it, e.g. because no cells are free.
        """

class SamplingParams:
    def __init__(self, values: dict[str, Any]) -> None: ...

class Notifier:
    def __init__(self) -> None: ...
    @property
    def fd(self) -> int: ...
    def take(self) -> list[int]: ...

_Logprob = tuple[int, float]
_Delta = tuple[
    int,
    str,
    list[int],
    list[tuple[_Logprob, list[_Logprob]]],
    Literal["stop", "length", "cancelled", "timeout", "error"] | None,
    int | str | None,
]
_Metrics = tuple[float, float, float, float, int, int]

class RequestChannel:
    @property
    def id(self) -> int: ...
    @property
    def is_finished(self) -> bool: ...
    def take(self) -> tuple[list[_Delta], bool, BaseException | None, _Metrics] | None: ...
    def wait(self, timeout_s: float) -> bool: ...

class Engine:
    def __init__(self, model: Model, context: dict[str, Any], engine: dict[str, Any]) -> None: ...
    def start(self) -> None: ...
    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        priority: int,
        timeout_s: float | None,
        streams: bool,
        notifier: Notifier | None,
    ) -> RequestChannel: ...
    def abort(self, id: int) -> None: ...
    def step(self) -> list[int]: ...
    def close(self) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    @property
    def warnings(self) -> list[str]: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def num_cells(self) -> int: ...
    @property
    def cells_per_slot(self) -> int: ...
