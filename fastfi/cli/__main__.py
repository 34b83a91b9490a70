"""``python -m fastfi.cli``, the same as the ``fastfi`` command."""

from fastfi.cli import main

main()
