"""Searches for wrong gradients, wrong models and silent failures.

They are seeded and repeatable, and end with exit code 1 where they find one.
"""
