"""The subcommands of `alexnet`: composition, a file an area; imports happen when one runs."""
