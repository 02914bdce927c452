"""Deployment form: the same function of the image with fewer operations.

`deploy(model)` copies a model and rewrites the copy for inference, in five steps:

1. **The method's own folding.** Every sub-module with a method `deploy_()` is asked, once, to
   change itself in place into its folded form; children come before their parents. It may replace
   its sub-modules and drop parameters, but must keep what `forward` takes and returns. The
   helpers `batch_norm_affine`, `fold_after` and `fold_before` are there for it.
2. **Batch norms** move into the convolution or linear layer that feeds them, or that they feed. Who
   feeds whom is seen while the model runs (`batch_norms.py`), not guessed from names.
3. **Attention**: timm modules that have fused attention switched off get it, and tables of relative
   positions that are gathered anew in every call are gathered once.
4. **Memory layout**: weights of 2-d convolutions become channels-last.
5. **Packed linear layers**: on a CPU in float32 the larger ones keep their weights in the order in
   which the matrix product reads them (`packed.py`).

After each step the outputs are compared with the original's on seeded inputs: a relative error
above 1e-5 is an error, never a silent approximation.
"""

from harness.deployment.affine import batch_norm_affine, fold_after, fold_before
from harness.deployment.batch_norms import fold_batch_norms
from harness.deployment.form import TOLERANCE, DeployReport, deploy, relative_error
from harness.deployment.packed import PackedLinear, pack_linears

__all__ = [
    "TOLERANCE",
    "DeployReport",
    "PackedLinear",
    "batch_norm_affine",
    "deploy",
    "fold_after",
    "fold_batch_norms",
    "fold_before",
    "pack_linears",
    "relative_error",
]
