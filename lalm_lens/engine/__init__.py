"""How to run many branches of a few runs."""
