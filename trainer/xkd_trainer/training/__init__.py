"""The loop on accelerate, checkpoints, the student's folder.

May import: losses, data, models; schemas.
Lost without it: training; losses can still be called.
"""
