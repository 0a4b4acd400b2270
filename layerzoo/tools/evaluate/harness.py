"""lm-evaluation-harness on a converted model: its command does not know ours."""

from __future__ import annotations

import importlib
from numbers import Real
from pathlib import Path
from typing import Any

from layerzoo.data.tokenizer import extra, reason
from layerzoo.ops import accumulator_dtype
from layerzoo.spec import SpecError, error_at


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
    with error_at("--tasks"):
        extra("lm_eval")
    from transformers import AutoTokenizer

    evaluator, tasks_of, models = (
        importlib.import_module(f"lm_eval.{name}")
        for name in ("evaluator", "tasks", "models.huggingface")
    )
    manager = manager_of(tasks_of.TaskManager, tasks, include)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise SpecError(f"--tasks {unknown[0]}: no such task; see `lm-eval ls tasks`")
    arm = models.HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=1,
        # By default it sums log-likelihoods in the model's dtype.
        softmax_dtype=accumulator_dtype(model.lm_head.weight),
    )
    try:
        found = evaluator.simple_evaluate(arm, tasks=tasks, task_manager=manager, limit=limit)
    except (OSError, ConnectionError) as error:
        raise SpecError(f"--tasks: its data cannot be reached: {reason(error)}") from None
    results: dict[str, Any] = (found or {})["results"]
    return {task: numbers(task, figures) for task, figures in results.items()}


def manager_of(TaskManager: Any, tasks: list[str], include: Path | None) -> Any:
    """What knows the tasks: the user's own, or the harness's too, whose index takes a minute."""
    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if all(name in own.all_tasks for name in tasks):
            return own
    return TaskManager(include_path=None if include is None else str(include))


def numbers(task: str, figures: dict[str, Any]) -> dict[str, float]:
    """Those of the metrics, whose names have a comma: acc,none. What else there is under such a
    name is said to be left out, but for "N/A", which is the harness's word for nothing."""
    found = {}
    for name, x in figures.items():
        if "," not in name or x == "N/A":
            continue
        x = x.item() if getattr(x, "ndim", None) == 0 else x  # of NumPy and of torch
        if isinstance(x, Real) and not isinstance(x, bool):
            found[name] = float(x)
        else:
            print(f"{task}: {name}: left out, as it is no number: {x!r}", flush=True)
    return found
