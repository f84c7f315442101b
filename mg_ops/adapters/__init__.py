"""Mutual guidance inside detectors this project did not write: one module a library, none imported before it is asked
for.

`mg_ops.adapters.labels` needs torch alone; `torchvision`, `ultralytics`, `mmdet` and `detectron2` adapt to the library
of that name. Only `torchvision` imports its library.
"""
