"""FSSD, RetinaNet and RFBNet trained with Mutual Guidance: the reference training system around `mg_ops`.

Runs from the checkout: `python -m detector.train --help`, then `evaluate`, `detect`, `visualize`, `reproduce`,
    `download`.
"""
