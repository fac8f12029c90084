"""`batchcore tune`: find good engine options for this machine and keep them in a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from batchcore.cli.errors import reported
from batchcore.errors import ConfigError

__all__ = ["tune"]


@reported()
def tune(
    model: Annotated[str, typer.Argument(help="Path, preset or hf:owner/repo/file.gguf.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile.")] = Path("profile.json"),
    num_prompts: Annotated[int, typer.Option(min=1)] = 32,
    prompt_tokens: Annotated[str, typer.Option(help="As for bench throughput.")] = "uniform:20:200",
    output_tokens: Annotated[str, typer.Option()] = "uniform:16:48",
    max_num_seqs: Annotated[
        str, typer.Option(help="Values to try, the one to beat first.")
    ] = "16,8,32",
    n_threads: Annotated[
        str, typer.Option(help="Values to try.", show_default="all cores and half of them")
    ] = "",
    n_ubatch: Annotated[str, typer.Option(help="Values to try.")] = "512,128,256",
    kv_layout: Annotated[str, typer.Option(help="Values to try.")] = "unified,streams",
    flash_attn: Annotated[str, typer.Option(help="Values to try.")] = "auto,off",
    n_ctx: Annotated[int, typer.Option(min=256)] = 8192,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Try options one after another on prompts like yours, and write the fastest as a profile.

    Use it with `Engine(profile="profile.json")`.
    """
    from rich.console import Console  # noqa: PLC0415

    from batchcore.bench.result import write_text_atomically  # noqa: PLC0415
    from batchcore.bench.tune import Trial  # noqa: PLC0415
    from batchcore.bench.tune import tune as run_tune  # noqa: PLC0415
    from batchcore.bench.workload import Workload  # noqa: PLC0415
    from batchcore.engine_options import usable_cores  # noqa: PLC0415
    from batchcore.model import Model  # noqa: PLC0415
    from batchcore.params import SamplingParams  # noqa: PLC0415

    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"can't write {out}: it is a folder, or its folder does not exist")
    cores = usable_cores()
    threads = n_threads or ",".join(str(n) for n in dict.fromkeys((cores, max(1, cores // 2))))
    candidates: dict[str, list[Any]] = {
        "n_threads": _numbers("n-threads", threads),
        "kv_layout": kv_layout.split(","),
        "n_ubatch": _numbers("n-ubatch", n_ubatch),
        "flash_attn": flash_attn.split(","),
        "max_num_seqs": _numbers("max-num-seqs", max_num_seqs),
    }
    loaded = Model(model, progress=True)
    console = Console(highlight=False)

    def show(trial: Trial) -> None:
        speed = trial.total_tokens_per_s
        figure = f"{speed:8.1f} tok/s" if speed is not None else f"does not work: {trial.note}"
        console.print(f"{trial.option:>14} = {trial.value!s:<10} {figure}", soft_wrap=True)

    workload = Workload.generate(
        loaded,
        num_prompts=num_prompts,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=seed,
        params=SamplingParams(temperature=0, ignore_eos=True),
    )
    result = run_tune(
        loaded,
        candidates=candidates,
        workload=workload,
        n_ctx=n_ctx,
        rounds=rounds,
        on_trial=show,
    )
    write_text_atomically(out, result.profile.to_json())
    best = ", ".join(f"{name}={value}" for name, value in result.profile.options.items())
    console.print(f"{best}\nwritten to {out}", soft_wrap=True)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{option} must be numbers like 8,16, not {text!r}") from None
