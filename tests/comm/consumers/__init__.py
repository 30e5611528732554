"""What torch builds on a process group, written so that it runs on any backend and returns what it computed.

Each module's public functions take `(rank, world_size, numbers)` and return a dict of tensors, numbers and
plain objects; `test_consumers_match_gloo.py` runs them on gloo and on our backend and compares the bits.
"""
