"""The kit for whoever writes a storage backend: doubles that fail, and doubles that count.

Shipped with the package; imports no test framework unless a module says so.
"""
