"""Python source to IR. Nothing of the user's is run here."""
