"""Tasks. Each is a LightningDataModule, see `layerzoo.data.task.Task`.

Every task of a module in this folder is found here under its name, as in `layerzoo.data.MQAR`.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from layerzoo.data.recall import RecallTask
from layerzoo.data.task import Task, list_tasks

__all__ = ["RecallTask", "Task", "list_tasks"]

for _info in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_info.name)

for _task in list_tasks():
    if _task.__module__.startswith(f"{__name__}."):
        globals()[_task.__name__] = _task
        __all__ += [_task.__name__]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
