"""What runs inside the server: files that a repository gets copies of.

They import each other by the names that the copies have (`treeq_*`), and of third parties only
numpy, torch, diffusers and the runtime: treeq-export need not be installed beside the server,
except for engines that a Python model runs.
"""
