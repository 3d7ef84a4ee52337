"""The service: it holds models, takes experiments as data, and runs them in processes of their own."""
