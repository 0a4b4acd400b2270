"""Checks that a layer or a task keeps what layerzoo promises of it, for any package.

With pytest, one test per law, case and implementation::

    import pytest
    from layerzoo.testing import layer_checks

    @pytest.mark.parametrize("check", layer_checks("my_layer"), ids=str)
    def test_law(check):
        check()

On the command line, for a registered name or a file that is not installed::

    layerzoo check my_layer
    layerzoo check my_layer.py --quick

The tests of layerzoo run the same checks over every layer and every task of the zoo.
"""

from layerzoo.testing.check import Broken, Check
from layerzoo.testing.layers import layer_checks
from layerzoo.testing.tasks import task_checks

__all__ = ["Broken", "Check", "layer_checks", "task_checks"]
