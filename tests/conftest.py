"""One thread for torch: the suite shares its cores, and sums come out in the same order everywhere.

Set before anything imports torch, so that rooms without torch are tested without it.
"""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
