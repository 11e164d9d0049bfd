"""A model of several ranks that computes next to nothing, and shows which ranks took part."""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from omnirt_tasks.contract import ArtifactKind
from omnirt_tasks.errors import ModelFailed
from omnirt_tasks.registry import RankJob, RankOutput, RankStart

ENTRY = "tests.support.ranks:Adder"


class Adder:
    """Adds up, at each step, what every rank gives: ten to the power of its number. Two ranks make 11, one makes 1.

    Its options: `steps`, `step_ms`, `fail_in_rank`, `refuse_in_rank` (raises what the caller is to know; -1 is every
    rank), `die_in_rank`, `hang_in_rank` (deaf to SIGTERM). Each rank notes its pid and the step it is at.
    """

    def __init__(self, start: RankStart) -> None:
        self._start = start
        if (start.folder / f"no-model-{start.rank}").exists():
            raise ModelFailed(f"Rank {start.rank} has no model.", "Give it one.")

    def run(self, job: RankJob) -> Sequence[RankOutput]:
        rank, config = self._start.rank, job.config
        if config.get("refuse_in_rank") in {-1, rank}:
            raise ModelFailed("The adder does not add this.", "Ask for less.")
        sums = []
        steps = int(str(config["steps"]))
        for step in range(1, steps + 1):
            self._note(f"rank-{rank}.json", {"pid": os.getpid(), "at_step": step})
            if config.get("fail_in_rank") == rank:
                raise ValueError("told to fail")
            if config.get("die_in_rank") == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            if config.get("hang_in_rank") == rank:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(3600)
            sums.append(self._sum(10**rank))
            time.sleep(float(str(config.get("step_ms", 0))) / 1000)
            job.tell(step, steps)
        if rank == 0:
            (job.output_dir / "0.txt").write_text(json.dumps(sums), encoding="utf-8")
        return (RankOutput("0.txt", ArtifactKind.TEXT, "text/plain"),)

    def _sum(self, value: int) -> int:
        if self._start.ranks == 1:
            return value
        import torch
        import torch.distributed as dist

        box = torch.tensor(value)
        dist.all_reduce(box)
        return int(box)

    def _note(self, name: str, facts: dict[str, int]) -> None:
        file = Path(self._start.folder) / name
        unfinished = file.with_suffix(".new")
        unfinished.write_text(json.dumps(facts), encoding="utf-8")
        unfinished.replace(file)
