"""The demo: three experiments on a small language model that comes from the package index, with no account or token."""
