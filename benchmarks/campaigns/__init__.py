"""Searches for wrong gradients, wrong models and silent failures: seeded, repeatable, with exit code 1 where they find one."""
