"""Experiments that run elsewhere: what is sent to a service as data, and what comes back."""
