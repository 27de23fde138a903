"""What runs inside a Triton server; each version of a model has a copy of this folder.

It needs Python 3.10, numpy, torch, diffusers and the runtime. treeq-export, which samples and opens
sessions by the same code, need not be installed beside the server, except for engines that a Python
model runs.
"""
