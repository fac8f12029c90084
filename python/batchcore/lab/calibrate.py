"""How fast a model is here, roughly, before anything is measured: what a plan is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchcore.bench.runners import run_continuous, run_sequential
from batchcore.lab.plan import Rates
from batchcore.lab.runs import complete
from batchcore.lab.setup import greedy

if TYPE_CHECKING:
    from batchcore.lab.setup import Lab

__all__ = ["measure_rates"]

_PROMPT_TOKENS = 16
_OUTPUT_TOKENS = 8
# Beyond this much for one request, the batch is not tried: it would take many times that.
_SLOW_S = 3.0


def measure_rates(lab: Lab) -> Rates:
    """Time one small request and, if that is quick, one for each slot."""
    slots = lab.config.max_num_seqs
    prompts = lab.prompts(slots, _PROMPT_TOKENS, seed_offset=6)
    params = greedy(_OUTPUT_TOKENS)
    with lab.engine(slots, _PROMPT_TOKENS + _OUTPUT_TOKENS) as engine:
        lab.on_step(0.0, "one small request")
        engine.generate([prompts[0][:2]], greedy(1))  # reads the weights from the disk
        (alone,) = complete(run_sequential(engine, prompts[:1], params)).requests
        ttft_s = alone.ttft_s or alone.latency_s
        prefill = _PROMPT_TOKENS / ttft_s
        decode = (_OUTPUT_TOKENS - 1) / max(alone.latency_s - ttft_s, 1e-6)
        if alone.latency_s > _SLOW_S:
            return Rates(prefill, decode, decode)
        lab.on_step(0.5, f"{slots} small requests")
        run = complete(run_continuous(engine, prompts, params))
    # What the prompts take by themselves is not of the decode; but it is no more than most of it.
    decode_s = max(run.total_s - slots * ttft_s, 0.2 * run.total_s)
    return Rates(prefill, decode, run.num_output_tokens / decode_s)
