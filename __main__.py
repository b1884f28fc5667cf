"""`python -m actmaps`."""

from .cli import main

main()
