"""The acceptance run on one GPU, see README.md."""
