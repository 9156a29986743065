"""Scripts of what happens around the graphs, drawn: no subject may ever return what belongs to another video or model.

`benchmarks/machine.py` runs more of them.
"""

from __future__ import annotations

import pytest
import torch

from tests.machine.life import DTYPES, run_scripts

SCRIPTS = 8
ALWAYS = (torch.bfloat16,)


@pytest.mark.filterwarnings("ignore:no step of context:bwcache_compile.CacheWarning")
@pytest.mark.parametrize("dtype", [pytest.param(d, marks=() if d in ALWAYS else pytest.mark.slow) for d in DTYPES], ids=str)
def test_no_script_has_a_wrong_output(dtype: torch.dtype) -> None:
    tally = run_scripts(dtype, SCRIPTS)
    assert tally.reused > 0.1 * tally.calls, tally
    assert tally.followed > 0, tally
    assert tally.failures > 0, tally
