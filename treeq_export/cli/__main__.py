"""`python -m treeq_export.cli`."""

from treeq_export.cli import main

if __name__ == "__main__":
    main()
