"""The batching lab: six measurements on one model and one machine, and a report of them.

`plan` says how much is measured, `parts`, `load` and `roofline` measure, `run` does one after the
other and can go on where it was stopped. What they give is one plain document; `answers`,
`recommendations` and `report` make everything that a person reads from it.
"""

from __future__ import annotations

from batchcore.lab.plan import LabConfig
from batchcore.lab.run import run_lab

__all__ = ["LabConfig", "run_lab"]
