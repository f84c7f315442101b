"""Rules of assignment beside mutual matching; docs/definition/rules.md says what they share.

Each rule is one basename: its function and matcher here, its eager reference in `eager`, its kernels in csrc.
"""
