"""lm-evaluation-harness on a converted model: its command does not know ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerzoo.data.tokenizer import extra, reason
from layerzoo.spec import SpecError, at


def harness(
    model: Any, folder: Path, tasks: list[str], include: Path | None, limit: int | None
) -> dict[str, dict[str, float]]:
    """Figures by task of the harness.

    Args:
        tasks: its names, or those of YAML files in `include`, which need no hub.
        limit: samples a task.

    Raises:
        SpecError: it is not installed, a task is unknown, or its data cannot be reached.
    """
    with at("--tasks"):
        extra("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise SpecError(f"--tasks {unknown[0]}: the harness knows no such task; see `lm-eval ls tasks`")
    arm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1)
    try:
        found = simple_evaluate(arm, tasks=tasks, task_manager=manager, limit=limit)
    except (OSError, ConnectionError) as error:
        raise SpecError(f"--tasks: its data cannot be reached: {reason(error)}") from None
    results: dict[str, Any] = (found or {})["results"]
    return {
        task: {name: float(value) for name, value in figures.items() if type(value) in (int, float)}
        for task, figures in results.items()
    }
