from typing import TypedDict

__version__: str

class _BuildInfo(TypedDict):
    version: str
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
