"""GPU kernels of treeq-export in the Triton language; kernels/README.md says how they are proven.

This package imports nothing of `treeq_export`. Modules that need `triton` or `torch` import them at
their top, so import the module, not the package, where one of them may be missing.
"""
