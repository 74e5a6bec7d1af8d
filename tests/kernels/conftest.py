"""Without a GPU, kernels run in Triton's interpreter; it must be chosen before any of them is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_bounds(tensor, scope) -> None:
        """Loop bounds are arrays of one value; numpy 2.4 no longer takes those for integers."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_bounds
