"""A loaded model: weights, metadata, vocabulary and chat template."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from batchcore import _core, _log, chat, models
from batchcore.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchcore.chat import Message

    MemoryKind = Literal["none", "attention", "sliding_window", "recurrent", "hybrid"]
    Progress = Callable[[float], bool | None]

__all__ = ["Model", "SpecialTokens"]


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens with a meaning of their own; None where the vocabulary has none."""

    bos: int | None
    eos: int | None
    eot: int | None
    sep: int | None
    nl: int | None
    pad: int | None
    mask: int | None
    add_bos: bool
    """Whether `tokenize` puts `bos` in front."""
    add_eos: bool
    """Whether `tokenize` puts `eos` at the end."""


class Model:
    """A loaded GGUF model. Immutable and thread-safe; several engines may share one.

    Its memory is freed with the last object that uses it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        n_gpu_layers: int = -1,
        use_mmap: bool = True,
        use_mlock: bool = False,
        devices: Sequence[str] | None = None,
        split_mode: Literal["none", "layer", "row"] = "layer",
        main_gpu: int = 0,
        tensor_split: Sequence[float] | None = None,
        vocab_only: bool = False,
        check_tensors: bool = False,
        kernels: Literal["auto", "ggml"] = "auto",
        progress: Progress | bool | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: A path, the name of a preset, or `hf:owner/repo/file.gguf`.
            n_gpu_layers: Layers to keep in GPU memory; negative means all.
            use_mmap: Map the file into memory instead of reading it, where that is of use.
            use_mlock: Keep the weights from being swapped out.
            devices: Names of the devices to use (see `batchcore info`); None means every GPU, and
                `["CPU"]` none.
            split_mode: How to spread weights over several GPUs: whole layers, rows, or not at all.
            main_gpu: Index of the only device with `split_mode="none"`.
            tensor_split: Share of the weights per device; None means by free memory.
            vocab_only: Load no weights: good for tokenising and metadata.
            check_tensors: Look for invalid values while loading.
            kernels: What computes on the CPU. `"auto"` (default): batchcore's own kernels where the
                CPU has AVX2 or better, with outputs that do not depend on the load. `"ggml"`:
                llama.cpp's, to compare.
            progress: Called with 0..1 while loading; returning False cancels. True shows a bar.

        Raises:
            ModelLoadError: The file is missing, damaged, not a GGUF or refused by llama.cpp, which
                then says why; or `progress` cancelled.
            ConfigError: A parameter has a value that can't work.
        """
        path = models.resolve(model, progress=progress is True)
        try:
            with _reporter(progress, path.name) as callback:
                self._native = _core.Model(
                    os.fspath(path),
                    n_gpu_layers=n_gpu_layers,
                    use_mmap=use_mmap,
                    use_mlock=use_mlock,
                    devices=list(devices or ()),
                    split_mode=split_mode,
                    main_gpu=main_gpu,
                    tensor_split=list(tensor_split or ()),
                    vocab_only=vocab_only,
                    check_tensors=check_tensors,
                    kernels=kernels,
                    progress=callback,
                )
        finally:
            _log.forward()
        self._special = SpecialTokens(**self._native.special_tokens)

    def __repr__(self) -> str:
        """The file and what is in it."""
        return f"Model({self.path!r}: {self.description})"

    @staticmethod
    def available_kernels() -> str:
        """What `kernels="auto"` means on this CPU: an instruction set, or `ggml` for none."""
        return _core.available_kernels()

    @property
    def path(self) -> str:
        """The file it was loaded from."""
        return self._native.path

    @property
    def kernels(self) -> str:
        """What computes this model on the CPU.

        The instruction set of batchcore's kernels (`avx512_vnni`, `avx_vnni`, `avx2`), or `ggml`.
        """
        return self._native.kernels

    @property
    def description(self) -> str:
        """Architecture, size and quantisation in a few words, as llama.cpp puts it."""
        return self._native.description

    @property
    def architecture(self) -> str:
        """GGUF's `general.architecture`, e.g. `llama`."""
        return self._native.architecture

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata; values as text, arrays shortened by llama.cpp."""
        return self._native.metadata

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return self._native.n_params

    @property
    def size_bytes(self) -> int:
        """Size of all tensors, in bytes."""
        return self._native.size_bytes

    @property
    def n_ctx_train(self) -> int:
        """Longest sequence that the model was trained with, in tokens."""
        return self._native.n_ctx_train

    @property
    def n_embd(self) -> int:
        """Width of the hidden state."""
        return self._native.n_embd

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        return self._native.n_layer

    @property
    def n_head(self) -> int:
        """Attention heads of the first layer."""
        return self._native.n_head

    @property
    def n_head_kv(self) -> int:
        """Key-value heads of the first layer."""
        return self._native.n_head_kv

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._native.n_vocab

    @property
    def n_swa(self) -> int:
        """Width of the sliding attention window in tokens; 0 where there is none."""
        return self._native.n_swa

    @property
    def has_encoder(self) -> bool:
        """Whether it has an encoder, like T5."""
        return self._native.has_encoder

    @property
    def has_decoder(self) -> bool:
        """Whether it has a decoder."""
        return self._native.has_decoder

    @property
    def is_recurrent(self) -> bool:
        """Whether it keeps one state per sequence instead of a cell per token, like Mamba."""
        return self._native.is_recurrent

    @property
    def is_hybrid(self) -> bool:
        """Whether it mixes attention layers with recurrent ones, like Jamba."""
        return self._native.is_hybrid

    @property
    def memory_kind(self) -> MemoryKind:
        """What it keeps for the tokens it has seen."""
        return self._native.memory_kind

    @property
    def can_generate(self) -> bool:
        """Whether an engine can generate text with it."""
        return not self._native.why_no_generation

    @property
    def special_tokens(self) -> SpecialTokens:
        """Tokens with a meaning of their own."""
        return self._special

    @property
    def end_of_generation(self) -> list[int]:
        """Tokens that end an answer (end of sequence, end of turn, ...), ascending."""
        return self._native.end_of_generation

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the file's chat template; None where it has none."""
        return self._native.chat_template()

    def named_chat_template(self, name: str) -> str | None:
        """One of several templates in a file, e.g. `tool_use`; None where it has no such one."""
        return self._native.chat_template(name)

    def tokenize(
        self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Turn text into tokens.

        `detokenize_bytes` gives back exactly the bytes of `text`, unless `parse_special` is set or
        the vocabulary has no token for one of them (those are lost, as with llama.cpp).

        Args:
            text: The text; bytes need not be UTF-8.
            add_special: Add what the model wants around a text, e.g. BOS.
            parse_special: Read names of control tokens, like `<|im_start|>`, as those tokens.

        Raises:
            InvalidRequestError: The model has no vocabulary.
        """
        return self._native.tokenize(_to_bytes(text), add_special, parse_special)

    def tokenize_prompt(self, text: str) -> list[int]:
        """Turn the text of a prompt into tokens: control tokens read, BOS in front but not twice.

        Raises:
            InvalidRequestError: The model has no vocabulary.
        """
        tokens = self.tokenize(text, parse_special=True)
        bos = self._special.bos
        if bos is not None and tokens[:2] == [bos, bos]:
            del tokens[0]  # the text began with its name, as a chat template writes it
        return tokens

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """Turn tokens into text; bytes that are no UTF-8 become U+FFFD.

        Raises:
            InvalidRequestError: A token is not in the vocabulary.
        """
        return self.detokenize_bytes(tokens, skip_special=skip_special).decode(errors="replace")

    def detokenize_bytes(self, tokens: Sequence[int], *, skip_special: bool = True) -> bytes:
        """Turn tokens into the bytes of their text.

        Args:
            tokens: Of a whole text; some vocabularies put a space in front, which is removed.
            skip_special: Leave control tokens out; otherwise their names appear.

        Raises:
            InvalidRequestError: A token is not in the vocabulary.
        """
        return self._native.detokenize(tokens, skip_special)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; a control token has none, or with `special` its name.

        Raises:
            InvalidRequestError: The token is not in the vocabulary.
        """
        return self._native.token_piece(token, special)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: object,
    ) -> str:
        """Turn messages into the text of a prompt, by the chat template in the file.

        The result names control tokens, BOS too where the template writes it. Tokenise it with
        `parse_special`, or use `tokenize_chat`, which knows about BOS.

        Args:
            messages: The chat so far, e.g. `[{"role": "user", "content": "Hi"}]`.
            add_generation_prompt: End with what begins the assistant's answer.
            tools: JSON schemas of functions that the model may call.
            template: Jinja source to use instead of the file's.
            **variables: Anything else that the template reads.

        Raises:
            InvalidRequestError: The model has no template, or the template refuses the messages.
        """
        source = template if template is not None else self.chat_template
        if source is None:
            raise InvalidRequestError(
                f"{self.path} has no chat template (is it a base model?); pass one as template=..."
            )
        return chat.render(
            source,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            bos_token=self._name(self._special.bos),
            eos_token=self._name(self._special.eos),
            **variables,
        )

    def tokenize_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: object,
    ) -> list[int]:
        """Turn messages into the tokens of a prompt, with one BOS where the model wants it.

        Takes and raises what `apply_chat_template` does.
        """
        text = self.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            template=template,
            **variables,
        )
        tokens = self.tokenize(text, add_special=False, parse_special=True)
        bos = self._special.bos
        if self._special.add_bos and bos is not None and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def _name(self, token: int | None) -> str:
        if token is None:
            return ""
        return self.token_bytes(token, special=True).decode(errors="replace")


def _to_bytes(text: str | bytes) -> bytes:
    if isinstance(text, str):
        # Lone surrogates are not text, but a prompt with one should still be served.
        return text.encode(errors="surrogatepass")
    return bytes(text)


@contextmanager
def _reporter(progress: Progress | bool | None, name: str) -> Iterator[Progress | None]:
    """The callback for the native loader."""
    if progress is not True:
        yield progress or None
        return
    # rich is only needed here, and importing it takes long.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"loading {name}", total=1.0)

        def update(fraction: float) -> None:
            bar.update(task, completed=fraction)

        yield update
