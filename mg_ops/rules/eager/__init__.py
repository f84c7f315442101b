"""The definitions of the rules in plain eager PyTorch, each the oracle of its other backends."""
