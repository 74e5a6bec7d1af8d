"""Environment of the suite, set before anything imports torch: rooms without it are tested without it.

One thread for torch: the suite shares its cores, and sums come out in the same order everywhere. Without an
NVIDIA driver kernels run in Triton's interpreter, which has to be chosen before the first import of triton:
transformers and torch import it too.
"""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"
