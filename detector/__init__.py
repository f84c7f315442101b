"""FSSD, RetinaNet and RFBNet trained with Mutual Guidance: the reference training system around `mg_ops`.

It runs from the checkout: `python -m detector.train --help`, and `evaluate`, `detect`, `visualize`, `reproduce` and
`download` beside it.
"""
